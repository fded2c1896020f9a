import itertools
import math

import pytest
import torch
from lightning.pytorch import Callback
from torch.nn import functional as F
from torch.optim import lr_scheduler as lr_schedulers

from app.checkpoints.run_record import GENERATION_CONFIG_KEY
from app.errors import ConfigError
from app.model.early_exit import EarlyExitModel
from app.model_files.open import build_model
from app.protocols import DecodingHost, EarlyExitHost, ExitMonitorHost, LayerDropoutHost
from app.training.module import LayerSkipModule
from app.training.optim import LR_SCHEDULES, lr_factor, parameter_groups, scheduler_of_class
from callbacks import EarlyExitCurriculum
from tests.support.runs import NUM_LAYERS, Recorder, curricula, make_data, make_module, make_trainer
from tests.support.saved_models import save_model
from tests.support.tiny_models import tiny_config


def test_module_meets_every_host_protocol():
    module = make_module()
    for protocol in (LayerDropoutHost, EarlyExitHost, ExitMonitorHost, DecodingHost):
        assert isinstance(module, protocol)


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(5)
    first = build_model(tiny_config(), seed=1).state_dict()
    torch.manual_seed(6)
    again, other = build_model(tiny_config(), seed=1).state_dict(), build_model(tiny_config(), seed=2).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_given_config_is_not_changed(tmp_path):
    config = tiny_config(num_layers=NUM_LAYERS, vocab_size=300, max_length=128)
    before = config.to_dict()
    module = make_module(config=config)
    make_trainer(tmp_path, max_steps=1, callbacks=[]).fit(module, datamodule=make_data(tmp_path))
    assert config.to_dict() == before
    assert module.config.eos_token_id is not None


class KeepBatch(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batch = {name: value.clone() for name, value in batch.items()}


class MaskLabels(Callback):
    """A prompt without labels, as in fine-tuning: nothing to learn from the first `positions` of each row."""

    def __init__(self, positions):
        self.positions = positions

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        batch["labels"][:, : self.positions] = -100


@pytest.mark.parametrize("prompt", [0, 12])
def test_baseline_gradients_equal_transformers_own_loss(tmp_path, prompt):
    """Without callbacks the module is next-token training, exactly."""
    module = make_module(optimizer=lambda params: torch.optim.SGD(params, lr=1.0))
    keep = KeepBatch()
    trainer = make_trainer(tmp_path, max_steps=1, callbacks=[MaskLabels(prompt), keep], log_every_n_steps=1)
    trainer.fit(module, datamodule=make_data(tmp_path))
    batch = keep.batch
    plain = build_model(module.config, seed=0).train()
    logits = plain(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).backward()
    for name, parameter in plain.named_parameters():
        moved = parameter.detach() - parameter.grad
        assert torch.allclose(module.model.get_parameter(name), moved, atol=1e-6), name
    norms = [
        torch.nn.utils.get_total_norm([p.grad for p in part.parameters()]) for part in (plain, *plain.model.layers)
    ]
    names = ["whole", *(f"block_{block:02d}" for block in range(1, NUM_LAYERS + 1))]
    logged = [trainer.callback_metrics[f"train/gradient_norm/{name}"].item() for name in names]
    assert logged == pytest.approx([norm.item() for norm in norms], rel=1e-4)


@pytest.mark.parametrize("exits", [{2: 0.5, 4: 0.5}, {2: 1.0}])
def test_early_exits_learn_from_the_full_model_where_the_curriculum_says_so(tmp_path, exits):
    class Distil(EarlyExitCurriculum):
        def _weights(self, trainer, step, num_layers):
            return exits

    keep, curriculum = KeepBatch(), Distil(curriculum="fixed", exit_layers=[2], loss="kl")
    module = make_module(optimizer=lambda params: torch.optim.SGD(params, lr=1.0))
    trainer = make_trainer(tmp_path, max_steps=1, callbacks=[curriculum, MaskLabels(5), keep])
    trainer.fit(module, datamodule=make_data(tmp_path))
    plain = build_model(module.config, seed=0).train()
    out = plain(
        input_ids=keep.batch["input_ids"],
        position_ids=keep.batch["position_ids"],
        use_cache=False,
        output_hidden_states=True,
    )
    counted = keep.batch["labels"] != -100
    exit_logits = plain.lm_head(plain.model.norm(out.hidden_states[2]))[counted]
    full = out.logits[counted]
    losses = {
        2: F.kl_div(exit_logits.log_softmax(-1), full.detach().softmax(-1), reduction="batchmean"),
        4: F.cross_entropy(full, keep.batch["labels"][counted]),
    }
    sum(weight * losses[layer] for layer, weight in exits.items()).backward()
    for name, parameter in plain.named_parameters():
        moved = parameter.detach() - (0 if parameter.grad is None else parameter.grad)
        assert torch.allclose(module.model.get_parameter(name), moved, atol=1e-6), name
    assert trainer.callback_metrics["train/exit_loss/exit_02"].item() == pytest.approx(losses[2].item(), abs=1e-5)


class MoveOf(Callback):
    """How far the first parameters of the run are from where they were, as one norm."""

    def on_fit_start(self, trainer, pl_module):
        self.before = [p.detach().clone() for p in pl_module.model.parameters()]

    def on_train_end(self, trainer, pl_module):
        moves = [p.detach() - old for p, old in zip(pl_module.model.parameters(), self.before, strict=True)]
        self.norm = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(move) for move in moves])))


@pytest.mark.parametrize("accumulated", [1, 2])
def test_gradients_are_clipped_to_the_norm_asked_for(tmp_path, accumulated):
    norms = {}
    for clip in (None, 0.25, 1e9):
        move = MoveOf()
        module = make_module(optimizer=lambda params: torch.optim.SGD(params, lr=1.0))
        settings = {"gradient_clip_val": clip, "accumulate_grad_batches": accumulated}
        trainer = make_trainer(tmp_path, max_steps=1, callbacks=[*curricula(), move], **settings)
        trainer.fit(module, datamodule=make_data(tmp_path))
        norms[clip] = move.norm
    assert norms[None] > 0.5  # there is something to clip
    assert norms[1e9] == pytest.approx(norms[None], rel=1e-5)
    assert norms[0.25] == pytest.approx(0.25, rel=1e-4)


def test_clipping_by_value_is_lightning_s(tmp_path):
    module = make_module(optimizer=lambda params: torch.optim.SGD(params, lr=1.0))
    move, settings = MoveOf(), {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}
    trainer = make_trainer(tmp_path, max_steps=1, callbacks=[move], **settings)
    trainer.fit(module, datamodule=make_data(tmp_path))
    for parameter, old in zip(module.model.parameters(), move.before, strict=True):
        assert (parameter - old).abs().max() <= 1e-3 + 1e-6


def test_a_fused_optimizer_is_clipped_under_bf16_mixed_too(tmp_path):
    module = make_module(optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True))
    trainer = make_trainer(tmp_path, max_steps=2, callbacks=[], precision="bf16-mixed", gradient_clip_val=0.5)
    trainer.fit(module, datamodule=make_data(tmp_path))
    assert trainer.global_step == 2


def test_a_fused_optimizer_is_refused_where_it_would_be_clipped_before_it_unscales(tmp_path):
    module = make_module(optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True))
    trainer = make_trainer(tmp_path, max_steps=1, callbacks=[], gradient_clip_val=0.5)
    trainer.precision_plugin.scaler = object()  # of precision 16-mixed, which needs a GPU
    with pytest.raises(ConfigError, match=r"fused: got True, allowed false with trainer\.gradient_clip_val"):
        trainer.fit(module, datamodule=make_data(tmp_path))


@pytest.mark.parametrize(("settings", "factor"), [({}, 1.0), ({"rescale": False}, 1.0), ({"rescale": True}, 2.0)])
def test_kept_residuals_are_scaled_where_the_curriculum_says_so(tmp_path, monkeypatch, settings, factor):
    scales, hidden_by_exit = [], EarlyExitModel.hidden_by_exit

    def spy(*args, **kwargs):
        scales.append(kwargs["scales"])
        return hidden_by_exit(*args, **kwargs)

    monkeypatch.setattr(EarlyExitModel, "hidden_by_exit", spy)
    module = make_module()
    module.set_dropout_rates([0.5] * NUM_LAYERS, **settings)
    make_trainer(tmp_path, max_steps=1, callbacks=[]).fit(module, datamodule=make_data(tmp_path))
    assert scales == [(factor,) * NUM_LAYERS]


@pytest.mark.parametrize("compile_blocks", [False, True])
def test_blocks_are_compiled_where_asked(monkeypatch, compile_blocks):
    compiled = []
    monkeypatch.setattr("app.training.module.compile_blocks", compiled.append)
    module = make_module(compile_blocks=compile_blocks)
    module.configure_model()
    assert compiled == [module.model] * compile_blocks


class LeaveAfter(Callback):
    """Ends a fit by an error behind some micro-batch."""

    def __init__(self, batch_idx):
        self.batch_idx = batch_idx

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == self.batch_idx:
            raise ZeroDivisionError


def test_a_step_that_an_earlier_fit_left_unfinished_is_forgotten(tmp_path):
    module = make_module()
    settings = {"max_steps": 2, "accumulate_grad_batches": 2}
    with pytest.raises(ZeroDivisionError):
        make_trainer(tmp_path, callbacks=[LeaveAfter(2)], **settings).fit(module, datamodule=make_data(tmp_path))
    trainer = make_trainer(tmp_path, callbacks=[], **settings | {"max_steps": 1})
    trainer.fit(module, datamodule=make_data(tmp_path))
    assert trainer.callback_metrics["train/label_tokens_per_step"] <= 2 * 4 * 24


class CountForwards(Callback):
    """How often the first block computes in a step."""

    def on_train_start(self, trainer, pl_module):
        self.calls = 0
        pl_module.model.get_decoder().layers[0].mlp.register_forward_pre_hook(self.count)

    def count(self, *_):
        self.calls += 1


def test_activation_checkpointing_computes_blocks_twice_and_trains_the_same(tmp_path):
    runs = {}
    for checkpointing in (False, True):
        recorder, forwards, module = Recorder(), CountForwards(), make_module(activation_checkpointing=checkpointing)
        trainer = make_trainer(tmp_path, max_steps=4, callbacks=[*curricula(), recorder, forwards])
        trainer.fit(module, datamodule=make_data(tmp_path))
        runs[checkpointing] = recorder.steps, forwards.calls, list(module.model.parameters())
    assert runs[True][0] == runs[False][0]
    assert (runs[False][1], runs[True][1]) == (4, 8)
    assert all(torch.equal(a, b) for a, b in zip(runs[True][2], runs[False][2], strict=True))


def test_batch_without_any_label_moves_nothing(tmp_path):
    module = make_module(optimizer=lambda params: torch.optim.SGD(params, lr=1.0))
    trainer = make_trainer(tmp_path, max_steps=1, callbacks=[*curricula(), MaskLabels(24)])
    trainer.fit(module, datamodule=make_data(tmp_path))
    for name, parameter in build_model(module.config, seed=0).named_parameters():
        assert torch.equal(module.model.get_parameter(name), parameter), name
        assert module.model.get_parameter(name).grad is None or not module.model.get_parameter(name).grad.any()
    assert trainer.callback_metrics["train/loss"] == 0


class RepeatInputs(Callback):
    """Labels as transformers' collators make them."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        batch["labels"].copy_(batch["input_ids"])

    on_validation_batch_start = on_train_batch_start


@pytest.mark.parametrize("verb", ["fit", "validate"])
def test_labels_that_are_not_shifted_are_refused_before_a_step(tmp_path, verb):
    trainer = make_trainer(tmp_path, max_steps=1, callbacks=[RepeatInputs()], limit_val_batches=1, val_check_interval=1)
    with pytest.raises(ConfigError, match=r"batch\.labels: got 'the inputs at their own positions'"):
        getattr(trainer, verb)(make_module(), datamodule=make_data(tmp_path))
    assert trainer.global_step == 0


@pytest.mark.parametrize("settings", [{"lr_schedule": "spiral"}, {"warmup_steps": -1}, {"final_lr_ratio": 1.5}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        make_module(**settings)


def one_cycle(optimizer):
    return lr_schedulers.OneCycleLR(optimizer, max_lr=1e-2, total_steps=6)


@pytest.mark.parametrize(
    ("make", "max_steps", "message"),
    [
        (one_cycle, 7, "lr_scheduler: got 'OneCycleLR of 6 steps', allowed at least 7, as trainer.max_steps"),
        (one_cycle, -1, "lr_scheduler: got 'OneCycleLR', allowed only in a run of known length"),
        (lr_schedulers.ReduceLROnPlateau, 6, "lr_scheduler: got 'ReduceLROnPlateau', allowed a class that is stepped"),
        (lambda optimizer: lr_schedulers.StepLR(optimizer, step=1), 6, "lr_scheduler: got .*unexpected keyword"),
    ],
)
def test_a_scheduler_class_that_cannot_be_stepped_to_the_end_is_refused(make, max_steps, message):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(ConfigError, match=message):
        scheduler_of_class(optimizer, make, max_steps=max_steps)


def test_settings_beside_a_scheduler_class_warn_that_they_have_no_effect(caplog):
    make_module(lr_schedule="cosine", lr_scheduler=one_cycle)
    assert not caplog.records
    make_module(lr_schedule="cosine", lr_scheduler=one_cycle, warmup_steps=2)
    assert "warmup_steps and final_lr_ratio have no effect: lr_scheduler replaces them" in caplog.text


def test_exactly_one_of_config_and_pretrained_is_needed():
    with pytest.raises(ConfigError, match="config: got 'neither'"):
        LayerSkipModule()
    with pytest.raises(ConfigError, match="config: got 'both'"):
        LayerSkipModule(config=tiny_config(), pretrained="somewhere")


def test_rows_longer_than_the_context_are_refused(tmp_path):
    module = make_module(config=tiny_config(vocab_size=300, max_length=16))
    with pytest.raises(ConfigError, match=r"seq_len: got 24, allowed 1\.\.16"):
        make_trainer(tmp_path, max_steps=1, callbacks=[]).fit(module, datamodule=make_data(tmp_path))


def test_vocabulary_smaller_than_the_tokenizer_is_refused(tmp_path):
    module = make_module(config=tiny_config(vocab_size=280))
    with pytest.raises(ConfigError, match="vocab_size: got 280, allowed >= "):
        make_trainer(tmp_path, max_steps=1, callbacks=[]).fit(module, datamodule=make_data(tmp_path))


def test_schedule_that_needs_the_length_refuses_an_unbounded_run(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=-1, callbacks=[], max_epochs=1)
    with pytest.raises(ConfigError, match="lr_schedule: got 'cosine"):
        trainer.fit(make_module(lr_schedule="cosine"), train_dataloaders=[{}], val_dataloaders=[{}])


def test_pretrained_directory_is_continued(tmp_path):
    plain = build_model(tiny_config(vocab_size=300, max_length=128), seed=9)
    plain.save_pretrained(tmp_path / "hf")
    module = LayerSkipModule(pretrained=str(tmp_path / "hf"))
    module.configure_model()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), module.model.parameters(), strict=True))
    assert module.num_layers == 4
    assert all(submodule.training for submodule in module.model.modules())  # or nothing would ever be dropped


def test_a_tokenizer_that_is_not_the_pretrained_models_own_is_refused(tmp_path):
    folder = save_model(tmp_path / "hf", vocab_size=400)
    module = make_module(config=None, pretrained=str(folder))
    settings = {"max_steps": 1, "callbacks": []}
    make_trainer(tmp_path, **settings).fit(module, datamodule=make_data(tmp_path, tokenizer=str(folder)))
    with pytest.raises(ConfigError, match=f"tokenizer: got 'one of .* tokens', allowed the tokenizer of {folder}"):
        make_trainer(tmp_path, **settings).fit(module, datamodule=make_data(tmp_path))  # it trains a new one


@pytest.mark.parametrize("is_pretrained", [False, True])
def test_how_a_model_generates_is_saved_where_there_is_one_that_said_so(tmp_path, is_pretrained):
    build_model(tiny_config(), seed=9).save_pretrained(tmp_path)
    module = LayerSkipModule(pretrained=str(tmp_path)) if is_pretrained else make_module()
    module.configure_model()
    module.trainer = trainer = make_trainer(tmp_path, max_steps=1, callbacks=[])
    checkpoint = {"loops": {"fit_loop": trainer.fit_loop.state_dict()}}
    module.on_save_checkpoint(checkpoint)
    assert (GENERATION_CONFIG_KEY in checkpoint) == is_pretrained


def test_missing_pretrained_directory_is_refused_with_its_name(tmp_path):
    with pytest.raises(ConfigError, match=r"pretrained: got .*absent"):
        LayerSkipModule(pretrained=str(tmp_path / "absent"))


def test_training_step_logs_the_loss_of_each_exit_that_is_on(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2, callbacks=curricula())
    trainer.fit(make_module(), datamodule=make_data(tmp_path))
    logged = trainer.callback_metrics
    on = [layer for layer in range(1, NUM_LAYERS + 1) if f"train/exit_loss/exit_{layer:02d}" in logged]
    assert NUM_LAYERS in on
    weights = {layer: logged[f"train/exit_weight/exit_{layer:02d}"].item() for layer in (2, 4)}
    expected = sum(weights[layer] * logged[f"train/exit_loss/exit_{layer:02d}"].item() for layer in weights)
    assert logged["train/loss"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", LR_SCHEDULES)
def test_learning_rate_warms_up_and_ends_at_its_final_ratio(kind):
    factors = [lr_factor(step, kind=kind, warmup_steps=4, total_steps=20, final_ratio=0.1) for step in range(21)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[-1] == pytest.approx(1.0 if kind == "constant" else 0.1)
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(factors[4:]))
    quarter = {"constant": 1.0, "linear": 0.775, "cosine": 0.1 + 0.9 * (0.5 + math.sqrt(0.125))}[kind]
    assert factors[8] == pytest.approx(quarter)  # of the decay, which takes 16 steps


def test_only_matrices_decay():
    matrices, vectors = parameter_groups(build_model(tiny_config(), seed=0))
    assert all(p.dim() > 1 for p in matrices["params"])
    assert all(p.dim() == 1 for p in vectors["params"])
    assert "weight_decay" not in matrices
    assert vectors["weight_decay"] == 0.0
