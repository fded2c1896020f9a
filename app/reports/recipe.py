"""How the runs were made, where they differ, and their configs. Tested by tests/unit/reports/test_report.py."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from app.metric_names import DECODE_SPEEDUP, TOKENS_PER_SECOND, TRAIN_LOSS, VAL_LOSS
from app.reports.blocks import Block, Folded, Prose, Section, Sheet
from app.reports.files import named_files
from app.reports.measurements import MeasuredFile
from app.reports.run_folder import Run, when
from app.tables import Table
from app.words import counted

_UNKNOWN = "?"


def summary(runs: Sequence[Run]) -> Section:
    """What came out, in one table."""
    rows = {
        "state": [run.state for run in runs],
        "tokens trained on": [_tokens(run) for run in runs],
        "time from first to last log": [_duration(run.scalars.times) for run in runs],
        "training loss, latest": [_last(run.scalars.of(TRAIN_LOSS)) for run in runs],
        "held-out loss of the full model": [_last(run.scalars.of(VAL_LOSS)) for run in runs],
        **_exits(runs),
        "fastest decoding in validation": [_fastest(run) for run in runs],
        "training speed, median": [_median_speed(run) for run in runs],
    }
    return Section(name="summary", title="Summary", blocks=[_sheet("Runs", "figure", rows, runs)])


def recipe(runs: Sequence[Run]) -> Section:
    """The settings that matter most, those in which the runs differ, the commands, and the whole configs."""
    main = {name: [_ask(say, run) for run in runs] for name, say in _MAIN.items()}
    blocks: list[Block] = [_sheet("What matters most", "setting", main, runs)]
    if len(runs) > 1:
        settings = [run.settings() for run in runs if run.config]
        paths = sorted({path for own in settings for path in own})
        differing = [path for path in paths if len({repr(own.get(path)) for own in settings}) > 1]
        if differing:
            rows = {
                path: [_said(run.settings().get(path, "-")) if run.config else _UNKNOWN for run in runs]
                for path in differing
            }
            blocks.append(_sheet("All settings in which the runs differ", "setting", rows, runs))
        else:
            blocks.append(Prose(text="The configs of these runs differ in no setting but their names."))
    blocks += [
        Folded(title=f"Whole config of {run.name}: {run.command}", text=run.config_text)
        for run in runs
        if run.config_text
    ]
    return Section(name="recipe", title="Recipe", blocks=blocks)


def environment(runs: Sequence[Run], others: Sequence[MeasuredFile]) -> Section:
    """Where and when the runs and the measurements were made, as far as they say."""
    rows: list[tuple[str, ...]] = [
        (
            run.name,
            "training",
            " to ".join(map(when, run.scalars.times)) or _UNKNOWN,
            _device(run.scalars.settings),
            str((run.config.get("trainer") or {}).get("precision") or "32-true"),
            ", ".join([_lightning(run), *_versions(run.scalars.settings)]),
        )
        for run in runs
    ]
    for name, measured in named_files(runs, others):
        if isinstance(where := measured.content.get("environment"), Mapping):
            versions = where.get("versions") or {}
            rows.append(
                (
                    name if measured in others else f"{name}: {measured.file.name}",
                    measured.kind,
                    str(where.get("date", _UNKNOWN)).replace("T", " ").replace("+00:00", " UTC"),
                    _device(where),
                    str(where.get("dtype", _UNKNOWN)),
                    ", ".join(f"{name} {version}" for name, version in versions.items()),
                )
            )
    columns = ("of", "what", "when", "device", "precision", "versions")
    note = "Of a training, where it began; logs without the callback RunLogs do not tell it."
    return Section(
        name="environment",
        title="Environment",
        blocks=[Sheet(table=Table("Where and when", columns, rows), source=note, in_words=True)],
    )


def _sheet(title: str, what: str, rows: Mapping[str, Sequence[str]], runs: Sequence[Run]) -> Sheet:
    shown = [(name, *cells) for name, cells in rows.items() if {*cells} - {"-"}]
    marked = {idx for idx, (_, *cells) in enumerate(shown) if len({*cells}) > 1}
    several = what == "setting" and len(runs) > 1
    return Sheet(
        table=Table(title, (what, *(run.name for run in runs)), shown),
        in_words=True,
        marked_rows=frozenset(marked) if several and len(marked) < len(shown) else frozenset(),
    )


def _ask(say: Callable[[Mapping[str, Any], Run], str], run: Run) -> str:
    """What the config says; a config that somebody wrote by hand need not say it."""
    try:
        return say(run.config, run)
    except (LookupError, TypeError, ValueError, AttributeError):
        return _UNKNOWN


def _model(config: Mapping[str, Any], run: Run) -> str:
    pretrained = config["model"].get("pretrained")
    if run.checkpoint is None:
        return f"continues {pretrained}" if pretrained else "from scratch"
    model = run.checkpoint.model
    sizes = f"{model['num_hidden_layers']} blocks, width {model['hidden_size']}, {model['vocab_size']:,} token ids"
    start = f"continues {run.checkpoint.record.pretrained or pretrained}" if pretrained else "from scratch"
    return f"{model['model_type']}, {sizes}, {run.checkpoint.num_parameters:,} parameters, {start}"


def _dropout(config: Mapping[str, Any], _: Run) -> str:
    own = config["layer_dropout"]
    if not own["max_dropout_rate"]:
        return "off"
    rescaled = ", rescaled" if own.get("rescale") else ""
    return f"up to {own['max_dropout_rate']}, {own['depth_scale']} in depth, {own['time_scale']} in time{rescaled}"


def _early_exit(config: Mapping[str, Any], _: Run) -> str:
    own = config["early_exit"]
    if own["curriculum"] == "none":
        return "off"
    detail = f" (R = {own['rotation_interval']})" if own["curriculum"] == "rotational" else ""
    if own["curriculum"] == "fixed":
        detail = f" {own['exit_layers']}"
    return f"{own['curriculum']}{detail}, scale {own['early_exit_scale']}, {own['exit_weights']} weights, {own['loss']}"


def _exit_blocks(config: Mapping[str, Any], _: Run) -> str:
    own = config["model"].get("exit_blocks")
    if not own:
        return "-"
    blocks = ", ".join(f"{number} at exit {layer}" for layer, number in own["exits"].items())
    return f"{blocks}, loss {own.get('loss')}, start {own.get('start')}"


def _lora(config: Mapping[str, Any], _: Run) -> str:
    own = config["model"].get("peft")
    return "-" if not own else ", ".join(f"{name} {value}" for name, value in own.items())


def _data(config: Mapping[str, Any], _: Run) -> str:
    own = config["data"].get("init_args") or {}
    sources = own.get("sources") or {}
    weights = {name: source.get("weight") or 1.0 for name, source in sources.items()}  # null is 1.0
    shares = {name: weight / sum(weights.values()) for name, weight in weights.items()}
    mix = ", ".join(f"{shares[name]:.0%} {name} ({source.get('kind', _UNKNOWN)})" for name, source in sources.items())
    return mix or str(config["data"].get("class_path", _UNKNOWN)).rpartition(".")[2]


def _steps(config: Mapping[str, Any], _: Run) -> str:
    own, trainer = config["data"].get("init_args") or {}, config["trainer"]
    accumulate = trainer.get("accumulate_grad_batches") or 1
    parts = [f"{trainer.get('max_steps'):,} steps", f"{own['batch_size']} rows" if "batch_size" in own else ""]
    parts += [f"{own['seq_len']:,} tokens" if "seq_len" in own else ""]
    parts += [f"{accumulate} micro-batches" if accumulate > 1 else ""]
    return " x ".join(filter(None, parts))


def _optimizer(config: Mapping[str, Any], _: Run) -> str:
    own = config["model"]
    arguments = own["optimizer"].get("init_args") or {}
    said = [own["optimizer"]["class_path"].rpartition(".")[2]]
    said += [f"{name} {arguments[name]}" for name in ("lr", "weight_decay", "betas") if name in arguments]
    schedule = own["lr_scheduler"]["class_path"] if own.get("lr_scheduler") else own.get("lr_schedule")
    return ", ".join([*said, f"{schedule} schedule", f"{own.get('warmup_steps', 0)} warm-up steps"])


def _trainer(config: Mapping[str, Any], _: Run) -> str:
    own = config["trainer"]
    strategy = own["strategy"]["class_path"] if isinstance(own.get("strategy"), Mapping) else own.get("strategy")
    said = {"devices": own.get("devices"), "accelerator": own.get("accelerator"), "strategy": strategy}
    chosen = (f"{name} {setting or 'auto'}" for name, setting in said.items())
    return ", ".join([counted(int(own.get("num_nodes") or 1), "node"), *chosen])


_MAIN = {
    "model": _model,
    "layer dropout": _dropout,
    "early-exit loss": _early_exit,
    "exit blocks": _exit_blocks,
    "LoRA": _lora,
    "data": _data,
    "length": _steps,
    "optimizer": _optimizer,
    "precision": lambda config, _: str(config["trainer"].get("precision") or "32-true"),
    "devices": _trainer,
    "seed": lambda config, _: str(config.get("seed_everything", _UNKNOWN)),
}


def _said(value: object) -> str:
    return "none" if value is None else str(value)


def _last(points: Mapping[int, float]) -> str:
    return f"{[*points.values()][-1]:.4g} at step {[*points][-1]:,}" if points else "-"


def _tokens(run: Run) -> str:
    count = run.checkpoint.record.tokens if run.checkpoint is not None else None
    return "-" if count is None or run.checkpoint is None else f"{count:,} at step {run.checkpoint.record.steps:,}"


def _duration(times: Sequence[float]) -> str:
    if not times:
        return "-"
    minutes, seconds = divmod(round(times[-1] - times[0]), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def _exits(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Loss and agreement of the middle exit, and agreement of the exit at a quarter, at the latest validation."""
    rows: dict[str, list[str]] = {"loss of the middle exit": [], "agreement of the middle exit": []}
    rows["agreement at a quarter of the depth"] = []
    for run in runs:
        latest, layers = ([*run.history.values()] or [{}])[-1], run.num_layers or 0
        middle, quarter = latest.get(layers // 2), latest.get(max(1, layers // 4))
        rows["loss of the middle exit"].append("-" if middle is None else f"{middle.loss:.4g} (exit {layers // 2})")
        rows["agreement of the middle exit"].append("-" if middle is None else f"{middle.agreement:.1%}")
        rows["agreement at a quarter of the depth"].append(
            "-" if quarter is None else f"{quarter.agreement:.1%} (exit {max(1, layers // 4)})"
        )
    return rows


def _fastest(run: Run) -> str:
    speedups = run.scalars.latest_by_setting(DECODE_SPEEDUP)
    if not speedups:
        fastest = [*run.scalars.of(DECODE_SPEEDUP).values()]
        return f"{fastest[-1]:.2f}x" if fastest else "-"
    (layer, drafts), speedup = max(speedups.items(), key=lambda item: item[1])
    return f"{speedup:.2f}x (exit {layer}, {drafts} drafts)"


def _median_speed(run: Run) -> str:
    speeds = sorted(run.scalars.of(TOKENS_PER_SECOND).values())
    return f"{speeds[len(speeds) // 2]:,.0f} tokens/s" if speeds else "-"


def _device(where: Mapping[str, Any]) -> str:
    threads = where.get("threads")
    device = str(where.get("device", _UNKNOWN))
    return device if threads is None else f"{device}, {counted(int(threads), 'thread')}"


def _versions(settings: Mapping[str, Any]) -> list[str]:
    names = ("torch", "transformers", "layerskip-lightning", "python")
    return [f"{name} {settings[name]}" for name in names if name in settings]


def _lightning(run: Run) -> str:
    first = run.config_text.partition("\n")[0]
    return first.removeprefix("# ").replace("==", " ") if first.startswith("# lightning") else _UNKNOWN
