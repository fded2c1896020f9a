let playing = null;

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
  drawBars("bars-of-prompt", told.prompts[state.prompt].runs.map((each) => each.needed), "This prompt's");
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
  update();
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
  }
}

function setLayer(layer) {
  state.layer = Math.min(Math.max(layer, 1), numLayers);
  select(rowOf(state.layer), state.token);
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
$("chart").addEventListener("click", (event) => {
  const { left, width } = $("chart").firstChild.getBoundingClientRect();
  const share = (event.clientX - left - LEFT) / (width - LEFT - RIGHT);
  setLayer(Math.round(1 + share * (numLayers - 1)));
});
window.addEventListener("resize", () => state.view === "lines" && drawLines());
const prompt = document.querySelector("details.prompt");
let promptWasOpen = false;
window.addEventListener("beforeprint", () => {
  [promptWasOpen, prompt.open] = [prompt.open, true]; // paper cannot be unfolded
  drawGrid(printedTokens);
});
window.addEventListener("afterprint", () => {
  prompt.open = promptWasOpen;
  draw();
});
state.row = rowOf(numLayers);
drawBars("bars-of-all", told.models.map((model) => model.needed), "All");
draw();
