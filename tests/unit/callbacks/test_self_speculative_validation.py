from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from app import metric_names
from app.benchmark.decoding_comparison import DecodingComparison, compare_decoding
from app.errors import ConfigError
from callbacks.self_speculative_validation import SelfSpeculativeValidation
from tests.support.decoding_modules import DecodingModule, RandomRows, quiet_trainer, train_with_and_without
from tests.support.runs import make_module

SIZES = {"num_layers": 3, "attention_dropout": 0.2}


class _Prompts(RandomRows):
    def validation_prompts(self, count: int, length: int) -> list[list[int]]:
        return [[(7 * i + j) % 61 for j in range(length)] for i in range(count)]


def _module() -> DecodingModule:
    return DecodingModule(**SIZES)


def _callback(**overrides: object) -> SelfSpeculativeValidation:
    settings: dict[str, object] = {
        "exit_layers": [1, 2],
        "num_draft_tokens": [2],
        "num_prompts": 2,
        "prompt_length": 5,
        "max_new_tokens": 6,
    }
    return SelfSpeculativeValidation(**(settings | overrides))  # type: ignore[arg-type]


def _trainer(tmp_path: Path, callback: SelfSpeculativeValidation | None, **settings: object) -> Trainer:
    return quiet_trainer(tmp_path, callback, **({"max_epochs": 1, "val_check_interval": 2} | settings))


def test_every_setting_and_the_fastest_are_logged_and_reported(tmp_path: Path) -> None:
    callback = _callback()
    trainer = _trainer(tmp_path, callback, num_sanity_val_steps=0)
    trainer.fit(_module(), datamodule=_Prompts())
    logged = trainer.callback_metrics
    for name in (metric_names.DECODE_ACCEPTANCE_RATE, metric_names.DECODE_SPEEDUP, metric_names.DECODE_IDENTICAL_SHARE):
        of_settings = [float(logged[metric_names.decode_setting(name, exit_layer, 2)]) for exit_layer in (1, 2)]
        assert float(logged[name]) in of_settings
    assert float(logged[metric_names.DECODE_IDENTICAL_SHARE]) == 1.0
    table = callback.report()
    assert table is not None
    assert [row[:2] for row in table.rows] == [("1", "2"), ("2", "2")]
    assert table.title.endswith(", 2 prompts")  # and no ranks


def test_training_is_bit_identical_with_and_without_the_callback(tmp_path: Path) -> None:
    train_with_and_without(tmp_path, _callback(), _Prompts(), **SIZES)


def test_every_submodule_gets_its_own_mode_back(tmp_path: Path) -> None:
    module = _module().train()
    module.model.model.layers[1].eval()
    modes = {name: submodule.training for name, submodule in module.named_modules()}
    callback, trainer = _callback(), _trainer(tmp_path, None)
    trainer.datamodule = _Prompts()  # type: ignore[attr-defined]
    trainer.state.fn = "validate"  # type: ignore[assignment]
    trainer.strategy._lightning_module = module
    module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    callback.on_validation_epoch_end(trainer, module)
    assert callback.report() is not None
    assert {name: submodule.training for name, submodule in module.named_modules()} == modes
    assert all(parameter.grad is None for parameter in module.parameters())


def _spy_on_measurements(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A list that gets the end-of-sequence ids of every measurement."""
    eos_of_measurements: list[object] = []

    def spy(*args: object, **kwargs: object) -> list[DecodingComparison]:
        eos_of_measurements.append(kwargs["eos_token_ids"])
        return compare_decoding(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr("callbacks.self_speculative_validation.compare_decoding", spy)
    return eos_of_measurements


def test_only_every_nth_validation_of_a_fit_measures_and_the_sanity_check_never(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback = _callback(every_n_validations=2)
    measured = _spy_on_measurements(monkeypatch)
    _trainer(tmp_path, callback).fit(_module(), datamodule=_Prompts())  # sanity check, then validations 1, 2, 3
    assert len(measured) == 1
    assert callback.state_dict() == {"validations": 3}


def test_a_resumed_run_keeps_the_rhythm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _callback(every_n_validations=2)
    trainer = _trainer(tmp_path, first, enable_checkpointing=True)
    trainer.fit(_module(), datamodule=_Prompts())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    resumed = _callback(every_n_validations=2)
    measured = _spy_on_measurements(monkeypatch)
    _trainer(tmp_path, resumed, max_epochs=2, enable_checkpointing=True).fit(
        _module(), datamodule=_Prompts(), ckpt_path=tmp_path / "run.ckpt", weights_only=False
    )  # validations 4, 5, 6
    assert len(measured) == 2
    assert resumed.state_dict() == {"validations": 6}


def test_validate_always_measures_and_counts_nothing_and_a_test_never_measures(tmp_path: Path) -> None:
    callback = _callback(every_n_validations=100)
    trainer = _trainer(tmp_path, callback)
    trainer.test(_module(), datamodule=_Prompts(), verbose=False)
    assert callback.report() is None
    trainer.validate(_module(), datamodule=_Prompts(), verbose=False)
    assert callback.report() is not None
    assert callback.state_dict() == {"validations": 0}


def test_the_table_goes_to_tensorboard_as_text(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    _trainer(tmp_path, _callback(), logger=logger).validate(_module(), datamodule=_Prompts(), verbose=False)
    written = b"".join(path.read_bytes() for path in Path(logger.log_dir).glob("events*"))
    assert b"decode/self_speculative" in written
    assert b"| exit | drafts |" in written


def test_decoding_stops_at_every_end_that_the_exported_model_stops_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class WithTokenizer(_Prompts):
        tokenizer = SimpleNamespace(eos_token_id=17)

    seen = _spy_on_measurements(monkeypatch)
    for datamodule in (_Prompts(), WithTokenizer()):
        _trainer(tmp_path, _callback()).validate(_module(), datamodule=datamodule, verbose=False)
    trained = make_module()
    trained.configure_model()
    assert trained.model is not None
    trained.model.generation_config.eos_token_id = [2, 5]  # as of a model that is continued

    class Ended(DecodingModule):
        end_token_ids = trained.end_token_ids

    _trainer(tmp_path, _callback()).validate(Ended(), datamodule=WithTokenizer(), verbose=False)
    assert seen == [(), (17,), (2, 5, 17)]


def test_a_datamodule_without_prompts_is_refused_before_anything_runs(tmp_path: Path) -> None:
    class Plain(_Prompts):
        validation_prompts = None  # type: ignore[assignment]

    trainer = _trainer(tmp_path, _callback())
    with pytest.raises(ConfigError, match=r"data: got .*validation_prompts"):
        trainer.fit(
            _module(), train_dataloaders=_Prompts().train_dataloader(), val_dataloaders=_Prompts().val_dataloader()
        )


def test_a_datamodule_that_has_no_prompt_to_offer_is_refused(tmp_path: Path) -> None:
    class Empty(_Prompts):
        def validation_prompts(self, count: int, length: int) -> list[list[int]]:
            return []

    with pytest.raises(ConfigError, match="0 prompts"):
        _trainer(tmp_path, _callback()).validate(_module(), datamodule=Empty(), verbose=False)


def test_an_exit_that_cannot_draft_is_refused_in_setup(tmp_path: Path) -> None:
    module = _module()
    with pytest.raises(ConfigError, match=r"exit_layers: got \[1, 3\], allowed 1..2 for a 3-layer model"):
        _trainer(tmp_path, _callback(exit_layers=[1, 3])).fit(module, datamodule=_Prompts())
    assert module.modes_seen == []


@pytest.mark.parametrize("field", ["exit_layers", "num_draft_tokens"])
def test_an_empty_list_of_settings_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field}: got 0"):
        _callback(**{field: []})
