"""What every exit knows and says: scores on tasks, and layers needed. Tested by tests/unit/reports/test_report.py."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from math import log
from shlex import quote
from typing import Any

from app.exits.confident_exit import MEAN_BLOCKS, WAYS, ConfidentExit, Way, confident_exits_table
from app.exits.score_table import score_table, task_name
from app.reports.blocks import Block, Charts, Section, Sheet
from app.reports.charts import Chart, Line
from app.reports.files import missing, named_files, of_files
from app.reports.measurements import MeasuredFile
from app.reports.run_folder import Run
from app.tables import Table

Curves = Mapping[tuple[str, str], Mapping[int, float]]  # task, metric -> exit layer -> what is drawn
_STYLES: dict[Way, str] = {"exit": "run-5", "threshold": "run-0", "held_out": "run-1"}
_MOST_TOKENS, _MOST_LAYERS = 10, 9  # of the excerpt


def tasks(runs: Sequence[Run], others: Sequence[MeasuredFile]) -> Section:
    """Scores over exits: a chart for each task with all runs, and tables for each file."""
    curves: list[tuple[str, Curves]] = []
    several = Counter(name for name, measured in named_files(runs, others) if measured.kind == "evaluation")

    def shown(name: str, measured: MeasuredFile) -> list[Block]:
        curve, blocks = _curves(measured), [*_scores(name, measured), *_confident_exits(name, measured)]
        curves.append((f"{name}, {measured.file.name}" if several[name] > 1 else name, curve))
        return blocks

    blocks = of_files(runs, others, {"evaluation": shown})
    if charts := _task_charts(curves):
        blocks.insert(0, Charts(charts=charts))
    command = "layerskip evaluate --model {} --tasks '[boolq=FILE, gsm8k=FILE]' --output {}/evaluation.json".format
    blocks += missing("evaluation", runs, others, lambda run: command(quote(str(run.model)), quote(str(run.folder))))
    return Section(name="tasks", title="Evaluation on tasks", blocks=blocks)


def layers(runs: Sequence[Run], others: Sequence[MeasuredFile]) -> Section:
    """How many layers tokens need, and what the layers say of the first few tokens."""
    blocks: list[Block] = of_files(runs, others, {"lens": _lens})
    command = "layerskip lens --model {} --prompts {}/prompts.jsonl --output {}/lens.json".format
    blocks += missing("lens", runs, others, lambda run: command(quote(str(run.model)), *2 * [quote(str(run.folder))]))
    return Section(name="layers", title="Layers needed", blocks=blocks)


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text)


def _main(results: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The results of whole tasks; of texts, whose sources are told apart, those of each source."""
    return [result for result in results if not result["group"] or result["metric"] == "perplexity"]


def _scores(name: str, measured: MeasuredFile) -> list[Block]:
    content, command = measured.content, measured.command()
    counts = ", ".join(f"{task} {each['scored']}" for task, each in content["rows"].items())
    notes = " ".join(f"Note: {note}." for note in content.get("notes") or ())
    source = f"From {measured.file}. Rows scored: {counts}. {notes}"
    if not command:
        source += f" By callbacks.TaskEvaluation, checkpoint {content.get('checkpoint')}."
    table = score_table(_main(content["results"]), title=f"Every exit, {name}")
    return [Sheet(table=table, source=source, command=command)]


def _drawn(result: Mapping[str, Any]) -> float:
    """The score; of texts the loss, since perplexities of early exits leave no room for the others."""
    return log(result["score"]) if result["metric"] == "perplexity" else float(result["score"])


def _curves(measured: MeasuredFile) -> Curves:
    """The metric by which each task is judged, over exits that answer alone."""
    metrics = measured.content.get("metrics", {})
    curves: dict[str, tuple[str, dict[int, float]]] = {}
    for result in _main(measured.content["results"]):
        task = task_name(result["task"], result["group"])
        metric, points = curves.setdefault(task, (metrics.get(result["task"], result["metric"]), {}))
        if result["metric"] == metric and result["strategy"] != "self_speculative":
            points[result["exit_layer"]] = _drawn(result)
    return {(task, metric): dict(sorted(points.items())) for task, (metric, points) in curves.items()}


def _task_charts(curves: Sequence[tuple[str, Curves]]) -> list[Chart]:
    """One chart for each task and metric over exits, a line for each file."""
    return [
        Chart(
            name=_slug(f"task-{task}"),
            title=f"{task}, by exit",
            x_label="exit layer (blocks run)",
            y_label="loss (nats a token)" if metric == "perplexity" else metric,
            lines=lines,
            in_percent=metric != "perplexity",
            source="From the files below",
        )
        for task, metric in dict.fromkeys(key for _, own in curves for key in own)
        if (lines := _lines(curves, (task, metric))) and max(len(line.points) for line in lines) > 1
    ]


def _lines(curves: Sequence[tuple[str, Curves]], key: tuple[str, str]) -> list[Line]:
    return [Line(name, f"run-{idx % 6}", own[key]) for idx, (name, own) in enumerate(curves) if key in own]


def _confident_exits(name: str, measured: MeasuredFile) -> list[Block]:
    """What it gives and saves to answer at the first exit that is sure enough, where that was asked for."""
    found = [ConfidentExit(**each) for each in measured.content.get("confident_exits") or ()]
    if not found:
        return []
    table = confident_exits_table(found, title=name)
    source = f"From {measured.file}. Lossy: what leaves early is not what the full model would have chosen."
    deepest = {each.task: each for each in found if each.way == "exit"}
    charts = [
        Chart(
            name=_slug(f"confident-{measured.file}-{task}"),
            title=f"{task} at confident exits (lossy), {name}",
            x_label=MEAN_BLOCKS,
            y_label=f"right answers ({full.metric}), %",
            lines=[
                Line(WAYS[way], style, {each.mean_blocks: 100 * each.score for each in ways})
                for way, style in _STYLES.items()
                if (ways := [each for each in found if (each.task, each.way) == (task, way)])
            ],
            also_in_range=(100 * full.low, 100 * full.high),
            source=f"The axis holds the 95 % interval of exit {full.exit_layer}; from the table below",
        )
        for task, full in deepest.items()
    ]
    return [Charts(charts=charts), Sheet(table=table, source=source, command=measured.command(), is_folded=True)]


def _lens(name: str, measured: MeasuredFile) -> list[Block]:
    content, command = measured.content, measured.command()
    models = content["models"]
    source = f"From {measured.file}: greedy text of {len(content['prompts'])} prompts, {models[0]['dtype']}."
    rows: list[tuple[str, ...]] = [
        (
            str(model["name"]),
            str(model["needed"]["num_tokens"]),
            f"{model['needed']['mean_saturation_layer']:.2f} of {model['num_layers']}",
            f"{model['needed']['mean_first_hit']:.2f} of {model['num_layers']}",
        )
        for model in models
    ]
    columns = ("model", "tokens", "mean saturation layer", "mean first hit")
    chart = Chart(
        name=_slug(f"layers-{measured.file}"),
        title=f"Layers that tokens need, {name}",
        x_label="saturation layer",
        y_label="share of tokens",
        lines=[_distribution(model, idx) for idx, model in enumerate(models)],
        in_percent=True,
        source="The first layer from which on all layers choose the token that the model generated",
    )
    return [
        Sheet(table=Table(f"Mean layers needed, {name}", columns, rows), source=source, command=command),
        Charts(charts=[chart]),
        *(_excerpt(name, measured, idx) for idx in range(len(models))),
    ]


def _distribution(model: Mapping[str, Any], idx: int) -> Line:
    counts = model["needed"]["saturation_layers"]
    points = {layer: count / (sum(counts) or 1) for layer, count in enumerate(counts, start=1)}
    return Line(str(model["name"]), f"run-{idx}", points)


def _excerpt(name: str, measured: MeasuredFile, model_index: int) -> Sheet:
    """What some layers say of a model's first tokens: in blue what it generated, in orange anything else."""
    content = measured.content
    model, prompt = content["models"][model_index], content["prompts"][0]
    run, texts = prompt["runs"][model_index], content["token_texts"]
    tokens, labels = run["tokens"][:_MOST_TOKENS], [row["label"] for row in model["rows"]]
    stride = -(-len(labels) // _MOST_LAYERS)
    shown = [*range(len(labels) - 1, -1, -stride)]
    rows, shades = [], {}
    for number, layer in enumerate(shown):
        ids = [run["top_ids"][layer][column][0] for column in range(len(tokens))]
        rows.append((f"layer {labels[layer]}", *(texts[str(each)] for each in ids)))
        for column, each in enumerate(ids):
            sure = run["top_probs"][layer][column][0]
            strength = 0.25 + 0.75 * sure
            shades[number, column + 1] = strength if each == tokens[column] else -strength
    columns = ("", *(f"token {column + 1}" for column in range(len(tokens))))
    of = f"First choices of {model['name']} after the prompt {prompt['prompt']!r}"
    said = f"{of}; blue is what the model generated, orange is not."
    command = measured.command().replace(str(measured.file), str(measured.file.with_suffix(".html")))
    whose = name if len(content["models"]) == 1 else f"{name}: {model['name']}"
    table = Table(f"What the layers say of the first {len(tokens)} tokens, {whose}", columns, rows)
    return Sheet(table=table, source=f"{said} The whole, to look around in:", command=command, shades=shades)
