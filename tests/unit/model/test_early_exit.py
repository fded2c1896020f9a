import itertools

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from app.errors import ConfigError
from app.layerskip.early_exit_loss import early_exit_loss
from app.model.early_exit import EarlyExitModel
from tests.support.tiny_models import tiny_config, tiny_llama

L, B, T = 4, 5, 12
KEEP_ALL = [torch.arange(B)] * L
ONES = (1.0,) * L


@pytest.fixture
def batch():
    torch.manual_seed(3)
    ids = torch.randint(61, (B, T))
    return ids, torch.arange(T).expand(B, T).clone()


def swapped(**config):
    model = tiny_llama(init_scale=2.0, **config)
    return model, EarlyExitModel(model)


def reference_hidden(model, ids, positions, kept, scales, *, through=L):
    """Slow twin: every sample through every block, masked afterwards."""
    decoder = model.model
    hidden = decoder.embed_tokens(ids)
    rotary = decoder.rotary_emb(hidden, position_ids=positions)
    for idx, block in enumerate(decoder.layers[:through]):
        out = block(hidden, position_embeddings=rotary, position_ids=positions)
        mask = torch.zeros(len(ids), 1, 1)
        mask[kept[idx]] = scales[idx]
        hidden = hidden + mask * (out - hidden)
    return decoder.norm(hidden)


def test_state_dict_keys_do_not_change():
    plain, (model, _) = tiny_llama(), swapped()
    assert list(plain.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "olmo2", "smollm3", "phi3"])
def test_evaluation_is_bit_equal_to_the_plain_model(model_type, batch):
    config = CONFIG_MAPPING[model_type](**{k: v for k, v in tiny_config().to_dict().items() if k != "model_type"})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    ids, positions = batch
    plain = model(input_ids=ids, position_ids=positions, output_hidden_states=True, use_cache=False)
    early = EarlyExitModel(model)
    hidden = early.hidden_by_exit(ids, positions, range(1, L + 1))
    assert torch.equal(early.head(hidden[L]), plain.logits)
    for exit_layer in range(1, L):
        assert torch.equal(hidden[exit_layer], model.get_decoder().norm(plain.hidden_states[exit_layer]))


def test_keeping_everything_in_training_equals_the_plain_model_bit_for_bit(batch):
    ids, positions = batch
    plain = tiny_llama(init_scale=2.0)(input_ids=ids, position_ids=positions, use_cache=False).logits
    model, early = swapped()
    model.train()
    hidden = early.hidden_by_exit(ids, positions, [L], kept=KEEP_ALL, scales=ONES)
    assert torch.equal(early.head(hidden[L]), plain)


@pytest.mark.parametrize("scale", [1.0, 1.25])
def test_dropped_samples_equal_the_masked_twin_with_gradients(batch, scale):
    ids, positions = batch
    positions[:, 5:] -= 5  # two documents a row: masks and rotary tables must follow their samples
    positions[2] = torch.arange(T)  # and one row with another layout
    kept = [torch.arange(B), torch.tensor([0, 3]), torch.tensor([1]), torch.tensor([0, 2, 4])]
    scales = (1.0, scale, scale, scale)
    model, early = swapped()
    model.train()
    got = early.hidden_by_exit(ids, positions, [2, L], kept=kept, scales=scales)
    (got[2].square().mean() + got[L].square().mean()).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    twin = tiny_llama(init_scale=2.0)
    rows = []  # row by row, documents as separate sequences, so that the twin needs no mask
    for layer in (2, L):
        pieces = []
        for row in range(B):
            cut = [0, T] if row == 2 else [0, 5, T]
            row_kept = [torch.tensor([0]) if row in k else torch.tensor([], dtype=torch.long) for k in kept]
            pieces.append(
                torch.cat(
                    [
                        reference_hidden(
                            twin,
                            ids[row : row + 1, a:b],
                            positions[row : row + 1, a:b],
                            row_kept,
                            scales,
                            through=layer,
                        )
                        for a, b in itertools.pairwise(cut)
                    ],
                    dim=1,
                )
            )
        rows.append(torch.cat(pieces))
    for ours, theirs in zip((got[2], got[L]), rows, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    (rows[0].square().mean() + rows[1].square().mean()).backward()
    compared = 0
    for name, parameter in twin.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(grads[name], parameter.grad, atol=1e-5), name
            compared += 1
    assert compared > 30


def test_dropped_samples_cost_no_compute(batch):
    ids, positions = batch
    model, early = swapped()
    model.train()
    seen = []
    model.model.layers[1].mlp.register_forward_hook(lambda _m, args, _o: seen.append(args[0].shape[0]))
    kept = [torch.arange(B), torch.tensor([0, 3]), torch.arange(B), torch.arange(B)]
    early.hidden_by_exit(ids, positions, [L], kept=kept, scales=ONES)
    assert seen == [2]


def test_block_dropped_by_the_whole_batch_does_not_run_and_gets_zero_gradients(batch):
    ids, positions = batch
    model, early = swapped()
    model.train()
    ran = []
    model.model.layers[2].mlp.register_forward_hook(lambda *_: ran.append(1))
    kept = [*KEEP_ALL[:2], torch.tensor([], dtype=torch.long), KEEP_ALL[3]]
    hidden = early.hidden_by_exit(ids, positions, [L], kept=kept, scales=ONES)
    hidden[L].square().sum().backward()
    assert not ran
    for parameter in model.model.layers[2].parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))
    assert model.model.layers[1].mlp.up_proj.weight.grad.abs().sum() > 0
    assert model.model.layers[3].mlp.up_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("size", [B, 1])
def test_block_that_other_ranks_need_is_entered_without_effect(batch, size):
    ids, positions = (tensor[:size] for tensor in batch)
    kept, entered = [torch.arange(size), torch.arange(size), torch.arange(0), torch.arange(size)], []
    model, early = swapped()
    model.train()
    model.model.layers[2].mlp.register_forward_hook(lambda *_: entered.append(1))
    seen = []
    for needed in ([], [2]):
        hidden = early.hidden_by_exit(ids, positions, [L], kept=kept, scales=(1.0, 1.0, 1.25, 1.0), entered=needed)
        hidden[L].square().sum().backward()
        seen.append([hidden[L].detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        model.zero_grad()
    assert entered == [1]
    assert all(map(torch.equal, *seen))


@pytest.mark.parametrize("exit_layer", range(1, L + 1))
def test_an_exit_trains_every_block_below_it_and_none_above(exit_layer, batch):
    ids, positions = batch
    model, early = swapped()
    model.train()
    hidden = early.hidden_by_exit(ids, positions, [exit_layer])
    early.weighted_losses([hidden[exit_layer]], ids, [1.0])[0].backward()
    for idx, block in enumerate(model.model.layers):
        grad = block.mlp.up_proj.weight.grad
        reached = grad is not None and bool(grad.abs().sum() > 0)
        assert reached == (idx < exit_layer), idx
    assert model.model.norm.weight.grad.abs().sum() > 0
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0


def test_dropout_plan_has_no_effect_in_evaluation(batch):
    ids, positions = batch
    model, early = swapped()
    plain = early.hidden_by_exit(ids, positions, [L])[L]
    none = [torch.tensor([], dtype=torch.long)] * L
    assert torch.equal(early.hidden_by_exit(ids, positions, [L], kept=none, scales=ONES)[L], plain)
    model.train()
    assert not torch.equal(early.hidden_by_exit(ids, positions, [L], kept=none, scales=ONES)[L], plain)


def test_no_hidden_states_are_held_after_a_forward(batch):
    ids, positions = batch
    model, early = swapped()
    model.train()
    early.hidden_by_exit(ids, positions, [2, L], kept=[torch.tensor([0])] * L, scales=ONES)
    plan = model.model.layers[0].plan
    assert not plan.taps
    assert not plan.exit_layers


def test_gradient_checkpointing_sees_the_same_masks(batch):
    ids, positions = batch
    kept = [torch.arange(B), torch.tensor([0, 3]), torch.tensor([1]), torch.tensor([], dtype=torch.long)]
    grads = []
    for checkpointing in (False, True):
        model, early = swapped()
        if checkpointing:
            model.activation_checkpointing_enable()
        model.train()
        hidden = early.hidden_by_exit(ids, positions, [2, L], kept=kept, scales=ONES)
        (hidden[2].square().sum() + hidden[L].square().sum()).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name in grads[0]:
        assert torch.equal(grads[0][name], grads[1][name]), name


def test_head_loss_equals_cross_entropy_of_its_logits_and_ignores_masked_labels(batch):
    ids, _ = batch
    _, early = swapped()
    hidden, labels = torch.randn(2, B, T, 32), ids.expand(2, B, T).clone()
    labels[0, 1, 2] = -100
    losses = early.token_losses(hidden, labels)
    expected = F.cross_entropy(early.head(hidden).flatten(0, -2), labels.flatten(), reduction="none")
    assert torch.allclose(losses.flatten(), expected, atol=1e-5)
    assert losses[0, 1, 2] == 0


def test_head_loss_under_autocast_is_close_to_full_precision(batch):
    ids, _ = batch
    _, early = swapped()
    hidden = torch.randn(1, B, T, 32)
    full = early.token_losses(hidden, ids[None])
    with torch.autocast("cpu", torch.bfloat16):
        mixed = early.token_losses(hidden, ids[None])
    assert mixed.dtype == torch.float32
    assert torch.allclose(mixed, full, atol=0.1, rtol=0.05)
    assert not torch.equal(mixed, full)


def test_head_with_a_bias_trains_it(batch):
    ids, _ = batch
    _, early = swapped()
    early._head.bias = torch.nn.Parameter(torch.linspace(-3, 3, 61))
    hidden = torch.randn(B, T, 32)
    got = torch.autograd.grad(early.weighted_losses([hidden], ids, [0.7])[0], early._head.bias)
    twin = 0.7 * F.cross_entropy(early.head(hidden).flatten(0, 1), ids.flatten(), reduction="sum")
    assert torch.allclose(got[0], torch.autograd.grad(twin, early._head.bias)[0], atol=1e-5)


def test_wanted_positions_alone_are_returned_with_the_same_values_and_gradients(batch):
    ids, positions = batch
    wanted = torch.tensor([3, 17, 18, B * T - 1])
    grads = []
    for select in (None, wanted):
        model, early = swapped()
        hidden = early.hidden_by_exit(ids, positions, [2, L], positions=select)
        states = [h if select is not None else h.flatten(0, 1)[wanted] for h in (hidden[2], hidden[L])]
        sum(h.square().sum() for h in states).backward()
        grads.append([*states, *(p.grad for p in model.parameters() if p.grad is not None)])
    for got, expected in zip(*grads, strict=True):
        assert torch.allclose(got, expected, atol=1e-5)


def test_head_that_post_processes_logits_is_refused_by_name():
    config = CONFIG_MAPPING["gemma2"](
        vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="gemma2 with final_logit_softcapping"):
        EarlyExitModel(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("missing", ["layers", "norm"])
def test_a_decoder_without_blocks_or_norm_is_refused_by_name(missing):
    model = tiny_llama()
    delattr(model.get_decoder(), missing)
    with pytest.raises(ConfigError, match="model: got 'llama', allowed a decoder with `layers` and `norm`"):
        EarlyExitModel(model)


def test_early_exit_loss_equals_a_plain_loop_over_transformers_own_hidden_states(batch):
    ids, positions = batch
    labels = ids.roll(-1, dims=1)
    labels[:, -1] = -100
    weights = {1: 0.1, 3: 0.3, L: 0.6}
    model, early = swapped(tied=False)
    hidden = early.hidden_by_exit(ids, positions, weights)
    got = early_exit_loss(hidden, labels, weights, early.weighted_losses)
    got.weighted_sum.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    out = model.model(input_ids=ids, position_ids=positions, output_hidden_states=True, use_cache=False)
    expected = 0.0
    for exit_layer, weight in weights.items():
        state = out.last_hidden_state if exit_layer == L else model.model.norm(out.hidden_states[exit_layer])
        expected += weight * F.cross_entropy(model.lm_head(state).flatten(0, 1), labels.flatten(), reduction="sum")
    expected.backward()
    assert got.weighted_sum.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        assert torch.allclose(grads[name], parameter.grad, rtol=1e-3, atol=1e-4), name
