import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from app.decoding.settings import DecodingSettings
from app.errors import ConfigError, DataError
from app.protocols import GenerationExample
from app.spans.decoder import SpanDecoder
from callbacks.parse_validation import ParseValidation
from tests.support.decoding import decode
from tests.support.decoding_modules import DecodingModule, RandomRows, quiet_trainer, train_with_and_without

MAX_NEW_TOKENS = 4
SIZES = {"num_layers": 3, "attention_dropout": 0.2}


def _text(tokens: Sequence[int]) -> str:
    """Every answer of a model is a parse of its own."""
    return f"[IN:A {' '.join(map(str, tokens))} ]"


class _Examples(RandomRows):
    """Half of the references are what the untrained model says, so that its exact match is 50 %."""

    tokenizer = SimpleNamespace(eos_token_id=None)
    target_format = "parse"

    def __init__(self, *, num_examples: int = 6) -> None:
        super().__init__()
        self.num_examples = num_examples
        self.stages: list[str] = []
        settings = DecodingSettings(max_new_tokens=MAX_NEW_TOKENS)
        decoder = SpanDecoder(_module().model.eval())
        self.examples = []
        for row in range(num_examples):
            prompt = [(7 * row + index) % 61 for index in range(3 + row)]
            said = _text(decode(decoder, prompt, strategy="autoregressive", settings=settings).tokens)
            group = ("alarm", "timer", "weather")[row % 3]
            self.examples.append(GenerationExample(prompt, said if row % 2 else "[IN:A ]", group))

    def generation_examples(self, stage: str, count: int) -> list[GenerationExample]:
        self.stages.append(stage)
        return self.examples[:count]

    def answer(self, tokens: Sequence[int]) -> str:
        return _text(tokens)


def _module() -> DecodingModule:
    return DecodingModule(**SIZES)


def _callback(**overrides: Any) -> ParseValidation:
    settings: dict[str, Any] = {
        "exit_layers": [1, 2],
        "num_draft_tokens": [2],
        "max_new_tokens": MAX_NEW_TOKENS,
        "batch_size": 2,
    }
    return ParseValidation(**(settings | overrides))


def _trainer(tmp_path: Path, callback: ParseValidation | None, **settings: Any) -> Trainer:
    return quiet_trainer(tmp_path, callback, **({"max_epochs": 1, "val_check_interval": 2} | settings))


def _records(path: Path) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = json.loads(path.read_text())["results"]
    return results


def test_a_model_is_scored_at_every_exit_and_self_speculatively(tmp_path: Path) -> None:
    trainer, data = _trainer(tmp_path, _callback()), _Examples()
    trainer.validate(_module(), datamodule=data, verbose=False)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert logged["parse/exact_match/exit_03"] == 0.5
    assert logged["parse/exact_match/exit_01"] == 0.0  # whatever it says, it is not what the full model says
    assert logged["parse/well_formed/exit_01"] == 1.0
    by_domain = {
        group: logged[f"parse/exact_match_by_domain/{group}/exit_03"] for group in ("alarm", "timer", "weather")
    }
    assert by_domain == {"alarm": 0.5, "timer": 0.5, "weather": 0.5}
    for exit_layer in (1, 2):
        assert logged[f"parse/self_speculative/exact_match/exit_{exit_layer:02d}_drafts_02"] == 0.5
        assert logged[f"parse/self_speculative/identical_share/exit_{exit_layer:02d}_drafts_02"] == 1.0
    assert data.stages == ["validate"]


def test_test_uses_test_examples_and_keys_of_its_own(tmp_path: Path) -> None:
    data, callback = _Examples(), _callback()
    trainer = _trainer(tmp_path, callback)
    trainer.test(_module(), datamodule=data, verbose=False)
    assert data.stages == ["test"]
    assert float(trainer.callback_metrics["test/parse/exact_match/exit_03"]) == 0.5
    assert not any(name.startswith("parse/") for name in trainer.callback_metrics)
    assert [path.name for path in tmp_path.glob("*.json")] == ["parse_test.json"]
    table = callback.report()
    assert table is not None
    assert "(test)" in table.title


def test_the_file_and_the_table_say_how_many_examples_were_done(tmp_path: Path) -> None:
    callback = _callback(num_examples=5, num_speed_examples=3)
    _trainer(tmp_path, callback).validate(_module(), datamodule=_Examples(), verbose=False)
    records = _records(tmp_path / "parse_validate.json")
    assert [record["num_examples"] for record in records] == [5, 5, 5, 3, 3, 3]
    table = callback.report()
    assert table is not None
    assert [row[:4] for row in table.rows[:5]] == [
        ("full model", "3", "-", "5"),
        ("early exit", "1", "-", "5"),
        ("early exit", "2", "-", "5"),
        ("autoregressive", "3", "0", "3"),
        ("self speculative", "1", "2", "3"),
    ]


def test_the_time_limit_leaves_the_first_batch(tmp_path: Path) -> None:
    _trainer(tmp_path, _callback(time_limit_seconds=0.0)).validate(_module(), datamodule=_Examples(), verbose=False)
    records = _records(tmp_path / "parse_validate.json")
    assert [(r["strategy"], r["num_examples"]) for r in records[:1] + records[-1:]] == [
        ("autoregressive", 2),
        ("self_speculative", 1),
    ]


def test_training_is_bit_identical_with_and_without_the_callback(tmp_path: Path) -> None:
    data = _Examples()
    train_with_and_without(tmp_path, _callback(), data, **SIZES)
    assert data.stages == ["validate"] * 3  # of the second run
    assert json.loads((tmp_path / "parse_validate.json").read_text())["step"] == 6


def test_weights_from_a_checkpoint_are_named_by_it_and_their_step_is_its(tmp_path: Path) -> None:
    trainer, data = _trainer(tmp_path, None, max_steps=2), _Examples()
    trainer.fit(_module(), datamodule=data)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    _trainer(tmp_path, _callback()).test(
        _module(), datamodule=data, ckpt_path=tmp_path / "run.ckpt", weights_only=False, verbose=False
    )
    document = json.loads((tmp_path / "parse_test.json").read_text())
    assert (document["step"], document["checkpoint"]) == (2, str(tmp_path / "run.ckpt"))


def test_table_scalars_and_file_go_to_the_loggers_folder(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    _trainer(tmp_path, _callback(), logger=logger).validate(_module(), datamodule=_Examples(), verbose=False)
    written = b"".join(path.read_bytes() for path in Path(logger.log_dir).glob("events*"))
    assert b"parse/exact_match/exit_01" in written
    assert b"| full model: weather | 3 |" in written
    assert _records(Path(logger.log_dir) / "parse_validate.json")


def test_a_datamodule_without_examples_is_refused_before_anything_runs(tmp_path: Path) -> None:
    module, data = _module(), _Examples()
    with pytest.raises(ConfigError, match=r"data: got .*generation_examples"):
        _trainer(tmp_path, _callback()).fit(
            module, train_dataloaders=data.train_dataloader(), val_dataloaders=data.val_dataloader()
        )
    assert module.modes_seen == []


def test_an_unknown_way_to_write_answers_is_refused_before_anything_runs(tmp_path: Path) -> None:
    data = _Examples()
    data.target_format = "prose"
    with pytest.raises(ConfigError, match=r"target_format: got 'prose', allowed parse \| json"):
        _trainer(tmp_path, _callback()).fit(_module(), datamodule=data)
    assert data.stages == []


def test_a_stage_that_has_no_example_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no example to generate in stage test"):
        _trainer(tmp_path, _callback()).test(_module(), datamodule=_Examples(num_examples=0), verbose=False)


def test_an_exit_that_is_the_full_model_is_refused_in_setup(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"exit_layers: got \[1, 3\], allowed 1..2 for a 3-layer model"):
        _trainer(tmp_path, _callback(exit_layers=[1, 3])).test(_module(), datamodule=_Examples(), verbose=False)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("exit_layers", []),
        ("exit_layers", [0]),
        ("num_draft_tokens", [0]),
        ("num_examples", 0),
        ("num_speed_examples", 0),
        ("batch_size", 0),
        ("max_new_tokens", 1),
        ("every_n_validations", 0),
        ("time_limit_seconds", -1.0),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: got "):
        _callback(**{field: value})
