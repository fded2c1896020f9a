const LINE_COLOURS = 8;
const [LEFT, RIGHT, BOTTOM] = [38, 14, 42]; // margins of the chart
const dropped = new Set(); // token ids whose line is turned off

// Lines of the chosen token: how likely each layer has every token that was on top at any layer.
function drawLines() {
  const { ids, probs } = run().lines[state.token];
  const final = run().tokens[state.token];
  const [width, height] = [Math.max(280, $("chart").clientWidth - 12), 340];
  const x = (layer) => LEFT + ((layer - 1) / Math.max(1, numLayers - 1)) * (width - LEFT - RIGHT);
  const most = Math.max(...probs.flat());
  const top = [0.05, 0.1, 0.25, 0.5].find((each) => each >= most) ?? 1;
  const y = (share) => 10 + (1 - share / top) * (height - BOTTOM - 10);
  const shapes = [0, 0.2, 0.4, 0.6, 0.8, 1].map((part) => part * top).map(
    (share) => `<path class="rule" d="M${LEFT} ${y(share)}H${width - RIGHT}"/><text x="${LEFT - 6}" y="${y(share) + 4}" text-anchor="end">${+(100 * share).toFixed(1)}%</text>`,
  );
  const stride = Math.ceil(numLayers / Math.max(2, width / 48));
  for (let layer = 1; layer <= numLayers; layer += stride) {
    shapes.push(`<text x="${x(layer)}" y="${height - 24}" text-anchor="middle">${layer}</text>`);
  }
  shapes.push(`<text x="${(LEFT + width) / 2}" y="${height - 6}" text-anchor="middle">layer</text>`);
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
  shapes.push(`<path class="cursor" d="M${x(state.layer)} 10V${height - BOTTOM}"/>`);
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
