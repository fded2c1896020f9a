import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from app.benchmark.benchmark import Costs
from app.benchmark.decoding_costs import DecodingCosts
from app.benchmark.report import (
    draft_table,
    environment,
    n_gram_table,
    notes,
    report_document,
    speed_table,
    write_report,
)
from app.benchmark.result import BenchmarkResult
from app.cli.tables import print_table
from app.tables import Table
from tests.unit.benchmark.made_up import DRAFTS, PLAIN

COSTS = DecodingCosts(block_seconds=1e-3, head=2.0, draft_head=2.0, first_extra=0.0, extra_token=0.05, overhead=0.5)


def _document(results: list[BenchmarkResult], **where: str) -> dict[str, Any]:
    settings = {"strategies": ("autoregressive",), "limit": None}
    costs = Costs(COSTS, None)
    return report_document(
        results, costs=costs, environment={"dtype": "float32"} | where, settings=settings, num_layers=6
    )


def test_the_document_holds_what_the_contract_says() -> None:
    document = json.loads(json.dumps(_document([PLAIN, DRAFTS]), allow_nan=False))
    assert document["environment"] == {"dtype": "float32"}
    assert document["settings"] == {"strategies": ["autoregressive"], "limit": None}
    assert document["costs"] == {
        "block_seconds": 1e-3, "head": 2.0, "draft_head": 2.0, "first_extra": 0.0, "extra_token": 0.05, "overhead": 0.5,
    }  # fmt: skip
    assert document["draft_model_costs"] is None
    assert document["notes"] == []
    assert {
        "strategy", "exit_layer", "num_draft_tokens", "tokens_per_second", "seconds_per_token", "acceptance_rate",
        "mean_tokens_per_round", "speedup", "identical_to_autoregressive",
    } < set(document["results"][0])  # fmt: skip
    assert [result["exit_layer"] for result in document["results"]] == [None, 2]


def test_the_environment_tells_versions_hardware_number_type_and_threads() -> None:
    where = environment(device=torch.device("cpu"), dtype="bfloat16")
    assert set(where["versions"]) == {"python", "torch", "transformers", "layerskip-lightning"}  # type: ignore[call-overload]
    assert where["versions"]["torch"] == torch.__version__  # type: ignore[index]
    assert (where["dtype"], where["device_type"], where["threads"]) == ("bfloat16", "cpu", torch.get_num_threads())
    assert where["device"] == where["cpu"]
    assert where["cpu"]


def test_differing_outputs_are_counted_and_called_ties_only_where_rounding_explains_them() -> None:
    tied = replace(DRAFTS, num_differing=2, largest_logit_gap=0.03125)
    assert notes([PLAIN, DRAFTS, tied], dtype="bfloat16", num_layers=6) == [
        "outputs of up to 2 of 4 prompts differ from autoregressive decoding; largest logit gap 0.031 where they first"
        " do: ties in bfloat16, which rounding decides"
    ]
    wrong = replace(DRAFTS, num_differing=3, num_unexplained=1, largest_logit_gap=1.5)
    for dtype in ("float32", "bfloat16"):
        said, loud = notes([PLAIN, tied, wrong], dtype=dtype, num_layers=6)
        assert said.startswith(
            "outputs of up to 3 of 4 prompts differ from autoregressive decoding; largest logit gap 1.5"
        )
        assert "ties" not in said
        assert loud == f"WARNING: up to 1 of them by more than rounding explains in {dtype}: please report it"
    assert notes([PLAIN, DRAFTS], dtype="bfloat16", num_layers=6) == []


def test_a_lossy_strategy_is_called_that_instead() -> None:
    lossy = replace(PLAIN, strategy="early_exit", exit_layer=2, identical_to_autoregressive=0.0, num_differing=4)
    assert notes([PLAIN, lossy], dtype="float32", num_layers=6) == [
        "early_exit is lossy: its output is not the full model's"
    ]


def test_early_exit_after_all_blocks_is_not_called_lossy_and_its_differences_are_counted() -> None:
    full = replace(
        PLAIN, strategy="early_exit", exit_layer=6, num_differing=1, num_unexplained=1, largest_logit_gap=1.5
    )
    assert "please report it" in notes([PLAIN, full], dtype="float32", num_layers=6)[-1]


def test_outputs_without_time_are_explained() -> None:
    assert "ignore_eos" in notes([replace(PLAIN, speedup=None)], dtype="float32", num_layers=6)[0]


def _rows(table: Table) -> list[dict[str, str]]:
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


def test_the_table_of_speeds_has_a_row_for_each_result_and_no_column_without_figures() -> None:
    table = speed_table([PLAIN, DRAFTS], title="t")
    assert _rows(table) == [
        {
            "strategy": "autoregressive", "exit": "-", "drafts": "-", "tok/s": "20.0", "prefill\nms": "100",
            "speedup\nmedians": "1.00x", "95 %\ninterval": "-", "outputs\ndiffer": "0 of 4",
        },
        {
            "strategy": "self_speculative", "exit": "2", "drafts": "3", "tok/s": "20.0", "prefill\nms": "100",
            "speedup\nmedians": "1.50x", "95 %\ninterval": "1.25..1.80x", "outputs\ndiffer": "0 of 4",
        },
    ]  # fmt: skip
    of_one_batch = replace(DRAFTS, speedup_interval=None)
    assert _rows(speed_table([of_one_batch], title="t"))[0]["whole\nrepeats"] == "1.00..1.75x"
    assert "exit" not in speed_table([PLAIN], title="t").columns
    assert "vs\ngenerate" in speed_table([replace(PLAIN, speedup_vs_transformers=2.0)], title="t").columns


@pytest.mark.parametrize("num_prompts", [4, 164])
def test_tables_with_everything_in_them_fit_120_columns_uncut(
    capsys: pytest.CaptureFixture[str], num_prompts: int
) -> None:
    full = replace(
        DRAFTS, strategy="transformers_early_exit", exit_layer=28, num_draft_tokens=12, tokens_per_second=1234.5,
        seconds_prefill=12.345, speedup=9.25, speedup_min=9.01, speedup_max=9.99, speedup_interval=(9.01, 9.99),
        speedup_vs_transformers=10.25,
        speedup_vs_transformers_early_exit=10.25, num_prompts=num_prompts, num_differing=num_prompts,
        largest_logit_gap=1.2e-05, predicted_speedup_from_rounds=10.25, prediction_error_from_rounds=-0.12,
        acceptance_by_position=[0.8] * 12,
    )  # fmt: skip
    assert len(speed_table([full], title="t").columns) == 10
    # What transformers drafts is not known.
    full = replace(full, draft_vocabulary_size=12288)
    drafts = replace(full, strategy="self_speculative", n_gram_match=3, drafted_by_n_gram=40, accepted_by_n_gram=40)
    for table in (speed_table([full, PLAIN], title="t"), speed_table([drafts], title="t"), draft_table([drafts])):
        print_table(table)
        shown = capsys.readouterr().out
        assert max(map(len, shown.splitlines())) <= 120
        assert "…" not in shown
        for part in (*(cell for cell in table.rows[0] if len(cell) < 24), *" ".join(table.columns).split()):
            assert part in shown


def test_the_table_of_drafts_has_a_row_for_each_result_that_drafted() -> None:
    unseen = replace(DRAFTS, acceptance_by_position=[0.0, None], predicted_speedup=None)
    found = replace(DRAFTS, n_gram_match=3, drafted_by_n_gram=10, accepted_by_n_gram=5)
    (row,) = _rows(n_gram_table([PLAIN, DRAFTS, replace(found, accepted=20)]))
    assert row == {
        "strategy": "self_speculative,\nn-grams of 3", "exit": "2", "drafts": "3", "of all drafts": "25%",
        "acceptance": "50.0%", "of the others": "50.0%",
    }  # fmt: skip
    first, second = _rows(draft_table([replace(DRAFTS, draft_vocabulary_size=4096), DRAFTS]))
    assert (first["strategy"], second["strategy"]) == ("self_speculative,\nof 4096 ids", "self_speculative")
    first, second = _rows(draft_table([PLAIN, DRAFTS, unseen]))
    assert first == {
        "strategy": "self_speculative", "exit": "2", "drafts": "3", "acceptance": "75.0%", "by position, %": "80 75 50",
        "tokens\na round": "1.00", "speedup": "1.50x", "predicted,\ni.i.d.": "1.65x (+10%)",
    }  # fmt: skip
    assert (second["by position, %"], second["predicted,\ni.i.d."]) == ("0 -", "-")


def test_both_files_are_written_whole_and_what_fails_leaves_the_earlier_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "report.json"
    output.write_text("earlier")
    picture = write_report(_document([PLAIN]), Figure(), output)
    assert json.loads(output.read_text())["results"][0]["strategy"] == "autoregressive"
    assert picture == tmp_path / "report.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.png"]

    before = output.read_bytes(), picture.read_bytes()
    with pytest.raises(ValueError, match="JSON compliant"):
        write_report(_document([replace(PLAIN, speedup=float("nan"))]), Figure(), output)
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_report(_document([DRAFTS]), Figure(), output)
    assert (output.read_bytes(), picture.read_bytes()) == before
    assert len(list(tmp_path.iterdir())) == 2
