"use strict";
// Draws what app/lens/report.py told. Rows are predictions of exits, columns are generated tokens.
const told = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const numLayers = told.models[0].num_layers;
const state = { prompt: 0, model: 0, view: "grid", colour: "probability", layer: numLayers, row: 0, token: 0 };
const dropped = new Set(); // token ids whose line is turned off
const BAND = 20; // tokens of a printed grid
const LINE_COLOURS = 8;
let playing = null;

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

function paint(element, of, row, token, told_row) {
  const isHit = of.top_ids[row][token][0] === of.tokens[token];
  const settled = isSettled(of, told_row, token);
  element.classList.toggle("settled", settled);
  element.classList.toggle("hit", isHit && !settled);
  element.style.setProperty("--v", strength(of, row, token).toFixed(3));
}

function drawBars() {
  const counts = told.models.map((_, model) => run(model).needed.saturation_layers);
  const most = Math.max(...counts.flat());
  $("bars").replaceChildren(
    ...counts[0].map((_, index) => {
      const shares = counts.map((each) => each[index]);
      const column = make("span", { title: `${index + 1} layers: ${shares.join(" and ")} tokens` });
      for (const share of shares) column.append(make("i", { style: `height:${(100 * share) / most}%` }));
      column.classList.toggle("now", index + 1 === state.layer);
      return column;
    }),
  );
  const means = told.models.map((model, index) => `${model.name} ${run(index).needed.mean_saturation_layer.toFixed(1)}`);
  $("bars").setAttribute("aria-label", `Tokens of this prompt by layers needed, 1 to ${numLayers}; mean: ${means.join(", ")}`);
}

// The generated text as it stands at the scrubbed layer, one strip a model.
function drawStrips() {
  $("strips").replaceChildren(
    ...told.models.map((model, index) => {
      const of = run(index);
      const words = make("div", { className: "words" });
      words.setAttribute("role", "group");
      words.setAttribute("aria-label", `Text of ${model.name} at this layer`);
      of.tokens.forEach((_, token) => words.append(make("button", { type: "button", tabIndex: token ? -1 : 0 })));
      words.addEventListener("click", (event) => {
        const token = [...words.children].indexOf(event.target);
        if (token >= 0) choose(index, token);
      });
      words.addEventListener("keydown", (event) => {
        const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
        const next = step && words.children[[...words.children].indexOf(event.target) + step];
        if (!next) return;
        event.preventDefault();
        choose(index, [...words.children].indexOf(next));
        $("strips").children[index].querySelector("[aria-pressed=true]").focus();
      });
      const strip = make("section", { className: "strip" }, make("h2", {}, model.name, make("span")));
      strip.append(make("progress", { max: of.tokens.length, ariaLabel: `Tokens of ${model.name} settled` }), words);
      return strip;
    }),
  );
}

function updateStrips() {
  told.models.forEach((_, model) => {
    const [of, row, strip] = [run(model), rowOf(state.layer, model), $("strips").children[model]];
    const told_row = rows(model)[row];
    [...strip.querySelector(".words").children].forEach((word, token) => {
      const isChosen = model === state.model && token === state.token;
      word.textContent = textOf(of.top_ids[row][token][0]);
      word.tabIndex = (model === state.model ? isChosen : token === 0) ? 0 : -1;
      word.setAttribute("aria-pressed", isChosen);
      word.title = `token ${token + 1}, generated: ${textOf(of.tokens[token])}`;
      paint(word, of, row, token, told_row);
    });
    const settled = of.saturation.filter((layer) => layer <= told_row.exit_layer).length;
    strip.querySelector("h2 span").textContent = `${settled} of ${of.tokens.length} settled`;
    strip.querySelector("progress").value = settled;
  });
}

function band(first, stop) {
  const of = run();
  const table = make("table");
  table.setAttribute("role", "grid");
  table.setAttribute("aria-label", "Top prediction of every layer for every generated token");
  const head = table.createTHead().insertRow();
  head.append(make("th", { scope: "col", textContent: "layer" }));
  for (let token = first; token < stop; token += 1) {
    const text = textOf(of.tokens[token]);
    head.append(make("th", { scope: "col", textContent: text, title: `token ${token + 1}: ${text}` }));
  }
  const body = table.createTBody();
  rows().forEach((told_row, row) => {
    const line = body.insertRow();
    line.className = told_row.own_blocks === null ? "" : "own";
    line.append(make("th", { scope: "row", textContent: told_row.label, title: blocksOf(told_row) }));
    for (let token = first; token < stop; token += 1) {
      const cell = line.insertCell();
      cell.textContent = textOf(of.top_ids[row][token][0]);
      cell.tabIndex = -1;
      [cell.dataset.row, cell.dataset.token] = [row, token];
      cell.setAttribute("aria-label", described(of, row, token));
      paint(cell, of, row, token, told_row);
    }
  });
  return table;
}

function described(of, row, token) {
  const told_row = rows()[row];
  const settled = isSettled(of, told_row, token) ? ", settled" : "";
  const guess = `${textOf(of.top_ids[row][token][0])}, ${percent(of.top_probs[row][token][0])}`;
  return `token ${token + 1}, ${textOf(of.tokens[token])}, ${blocksOf(told_row)}: ${guess}${settled}`;
}

function drawGrid(size = run().tokens.length) {
  const tables = [];
  for (let first = 0; first < run().tokens.length; first += size) {
    tables.push(band(first, Math.min(first + size, run().tokens.length)));
  }
  $("grid").replaceChildren(...tables);
  markLayer();
}

const cellAt = (row, token) => $("grid").querySelector(`td[data-row="${row}"][data-token="${token}"]`);

function markLayer() {
  $("grid").querySelectorAll("tbody tr").forEach((line) => line.classList.toggle("now", line.rowIndex - 1 === rowOf(state.layer)));
  [...$("bars").children].forEach((column, index) => column.classList.toggle("now", index + 1 === state.layer));
}

function drawDetail(row, token) {
  const of = run();
  const tops = of.top_ids[row][token].map((id, rank) => {
    const probability = of.top_probs[row][token][rank];
    const line = make("li", {}, make("code", { textContent: textOf(id), title: `id ${id}` }), make("span", { textContent: percent(probability) }));
    line.style.setProperty("--v", probability);
    line.classList.toggle("final", id === of.tokens[token]);
    return line;
  });
  const facts = [
    ["entropy", of.entropy[row][token].toFixed(2)],
    ["KL to the last layer", of.kl[row][token].toFixed(2)],
    ["settled from layer", of.saturation[token]],
    ["first hit at layer", of.first_hit[token]],
  ];
  $("detail").replaceChildren(
    make("h2", { textContent: `Token ${token + 1}, ${blocksOf(rows()[row])}` }),
    make("span", { className: "token", textContent: textOf(of.tokens[token]), title: "the generated token" }),
    make("ol", {}, ...tops),
    make("dl", {}, ...facts.flatMap(([name, value]) => [make("dt", { textContent: name }), make("dd", { textContent: value })])),
  );
}

// Lines of the chosen token: how likely each layer has every token that was on top at any layer.
function drawLines() {
  const { ids, probs } = run().lines[state.token];
  const final = run().tokens[state.token];
  const [width, height, left, bottom] = [Math.max(280, $("chart").clientWidth - 12), 340, 38, 30];
  const x = (layer) => left + ((layer - 1) / Math.max(1, numLayers - 1)) * (width - left - 14);
  const y = (share) => 10 + (1 - share) * (height - bottom - 10);
  const shapes = [0, 0.25, 0.5, 0.75, 1].map(
    (share) => `<path class="rule" d="M${left} ${y(share)}H${width - 14}"/><text x="${left - 6}" y="${y(share) + 4}" text-anchor="end">${100 * share}%</text>`,
  );
  const stride = Math.ceil(numLayers / Math.max(2, width / 48));
  for (let layer = 1; layer <= numLayers; layer += stride) {
    shapes.push(`<text x="${x(layer)}" y="${height - 10}" text-anchor="middle">${layer}</text>`);
  }
  const colour = (rank) => (rank < LINE_COLOURS ? `var(--c${rank})` : "var(--soft)");
  ids.forEach((id, rank) => {
    if (dropped.has(id)) return;
    const points = rows().map((row, index) => ({ ...row, at: `${x(row.exit_layer).toFixed(1)} ${y(probs[rank][index]).toFixed(1)}` }));
    const path = points.filter((row) => row.own_blocks === null).map((row) => row.at).join("L");
    shapes.push(`<path class="${id === final ? "final" : ""}" data-id="${id}" stroke="${colour(rank)}" d="M${path}"/>`);
    for (const own of points.filter((row) => row.own_blocks !== null)) {
      const [cx, cy] = own.at.split(" ");
      shapes.push(`<circle cx="${cx}" cy="${cy}" r="3.5" fill="var(--raised)" stroke="${colour(rank)}"/>`);
    }
  });
  shapes.push(`<path class="cursor" d="M${x(state.layer)} 10V${height - bottom}"/>`);
  const name = `Probability of ${ids.map(textOf).join(", ")} over layers 1 to ${numLayers}, for token ${state.token + 1}`;
  $("chart").innerHTML = `<svg viewBox="0 0 ${width} ${height}" height="${height}" role="img">${shapes.join("")}</svg>`;
  $("chart").firstChild.setAttribute("aria-label", name);
  const row = rowOf(state.layer);
  $("chosen").replaceChildren(
    ...ids.map((id, rank) => {
      const box = make("input", { type: "checkbox", checked: !dropped.has(id), value: id });
      const label = make("label", { title: `highest at any layer: ${percent(Math.max(...probs[rank]))}` }, box, make("i"));
      label.append(make("code", { textContent: textOf(id) }), make("span", { textContent: percent(probs[rank][row]) }));
      label.classList.toggle("final", id === final);
      label.style.setProperty("--line", colour(rank));
      return label;
    }),
  );
}

// Draws everything that depends on layer and selection.
function update() {
  $("layer").value = state.layer;
  $("layer").setAttribute("aria-valuetext", `layer ${state.layer} of ${numLayers}`);
  $("layer-shown").textContent = `${state.layer} of ${numLayers}`;
  updateStrips();
  markLayer();
  drawDetail(state.row, state.token);
  if (state.view === "lines") drawLines();
}

// Draws a prompt, model, colour or view anew.
function draw() {
  state.token = Math.min(state.token, run().tokens.length - 1);
  state.row = Math.min(state.row, rows().length - 1);
  $("prompt-text").textContent = told.prompts[state.prompt].prompt;
  $("coloured").textContent = $("colour").selectedOptions[0].textContent;
  for (const id of ["grid", "colouring", "fitting", "key"]) $(id).hidden = state.view !== "grid";
  $("lines").hidden = state.view !== "lines";
  drawBars();
  drawStrips();
  drawGrid();
  cellAt(state.row, state.token).tabIndex = 0;
  update();
}

// Makes one cell the one that Tab goes to.
function select(row, token, { focus = false } = {}) {
  const before = cellAt(state.row, state.token);
  if (before) before.tabIndex = -1;
  [state.row, state.token] = [row, token];
  const cell = cellAt(row, token);
  cell.tabIndex = 0;
  if (focus) cell.focus();
  updateStrips();
  drawDetail(row, token);
}

function choose(model, token) {
  const isOther = model !== state.model;
  [state.model, state.token, state.row] = [model, token, rowOf(state.layer, model)];
  if (isOther) {
    document.querySelector(`input[name=model][value="${model}"]`).checked = true;
    draw();
  } else {
    select(state.row, token);
    cellAt(state.row, token).scrollIntoView({ block: "nearest", inline: "nearest" });
    update();
  }
}

function setLayer(layer) {
  state.layer = Math.min(Math.max(layer, 1), numLayers);
  select(rowOf(state.layer), state.token);
  update();
}

function play(on) {
  clearInterval(playing);
  playing = on ? setInterval(() => (state.layer < numLayers ? setLayer(state.layer + 1) : play(false)), 400) : null;
  $("play").setAttribute("aria-pressed", on);
  $("play-word").textContent = on ? "Pause" : "Play";
  $("play").firstElementChild.textContent = on ? "\u275a\u275a" : "\u25b6";
  if (on && state.layer === numLayers) setLayer(1);
}

const pick = (change) => (event) => {
  change(event.target.value);
  draw();
};
$("prompt")?.addEventListener("change", pick((value) => (state.prompt = +value)));
$("colour").addEventListener("change", pick((value) => (state.colour = value)));
document.querySelectorAll("input[name=model]").forEach((input) => input.addEventListener("change", pick((value) => (state.model = +value))));
document.querySelectorAll("input[name=view]").forEach((input) => input.addEventListener("change", pick((value) => (state.view = value))));
$("fit").addEventListener("change", (event) => $("grid").classList.toggle("fit", event.target.checked));
$("play").addEventListener("click", () => play(playing === null));
$("layer").addEventListener("input", (event) => {
  play(false);
  setLayer(+event.target.value);
});
$("chosen").addEventListener("change", (event) => {
  dropped[event.target.checked ? "delete" : "add"](+event.target.value);
  drawLines();
  $("chosen").querySelector(`[value="${event.target.value}"]`).focus();
});

const placeOf = (cell) => [+cell.dataset.row, +cell.dataset.token];
$("grid").addEventListener("pointerover", (event) => event.target.matches("td") && drawDetail(...placeOf(event.target)));
$("grid").addEventListener("pointerleave", () => drawDetail(state.row, state.token));
$("grid").addEventListener("focusin", (event) => {
  if (!event.target.matches("td")) return;
  select(...placeOf(event.target));
  const of = run();
  $("said").textContent = of.top_ids[state.row][state.token]
    .map((id, rank) => `${textOf(id)} ${percent(of.top_probs[state.row][state.token][rank])}`)
    .concat(`entropy ${of.entropy[state.row][state.token].toFixed(2)}`, `KL ${of.kl[state.row][state.token].toFixed(2)}`)
    .join(", ");
});
$("grid").addEventListener("keydown", (event) => {
  if (!event.target.matches("td")) return;
  const [row, token] = placeOf(event.target);
  const [lastRow, lastToken] = [rows().length - 1, run().tokens.length - 1];
  const to = {
    ArrowRight: [row, token + 1],
    ArrowLeft: [row, token - 1],
    ArrowDown: [row + 1, token],
    ArrowUp: [row - 1, token],
    Home: [event.ctrlKey ? 0 : row, 0],
    End: [event.ctrlKey ? lastRow : row, lastToken],
    PageUp: [0, token],
    PageDown: [lastRow, token],
  }[event.key];
  if (event.key === "Enter") document.querySelector("input[name=view][value=lines]").click();
  if (!to) return;
  event.preventDefault();
  select(Math.min(Math.max(to[0], 0), lastRow), Math.min(Math.max(to[1], 0), lastToken), { focus: true });
});
window.addEventListener("resize", () => state.view === "lines" && drawLines());
window.addEventListener("beforeprint", () => drawGrid(BAND));
window.addEventListener("afterprint", draw);
state.row = rowOf(numLayers);
draw();
