"""Weights spread over two ranks by FSDP2: trained as one process would, gathered once for decoding, then as before."""

import copy
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM, Olmo2Config

from app.decoding.settings import DecodingSettings
from app.errors import DivergenceError
from app.model.parallel import unsharded
from app.spans.decoder import SpanDecoder
from callbacks import DropoutAgreementCheck
from datamodules import TextCodeDataModule
from tests.support.decoding import decode
from tests.support.distributed import Collectives, is_sharded, whole_weights
from tests.support.processes import run_ranks
from tests.support.runs import Recorder, UnequalRows, curricula, make_data, make_module, make_trainer
from tests.support.tiny_models import tiny_config

# -- training --------------------------------------------------------------------------------------------------------


def train(root, *, ranks, extra=(), data=TextCodeDataModule, **settings):
    recorder = Recorder()
    trainer = make_trainer(
        root,
        max_steps=6,
        callbacks=[
            *curricula(max_dropout_rate=0.9),
            recorder,
            *extra,
        ],  # of four samples the last block often keeps none
        devices=ranks,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1) if ranks > 1 else "auto",
        gradient_clip_val=0.5,
        limit_val_batches=1.0,
        check_val_every_n_epoch=None,
        val_check_interval=3 * (2 // ranks),
        accumulate_grad_batches=2 // ranks,  # the same global batch
    )
    # SGD, since Adam's first steps are signs: they would blow rounding up
    module = make_module(optimizer=lambda params: torch.optim.SGD(params, lr=0.3), **settings)
    trainer.fit(module, datamodule=make_data(root, num_lanes=2, kind=data))
    return {
        "sharded": sum(map(is_sharded, module.parameters())),
        "weights": whole_weights(module),
        "metrics": {name: value.item() for name, value in trainer.callback_metrics.items()},
        "dropped": [step["dropped"] for step in recorder.steps],
    }


def train_sharded(root):
    return train(root, ranks=2, data=UnequalRows, extra=[DropoutAgreementCheck()])  # has nothing to say


@pytest.mark.distributed
def test_two_ranks_with_unequal_rows_train_as_one_process_with_the_same_global_batch(tmp_path):
    make_data(tmp_path).prepare_data()
    first, second = run_ranks(train_sharded, tmp_path)
    single = train(tmp_path, ranks=1, data=UnequalRows)
    assert 0 == single["sharded"] < first["sharded"]
    for name, expected in single["weights"].items():
        assert abs(first["weights"][name] - expected).max() < 1e-6, name
        assert (first["weights"][name] == second["weights"][name]).all(), name
    for name, expected in single["metrics"].items():
        if "loss" in name:
            assert first["metrics"][name] == pytest.approx(expected, abs=1e-5), name
    pairs = [pair for both in zip(first["dropped"], second["dropped"], strict=True) for pair in zip(*both, strict=True)]
    assert (1.0, 1.0) in pairs  # a block that nobody went through
    assert any(one < two == 1.0 for one, two in pairs)


class Poison(Callback):
    """An infinite gradient in the shard of rank 1 alone."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_rank == 1 and trainer.global_step == 2:
            pl_module.model.lm_head.weight.grad.to_local()[0] = torch.inf


@pytest.mark.distributed
def test_a_gradient_that_is_not_finite_in_one_shard_ends_all_ranks(tmp_path):
    make_data(tmp_path).prepare_data()
    assert ["at step 2" in message for message in run_ranks(diverge, tmp_path)] == [True, True]


def diverge(root):
    with pytest.raises(DivergenceError) as caught:
        train(root, ranks=2, extra=[Poison()])
    return str(caught.value)


# -- gathering for decoding --------------------------------------------------------------------------------------------


def llama():
    return tiny_config(num_layers=3, tied=False)


def olmo2():  # decoding runs its modules, and with them FSDP's hooks
    return Olmo2Config(**{k: v for k, v in llama().to_dict().items() if k in SHAPE}, tie_word_embeddings=False)


SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)


def new_model(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0 if parameter.dim() > 1 else 1.0)  # so that tokens vary
    return model


def by_block(model, **settings):
    for layer in model.model.layers:
        fully_shard(layer, **settings)
    return fully_shard(model, **settings)


def with_norm_and_head_as_a_group(model, **settings):
    fully_shard([model.model.norm, model.lm_head], reshard_after_forward=False, **settings)
    return by_block(model, **settings)


class Case(NamedTuple):
    config: object
    shard: object


CASES = {
    "functions of the weights": Case(llama, by_block),
    "modules": Case(olmo2, by_block),
    "norm and head as a group": Case(llama, with_norm_and_head_as_a_group),
}


def step(model, seed):
    """One training step of this rank; its collectives."""
    tokens = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(10 * seed + dist.get_rank()))
    with Collectives() as collectives:
        model.train()(tokens, labels=tokens).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(parameter.grad, alpha=-0.1)
            parameter.grad = None
    return collectives.count


def decoded(model, *, num_tokens):
    settings = DecodingSettings(max_new_tokens=num_tokens, exit_layer=1, num_draft_tokens=3)
    prompt = [3 + dist.get_rank(), 1, 4]
    return decode(SpanDecoder(model.eval()), prompt, strategy="self_speculative", settings=settings).tokens


def start():
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    return init_device_mesh("cpu", (2,))


def decode_between_steps(case):
    mesh, (config, shard) = start(), CASES[case]
    num_tokens = (5, 23)[dist.get_rank()]
    watched, bare = shard(new_model(config()), mesh=mesh), shard(new_model(config()), mesh=mesh)
    seen = {"step": [], "inside": [], "entering": [], "plain": [], "tokens": [], "same": [], "sharded": []}
    for seed in range(2):
        with Collectives() as entering:
            gathered = unsharded(watched)
            gathered.__enter__()
        with Collectives() as inside:
            seen["tokens"].append(decoded(watched, num_tokens=num_tokens))
        seen["plain"].append(not any(map(is_sharded, watched.parameters())))
        weights = {name: parameter.detach().clone() for name, parameter in watched.named_parameters()}
        gathered.__exit__(None, None, None)
        reference = new_model(config())
        reference.load_state_dict(weights)
        seen["same"].append(seen["tokens"][-1] == decoded(reference, num_tokens=num_tokens))
        seen["sharded"].append(all(map(is_sharded, watched.parameters())))
        seen["entering"].append(entering.count)
        seen["inside"].append(inside.count)
        seen["step"].append((step(watched, seed), step(bare, seed)))
    seen["weights"] = [whole_weights(model) for model in (watched, bare)]
    return seen


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_ranks_decode_freely_and_training_goes_on_as_if_they_had_not(case):
    for rank, seen in enumerate(run_ranks(decode_between_steps, case)):
        assert [len(tokens) for tokens in seen["tokens"]] == [(5, 23)[rank]] * 2
        assert len(set(map(tuple, seen["tokens"]))) > 1  # the steps changed the model
        assert seen["same"] == seen["plain"] == seen["sharded"] == [True] * 2
        assert seen["inside"] == [0] * 2
        assert all(seen["entering"])
        assert all(ours == theirs > 0 for ours, theirs in seen["step"])
        watched, bare = seen["weights"]
        assert all((watched[name] == bare[name]).all() for name in bare)


@pytest.mark.distributed
def test_an_exception_inside_leaves_shards_that_train_on():
    for seen in run_ranks(fail_between_steps):
        assert seen["sharded"]
        assert seen["steps"][0] == seen["steps"][1]
        watched, bare = seen["weights"]
        assert all((watched[name] == bare[name]).all() for name in bare)


def fail_between_steps():
    mesh = start()
    watched, bare = by_block(new_model(olmo2()), mesh=mesh), by_block(new_model(olmo2()), mesh=mesh)
    step(watched, 0), step(bare, 0)

    def fail(*args):
        raise OSError("in the middle of a block")

    handle = watched.model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(OSError, match="in the middle"), unsharded(watched):
        decoded(watched, num_tokens=5)
    handle.remove()
    sharded = all(map(is_sharded, watched.parameters()))
    steps = [[step(model, seed) for seed in (1, 2)] for model in (watched, bare)]
    weights = [whole_weights(model) for model in (watched, bare)]
    return {"sharded": sharded, "steps": steps, "weights": weights}


@pytest.mark.distributed
def test_under_mixed_precision_the_compute_dtype_is_decoded_and_the_shards_keep_theirs():
    for tokens, expected, inside, after in run_ranks(decode_in_bf16):
        assert tokens == expected
        assert (inside, after) == ({torch.bfloat16}, {torch.float32})


def decode_in_bf16():
    mesh = start()
    model = by_block(new_model(llama()), mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with unsharded(model):
        tokens, inside = decoded(model, num_tokens=12), {parameter.dtype for parameter in model.parameters()}
    reference = new_model(llama())
    for parameter in reference.parameters():  # not the rotary frequencies
        parameter.data = parameter.data.bfloat16()
    return tokens, decoded(reference, num_tokens=12), inside, {parameter.dtype for parameter in model.parameters()}


def test_a_module_without_fsdp_is_left_alone():
    layer = torch.nn.Linear(2, 2)
    before = copy.copy(layer.__dict__), layer.weight
    with unsharded(layer):
        assert layer.weight is before[1]
    assert layer.__dict__ == before[0]
