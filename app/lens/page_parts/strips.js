// How many tokens needed each number of layers, a bar a model.
function drawBars(id, needed, whose) {
  if (!$(id)) return;
  const most = Math.max(...needed.flatMap((each) => each.saturation_layers));
  $(id).replaceChildren(
    ...needed[0].saturation_layers.map((_, index) => {
      const counts = needed.map((each) => each.saturation_layers[index]);
      const column = make("span", { title: `${index + 1} layers: ${counts.join(" and ")} tokens` });
      column.append(...counts.map((count) => make("i", { style: `height:${(100 * count) / most}%` })));
      return column;
    }),
  );
  const means = needed.map((each, index) => `${told.models[index].name} ${each.mean_saturation_layer.toFixed(1)}`);
  $(id).setAttribute("aria-label", `${whose} tokens by layers needed, 1 to ${numLayers}; mean: ${means.join(", ")}`);
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
    const exit = rows(model)[row];
    [...strip.querySelector(".words").children].forEach((word, token) => {
      const isChosen = model === state.model && token === state.token;
      word.textContent = textOf(of.top_ids[row][token][0]);
      word.tabIndex = (model === state.model ? isChosen : token === 0) ? 0 : -1;
      word.setAttribute("aria-pressed", isChosen);
      word.title = `token ${token + 1}, generated: ${textOf(of.tokens[token])}`;
      paint(word, of, row, token, exit);
    });
    const settled = of.saturation.filter((layer) => layer <= exit.exit_layer).length;
    strip.querySelector("h2 span").textContent = `${settled} of ${of.tokens.length} settled`;
    strip.querySelector("progress").value = settled;
  });
}
