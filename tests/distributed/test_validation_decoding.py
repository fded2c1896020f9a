"""Ranks decode different prompts in validation, agree on one result, and train as if nothing had happened."""

import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

import callbacks.self_speculative_validation as callback_module
from app.benchmark.decoding_comparison import compare_decoding
from callbacks import SelfSpeculativeValidation
from tests.support.distributed import Collectives, is_sharded, whole_weights
from tests.support.processes import run_ranks
from tests.support.runs import Recorder, curricula, make_data, make_module, make_trainer
from tests.support.tiny_models import tiny_config

STRATEGIES = {
    "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
    "fsdp2": lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
}
SETTINGS = {"exit_layers": [1, 3], "num_draft_tokens": [2], "max_new_tokens": 8}
COUNTS = ("num_prompts", "drafted", "accepted", "num_decoded", "rounds", "baseline_decoded", "identical")


def new_module():
    return make_module(config=tiny_config(num_layers=4, vocab_size=300, max_length=128, tied=False))


def new_data(root):
    return make_data(root, validation_share=0.4)


def new_callback(num_prompts=3):
    return SelfSpeculativeValidation(num_prompts=num_prompts, prompt_length=6, time_limit_seconds=60.0, **SETTINGS)


def fit(root, strategy, *callbacks):
    """Eight micro-batches, two a step; validation after every third, so also within a step."""
    torch.manual_seed(0)
    module, recorder = new_module(), Recorder()
    trainer = make_trainer(
        root,
        max_steps=4,
        devices=2,
        strategy=STRATEGIES[strategy](),
        callbacks=[*curricula(), recorder, *callbacks],
        accumulate_grad_batches=2,
        val_check_interval=3,
        check_val_every_n_epoch=None,
        limit_val_batches=1.0,
    )
    trainer.fit(module, datamodule=new_data(root))
    return trainer, module, recorder.steps, torch.get_rng_state().numpy()


def counts(comparisons):
    return [[getattr(comparison, name) for name in COUNTS] for comparison in comparisons]


def run_with_and_without(root, strategy):
    """On each rank: a run that decodes, `validate` with one prompt and in too little time, the run without decoding."""
    own, communicated = [], []

    def spy(decoder, prompts, **settings):
        with Collectives() as collectives:
            comparisons = compare_decoding(decoder, prompts, **settings)
        communicated.append(collectives.count)
        own.append((prompts, counts(comparisons)))
        return comparisons

    callback_module.compare_decoding = spy  # in this process alone
    callback = new_callback()
    trainer, module, steps, generator = fit(root, strategy, callback)
    result = {
        "sharded": list(map(is_sharded, module.parameters())),
        "weights": whole_weights(module),
        "steps": steps,
        "generator": generator,
        "own": list(own),
        "pooled": counts(callback._latest),
        "title": callback.report().title,
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items() if "decode/" in name},
    }
    callback.num_prompts = 1
    trainer.validate(module, datamodule=trainer.datamodule, verbose=False)
    result["single"] = own[len(result["own"]) :], counts(callback._latest), callback.report().title
    callback.num_prompts, callback.time_limit_seconds = 4, (60.0, 0.0)[trainer.global_rank]
    trainer.validate(module, datamodule=trainer.datamodule, verbose=False)
    result["hurried"] = len(own[-1][0]), counts(callback._latest)
    _, bare, steps, generator = fit(root, strategy)
    result["bare"] = whole_weights(bare), steps, generator
    result["communicated"] = communicated
    return result


# Under DDP nothing is gathered to decode, and an error on one rank ends all there by default, too.
@pytest.fixture(scope="module", params=[pytest.param("ddp", marks=pytest.mark.slow), "fsdp2"])
def ranks(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    new_data(root).prepare_data()
    return [*run_ranks(run_with_and_without, root, request.param), request.param, root]


@pytest.mark.distributed
def test_ranks_decode_different_prompts_and_agree_on_the_sum(ranks):
    first, second, _, root = ranks
    data = new_data(root)
    data.prepare_data()
    data.setup("validate")
    prompts = data.validation_prompts(3, 6)
    assert len(first["own"]) == len(second["own"]) == 2
    assert [first["own"][-1][0], second["own"][-1][0]] == [prompts[0::2], prompts[1::2]]
    both = np.array([first["own"][-1][1], second["own"][-1][1]])
    assert first["pooled"] == second["pooled"] == both.sum(axis=0).tolist()
    assert first["pooled"] not in both.tolist()
    assert first["metrics"] == second["metrics"]
    assert len(first["metrics"]) == 18  # six figures of two settings and of the faster one
    assert first["title"].endswith("3 prompts on 2 ranks")


@pytest.mark.distributed
def test_what_ranks_decode_is_what_one_process_decodes_with_their_weights(ranks):
    first, _, _, root = ranks
    module, data = new_module(), new_data(root)
    module.configure_model()
    data.prepare_data()
    data.setup("validate")

    def decoded():
        return counts(
            compare_decoding(
                module.eval().exitable_decoder(),
                data.validation_prompts(3, 6),
                eos_token_ids=[data.tokenizer.eos_token_id],
                time_limit_seconds=60.0,
                **SETTINGS,
            )
        )

    untrained = decoded()
    module.load_state_dict({name: torch.from_numpy(weights) for name, weights in first["weights"].items()})
    assert decoded() == first["pooled"]
    assert untrained != first["pooled"]


@pytest.mark.distributed
def test_a_rank_without_prompts_waits_for_the_others(ranks):
    first, second, *_ = ranks
    (of_first,), pooled, title = first["single"]
    assert second["single"] == ([], pooled, title)
    assert of_first[1] == pooled
    assert title.endswith("1 prompt on 2 ranks")


@pytest.mark.distributed
def test_a_rank_stops_at_the_time_limit_by_itself(ranks):
    first, second, *_ = ranks
    assert first["hurried"] == second["hurried"]
    given, pooled = first["hurried"]
    assert given == 2  # to each
    assert [of_setting[COUNTS.index("num_prompts")] for of_setting in pooled] == [2 + 1, 2 + 1]


@pytest.mark.distributed
def test_training_on_ranks_is_bit_identical_with_and_without_decoding(ranks):
    for of_rank in ranks[:2]:
        weights, steps, generator = of_rank["bare"]
        assert of_rank["steps"] == steps
        assert len(steps) == 8
        assert all((of_rank["weights"][name] == weights[name]).all() for name in weights)
        assert (of_rank["generator"] == generator).all()
    assert ranks[0]["steps"] != ranks[1]["steps"]


@pytest.mark.distributed
def test_nothing_is_communicated_while_ranks_decode(ranks):
    first, second, strategy, _ = ranks
    assert set(first["communicated"] + second["communicated"]) == {0}
    assert set(first["sharded"]) == {strategy == "fsdp2"}  # after it


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_error_on_one_rank_ends_all(tmp_path, strategy):
    new_data(tmp_path).prepare_data()
    first, second = run_ranks(fail_on_rank_one, tmp_path, strategy)
    assert first == "RuntimeError: decoding in validation failed on other ranks: {1: 'OSError: disk gone'}"
    assert second == "OSError: disk gone"


def fail_on_rank_one(root, strategy):
    def decode_or_fail(decoder, prompts, **settings):
        if torch.distributed.get_rank() == 1:
            raise OSError("disk gone")
        return compare_decoding(decoder, prompts, **settings)

    callback_module.compare_decoding = decode_or_fail
    try:
        fit(root, strategy, new_callback())
    except (OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
