import json
from pathlib import Path

from app.reports.measurements import read_measurement
from app.reports.render import as_html
from app.reports.report import make_report
from tests.support.run_folders import make_run, write_benchmark, write_evaluation, write_lens


def test_what_a_file_is_shows_in_what_it_holds(tmp_path: Path) -> None:
    written = {"benchmark": write_benchmark, "evaluation": write_evaluation, "lens": write_lens}
    for kind, write in written.items():
        measured = read_measurement(write(tmp_path / "any.json", model="a model"))
        assert (measured.kind, measured.models) == (kind, ["a model"])


def test_what_tune_found_is_shown_with_its_command(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    prediction = {"exit_layer": 3, "num_draft_tokens": 4, "n_gram_match": None, "speedup": 1.5}
    run = {"prediction": prediction, "speedup": 1.25, "interval": [1.1, 1.4], "acceptance_rate": 0.5}
    changing = {"draft_policy": "dynamic", "draft_exits": [5, 2]}
    found = {
        "verified": [
            run | {"identical_to_autoregressive": 1.0},
            run | {"identical_to_autoregressive": 1.0, "prediction": prediction | changing},
        ],
        "confirmed": [],
        "exits": [{"exit_layer": 3, "agreement": 0.75}],
        "reason": "it is fastest",
        "environment": {"dtype": "float32", "threads": 2},
        "settings": {"model": "m", "prompts": "p.jsonl", "limit": 16, "n_gram_match": [2, 4], "eos_token_ids": [2]},
    }
    (folder / "tune.json").write_text(json.dumps(found))
    measured = read_measurement(folder / "tune.json")
    command = (
        "layerskip tune --model m --prompts p.jsonl --limit 16 --n_gram_match '[2, 4]' --dtype float32 --threads 2"
    )
    assert measured.command() == f"{command} --json"
    page = as_html(make_report([str(folder)]))
    cells = ("4", "-", "1.50x", "1.25x", "1.10..1.40x", "50.0%", "100%", "first run")
    assert "\n".join(f"<td>{cell}</td>" for cell in cells if cell != "-") in page.replace("<td>-</td>\n", "")
    assert ">3, 5, 2</th>\n<td>up to 4</td>" in page
    assert "Decision: it is fastest." in page
