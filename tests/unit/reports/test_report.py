import json
import re
from html import unescape
from pathlib import Path

import pytest

from app.errors import ConfigError
from app.reports.render import as_html, as_markdown
from app.reports.report import make_report
from tests.support.run_folders import logged, make_run, write_benchmark, write_evaluation, write_lens


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    changes = {
        "layer_dropout__max_dropout_rate": 0.0,
        "early_exit__curriculum": "none",
        "trainer__logger": {"name": "b"},
    }
    return [str(make_run(tmp_path / "ours")), str(make_run(tmp_path / "baseline", shift=0.2, **changes))]


def _text(page: str) -> str:
    """What a reader sees of a page."""
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", page)))


def test_the_page_has_the_values_of_the_logs_and_the_settings_of_the_config(runs: list[str]) -> None:
    page = as_html(make_report(runs))
    text = _text(page)
    assert f"{logged(40)['train/loss']:.4g} at step 40 {logged(40, shift=0.2)['train/loss']:.4g} at step 40" in text
    assert "rotational (R = 3), scale 0.7, uniform weights, kl off" in text
    assert "75% code (files), 25% more (lines)" in text
    assert "1 node, devices auto, accelerator auto, strategy auto" in text
    assert "early_exit.curriculum rotational none layer_dropout.max_dropout_rate 0.5 0.0 " in text
    assert "trainer.logger" not in text.split("differ", 1)[1].split("Whole config")[0]
    assert f"ours: {logged(20)['val/loss']:.4g} at 20, {logged(40)['val/loss']:.4g} at 40." in text  # of a curve
    assert "exit 1 1.10x 1.10x exit 2 1.40x -" in text  # speedup, by drafts
    assert "num_prompts 5, max_new_tokens 7" in text
    assert f"layerskip fit --config {runs[0]}/config.yaml" in text


def test_parts_that_are_missing_are_named_with_the_command_that_makes_them(runs: list[str]) -> None:
    text = _text(as_html(make_report(runs)))
    assert "No benchmark of ours, baseline. To make it:" in text
    assert f"layerskip benchmark --model {runs[0]}/checkpoints/last.ckpt --prompts {runs[0]}/prompts.jsonl" in text
    folder = Path(runs[0])
    write_benchmark(folder / "benchmark.json", model="elsewhere")
    text = _text(as_html(make_report(runs)))
    assert "No benchmark of baseline. To make it:" in text
    assert "exit 2 1.37x 0.91x" in text
    assert (
        "layerskip benchmark --model elsewhere --prompts 'my prompts.jsonl' --ignore_eos true --exit_layers '[2]'"
        f" --dtype float32 --threads 2 --output {folder}/benchmark.json"
    ) in text
    assert "No view through the layers of ours, baseline." in text
    write_lens(folder / "lens.json", model=f"{runs[1]}/last.ckpt")  # the second run's model, beside the first run
    assert "No view through the layers" not in _text(as_html(make_report(runs)))
    assert "a processor, 2 threads" in text
    assert re.search(r"a chip, 4 threads 32-true \S+( \S+)?, torch 2\.9\.0", text)


def test_exits_with_blocks_of_their_own_are_told_and_named_to_measure(tmp_path: Path) -> None:
    run = make_run(tmp_path / "own", model__exit_blocks={"exits": {"1": 2, "3": 1}, "loss": "kl", "start": "last"})
    text = _text(as_html(make_report([str(run)])))
    assert "2 at exit 1, 1 at exit 3, loss kl, start last" in text
    assert "--strategies '[self_speculative]' --exit_layers '[1, 3]'" in text


def test_files_go_to_the_run_whose_model_they_measured(runs: list[str], tmp_path: Path) -> None:
    file = write_benchmark(tmp_path / "b.json", model=f"{runs[1]}/checkpoints/best.ckpt")
    assert "No benchmark of ours. To make it" in _text(as_html(make_report(runs, [str(file)])))
    write_benchmark(file, model="elsewhere")
    text = _text(as_html(make_report(runs, [str(file)])))
    assert f"Speed of every strategy, {file}" in text
    assert f"{file} benchmark" in text  # of the environment


def test_scores_on_tasks_and_layers_needed_are_shown_with_their_commands(runs: list[str], tmp_path: Path) -> None:
    folder = Path(runs[0])
    write_evaluation(folder / "evaluation.json", model="m")
    write_lens(folder / "lens.json", model=f"{runs[0]}/last.ckpt")
    text = _text(as_html(make_report(runs)))
    assert "exit 2 25.0 (15..35) - exit 4 50.0 (40..60) 12.50 guessing 50.0 - From" in text
    assert "Rows scored: boolq 8, wiki 3. Note: wiki: 1 row skipped." in text
    assert (
        "layerskip evaluate --model m --tasks '[boolq=my rows.jsonl, wiki]' --limit 8 --dtype float32 --threads 2"
        f" --output {folder}/evaluation.json"
    ) in text
    assert "ours: answers at the first exit that is sure enough (lossy)" in text
    assert "boolq (acc, n = 8) surer than 0.9 37.5 (28..48) 75.0 3.2 1.5" in text
    assert "blocks a question runs through (mean). every question at one exit: 25 at 2, 50 at 4." in text
    assert "at the first exit surer than a threshold: 37.5 at 3.25, 37.5 at 3.25." in text
    assert "m 2 1.50 of 2 1.25 of 2" in text
    assert "layer 2 five six layer 1 five seven" in text
    assert "First choices of m after the prompt 'say it'; blue is" in text
    assert f"layerskip lens --model {runs[0]}/last.ckpt --prompt 'say it' --max_new_tokens 2 --dtype float32" in text
    assert "No evaluation on tasks of baseline. To make it" in text


def test_both_models_of_a_comparison_are_shown_by_name(runs: list[str]) -> None:
    file = write_lens(Path(runs[0], "lens.json"), model=f"{runs[0]}/last.ckpt")
    document = json.loads(file.read_text())
    document["models"].insert(0, document["models"][0] | {"name": "before"})
    run = document["prompts"][0]["runs"][0]
    document["prompts"][0]["runs"].insert(0, run | {"tokens": [7, 7]})
    file.write_text(json.dumps(document))
    text = _text(as_html(make_report(runs)))
    for name in ("before", "m"):
        assert f"What the layers say of the first 2 tokens, ours: {name}" in text
        assert f"First choices of {name} after the prompt 'say it'" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "cut off or no JSON"), ("[1]", "not a file that layerskip"), (None, "cannot be read")],
)
def test_a_file_that_is_not_ours_is_refused_if_it_was_named_and_told_if_not(
    content: str | None, message: str, runs: list[str], tmp_path: Path
) -> None:
    file = Path(runs[0], "x.json")
    if content is not None:
        file.write_text(content)
        assert f"ours: {file}: " in (note := make_report(runs).notes[0])
        assert message in note
    with pytest.raises(ConfigError, match=f"files: got .*x.json.*{message}"):
        make_report(runs, [str(file)])


def test_lines_of_several_evaluations_of_a_run_are_told_apart(runs: list[str]) -> None:
    for name in ("a.json", "b.json"):
        write_evaluation(Path(runs[0], name), model="m")
    assert "acc over exit layer (blocks run). ours, a.json: 25.0% at 2, 50.0% at 4. ours, b.json:" in _text(
        as_html(make_report(runs))
    )


def test_a_task_is_drawn_by_the_metric_by_which_it_is_judged(runs: list[str]) -> None:
    file = write_evaluation(Path(runs[0], "evaluation.json"), model="m")
    document = json.loads(file.read_text())
    longer = [result | {"metric": "acc_norm", "score": 0.75} for result in document["results"][:-1]]
    document |= {"metrics": {"boolq": "acc_norm", "wiki": "perplexity"}, "results": document["results"] + longer}
    file.write_text(json.dumps(document))
    text = _text(as_html(make_report(runs)))
    assert "acc_norm over exit layer (blocks run). ours: 75.0% at 2, 75.0% at 4" in text
    assert "acc over exit layer" not in text


@pytest.mark.parametrize("lacking", ["score", "metric", "strategy"])
def test_scores_that_another_version_wrote_otherwise_are_told(runs: list[str], lacking: str) -> None:
    file = write_evaluation(Path(runs[0], "evaluation.json"), model="m")
    document = json.loads(file.read_text())
    del document["results"][0][lacking]
    file.write_text(json.dumps(document))
    assert "evaluation.json: its figures are not as this version writes them (KeyError" in as_html(make_report(runs))


def test_figures_that_another_version_wrote_otherwise_are_told(runs: list[str]) -> None:
    file = write_benchmark(Path(runs[0], "benchmark.json"), model="m")
    document = json.loads(file.read_text())
    del document["results"][1]["speedup"]
    file.write_text(json.dumps(document))
    assert "benchmark.json: its figures are not as this version writes them (TypeError" in as_html(make_report(runs))


def test_nothing_that_a_user_wrote_becomes_markup(tmp_path: Path) -> None:
    hostile = "</pre><script>alert(1)</script>"
    folder = make_run(tmp_path / "a|b<i>", data__init_args__sources={hostile: {"kind": "files", "weight": 1}})
    report = make_report([str(folder)])
    page = as_html(report)
    assert "<script" not in page
    assert "<i>" not in page
    text, *_ = as_markdown(report, stem="r").values()
    assert "| figure | a\\|b&lt;i&gt; |" in text
    assert [line for line in text.splitlines() if "<script" in line and not line.startswith("    ")] == []


def test_markdown_names_its_pictures_and_has_them(runs: list[str]) -> None:
    (name, text), *pictures = as_markdown(make_report(runs), stem="r").items()
    assert name == "r.md"
    assert sorted(re.findall(r"\]\((\S+\.svg)\)", text)) == sorted(name for name, _ in pictures)
    assert all(picture.lstrip().startswith("<svg") and "<style>" in picture for _, picture in pictures)
    assert f"    layerskip fit --config {runs[0]}/config.yaml\n" in text
    assert "| exit 1 | 1.10x | 1.10x |" in text
