// The grid of all predictions, and the details of one.
let printedTokens = 20; // side by side on paper

function band(first, stop) {
  const of = run();
  const table = make("table");
  table.setAttribute("role", "grid");
  table.setAttribute("aria-label", "Top prediction of every layer for every generated token");
  if (told.models.length > 1) table.createCaption().textContent = told.models[state.model].name; // for paper
  const head = table.createTHead().insertRow();
  head.append(make("th", { scope: "col", textContent: "layer" }));
  for (let token = first; token < stop; token += 1) {
    const text = textOf(of.tokens[token]);
    head.append(make("th", { scope: "col", textContent: text, title: `token ${token + 1}: ${text}` }));
  }
  const body = table.createTBody();
  rows().forEach((exit, row) => {
    const line = body.insertRow();
    line.className = exit.own_blocks === null ? "" : "own";
    line.append(make("th", { scope: "row", textContent: exit.label, title: blocksOf(exit) }));
    for (let token = first; token < stop; token += 1) {
      const cell = line.insertCell();
      cell.textContent = textOf(of.top_ids[row][token][0]);
      cell.tabIndex = -1;
      [cell.dataset.row, cell.dataset.token] = [row, token];
      cell.setAttribute("aria-label", described(of, row, token));
      paint(cell, of, row, token, exit);
    }
  });
  return table;
}

function described(of, row, token) {
  const exit = rows()[row];
  const settled = isSettled(of, exit, token) ? ", settled" : "";
  const guess = `${textOf(of.top_ids[row][token][0])}, ${percent(of.top_probs[row][token][0])}`;
  return `token ${token + 1}, ${textOf(of.tokens[token])}, ${blocksOf(exit)}: ${guess}${settled}`;
}

function drawGrid(size = run().tokens.length) {
  const tables = [];
  for (let first = 0; first < run().tokens.length; first += size) {
    tables.push(band(first, Math.min(first + size, run().tokens.length)));
  }
  for (const table of tables) table.style.setProperty("--share", (table.rows[0].cells.length - 1) / size);
  $("grid").replaceChildren(...tables);
  markLayer();
}

const cellAt = (row, token) => $("grid").querySelector(`td[data-row="${row}"][data-token="${token}"]`);

function markLayer() {
  $("grid").querySelectorAll("tbody tr").forEach((line) => line.classList.toggle("now", line.rowIndex - 1 === rowOf(state.layer)));
  document.querySelectorAll(".bars").forEach((bars) =>
    [...bars.children].forEach((column, index) => column.classList.toggle("now", index + 1 === state.layer)),
  );
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
