"use strict";
// What app/lens/report.py told, and what the page shows of it. Rows are predictions of exits, columns are generated tokens.
const told = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const numLayers = told.models[0].num_layers;
const state = { prompt: 0, model: 0, view: "grid", colour: "probability", layer: numLayers, row: 0, token: 0 };

const run = (model = state.model) => told.prompts[state.prompt].runs[model];
const rows = (model = state.model) => told.models[model].rows;
const textOf = (id) => told.token_texts[id];
const percent = (share) => (share >= 0.9995 ? "100" : (100 * share).toFixed(1)) + "\u202f%";
const isSettled = (of, row, token) => row.own_blocks === null && row.exit_layer >= of.saturation[token];
const blocksOf = (row) =>
  row.own_blocks === null
    ? `after ${row.exit_layer} of ${numLayers} layers`
    : `exit ${row.exit_layer}, after ${row.own_blocks} block${row.own_blocks === 1 ? "" : "s"} of its own`;

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// The row of a layer; where that is not shown, the nearest shown layer below it, else the first one.
function rowOf(layer, model = state.model) {
  const plain = rows(model).map((row, index) => ({ ...row, index })).filter((row) => row.own_blocks === null);
  return (plain.filter((row) => row.exit_layer <= layer).pop() ?? plain[0]).index;
}

// Strength of a cell's colour, 0 to 1.
function strength(of, row, token) {
  if (state.colour === "probability") return of.top_probs[row][token][0];
  const values = of[state.colour];
  of.most ??= {};
  of.most[state.colour] ??= Math.max(1e-9, ...values.map((each) => Math.max(...each)));
  return values[row][token] / of.most[state.colour];
}

function paint(element, of, row, token, exit) {
  const isHit = of.top_ids[row][token][0] === of.tokens[token];
  const settled = isSettled(of, exit, token);
  element.classList.toggle("settled", settled);
  element.classList.toggle("hit", isHit && !settled);
  element.style.setProperty("--v", strength(of, row, token).toFixed(3));
}
