"""The sampling rule on the device, proven by enumerating everything that can happen to a row."""

import itertools

import pytest
import torch
from torch import Tensor

from app.decoding import static_rules
from app.decoding.sampling import SamplingSettings
from app.decoding.static_rules import StaticSamplingRule, uniforms

_VOCAB, _DRAFTS = 4, 2
_GENERATOR = torch.Generator().manual_seed(5)
_TARGET_SV = torch.rand(_DRAFTS + 1, _VOCAB, generator=_GENERATOR).log()
_DRAFT_TV = torch.rand(_DRAFTS, _VOCAB, generator=_GENERATOR).log()


@pytest.mark.parametrize("ids", [None, (0, 2, 3)])
@pytest.mark.parametrize("drafted", [0, 1, 2])
def test_rows_that_drafted_less_settle_tokens_of_the_targets_distribution(
    drafted: int, ids: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row of one batch is one case: what was drafted, and the side of its threshold that each uniform falls on."""
    chosen = range(_VOCAB) if ids is None else ids
    target_SV, draft_TV = _TARGET_SV.softmax(-1), torch.zeros(_DRAFTS, _VOCAB)
    draft_TV[:, list(chosen)] = _DRAFT_TV[:, list(chosen)].softmax(-1)
    cases = [*itertools.product(itertools.product(chosen, repeat=_DRAFTS), itertools.product((0, 1), repeat=_DRAFTS))]
    drafts_BT = torch.tensor([tokens for tokens, _ in cases])
    steps_T = torch.arange(_DRAFTS)
    threshold_BT = (target_SV[steps_T, drafts_BT] / draft_TV[steps_T, drafts_BT]).clamp(max=1.0)
    below_BT = torch.tensor([sides for _, sides in cases]) == 1
    uniforms_BT = torch.where(below_BT, threshold_BT / 2, (1 + threshold_BT) / 2)
    weight_BT = draft_TV[steps_T, drafts_BT] * torch.where(below_BT, threshold_BT, 1 - threshold_BT)
    drawn_from: list[Tensor] = []

    def draw(self: StaticSamplingRule, probs_BV: Tensor, positions_B: Tensor, purpose: int) -> Tensor:
        if purpose == static_rules._NEXT:
            drawn_from.append(probs_BV)
        return torch.zeros(len(probs_BV), dtype=torch.long)

    monkeypatch.setattr(StaticSamplingRule, "_draw", draw)
    monkeypatch.setattr(static_rules, "uniforms", lambda *_: uniforms_BT)
    batch, ids_V = len(cases), None if ids is None else torch.tensor(ids)
    rule = StaticSamplingRule(SamplingSettings(temperature=1.0), ids_V, torch.zeros(batch, dtype=torch.long), _VOCAB)
    for step in range(_DRAFTS):
        rule.draft(_DRAFT_TV[step, list(chosen)].expand(batch, -1), torch.zeros(batch))
    drafted_B = torch.full((batch,), drafted)
    kept_B, _, finite_B = rule.verify(_TARGET_SV.expand(batch, -1, -1), drafts_BT, drafted_B, torch.zeros(batch))
    assert finite_B.all()
    assert kept_B.max() == drafted
    # The first settled token, whatever came of it: a kept draft, or what is drawn after none was kept.
    weight_B = weight_BT.prod(-1)
    first_V = torch.zeros(_VOCAB)
    kept_one = kept_B >= 1
    first_V.index_add_(0, drafts_BT[kept_one, 0], weight_B[kept_one])
    first_V += (weight_B[:, None] * drawn_from[0])[~kept_one].sum(0)
    torch.testing.assert_close(first_V, target_SV[0])
    if drafted == _DRAFTS:  # the token after all drafts is the target's, too
        torch.testing.assert_close(drawn_from[0][kept_B == _DRAFTS], target_SV[_DRAFTS].expand(sum(kept_B == 2), -1))


def test_noise_is_uniform_and_depends_on_seed_position_purpose_and_index_alone() -> None:
    seeds = torch.randint(2**62, (8, 1), generator=torch.Generator().manual_seed(1))
    index, positions = torch.arange(4096), torch.arange(8)[:, None]
    noise = uniforms(seeds, positions, 1, index)
    assert noise.min() > 0
    assert noise.max() < 1
    assert torch.equal(noise[3:4], uniforms(seeds[3:4], positions[3:4], 1, index))
    others = [uniforms(seeds + 1, positions, 1, index), uniforms(seeds + 2**40, positions, 1, index)]
    others += [uniforms(seeds, positions + 1, 1, index), uniforms(seeds, positions, 0, index)]
    for other in others:  # of 32768 pairs of independent uniforms, these means are off by 0.0016 and 0.0011 at a time
        assert abs((noise - 0.5).mul(other - 0.5).mean() * 12) < 0.03
        assert abs(other.mean() - 0.5) < 0.01
    counts = torch.histc(noise, bins=64, min=0, max=1)
    assert ((counts - 512) ** 2 / 512).sum() < 63 + 4 * (2 * 63) ** 0.5
