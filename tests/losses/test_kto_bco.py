"""KTO, APO-zero unpaired and BCO obey the laws of their formulas; statistics do not depend on how a step is split."""

import math

import pytest
import torch
from torch.testing import assert_close

from megatron_align.losses.dpo import apo_zero, bco_pair
from megatron_align.losses.kto_bco import (
    UNPAIRED_LOSSES,
    RunningMean,
    apo_zero_unpaired,
    bco,
    kto,
    kto_baseline,
)
from megatron_align.losses.responses import Responses
from tests.losses.draw import at_reference, pair, responses, shifted, taken

DESIRABLE = torch.tensor([True, False, False, True, True, False])
STATISTICS = {"kto": {"baseline": 0.4}, "apo_zero_unpaired": {}, "bco": {"delta": 0.2}}


@pytest.mark.parametrize("loss, constant", [(kto, 0.5), (apo_zero_unpaired, 0.5), (bco, math.log(2))])
def test_policy_equal_to_reference_costs_a_constant(loss, constant):
    zero = {"kto": {"baseline": 0.0}, "bco": {"delta": 0.0}}.get(loss.__name__, {})
    got = loss(at_reference(responses()), DESIRABLE, **zero)
    assert_close(got, torch.full_like(got, constant))


def test_kto_without_baseline_is_apo_zero_unpaired():
    options = {"beta": 0.3, "desirable_weight": 2.0, "undesirable_weight": 0.5}
    assert_close(
        kto(responses(), DESIRABLE, baseline=0.0, **options),
        apo_zero_unpaired(responses(), DESIRABLE, **options),
    )


def test_kto_sees_log_ratios_less_baseline():
    moved = kto(shifted(responses(), 1.3), DESIRABLE, baseline=1.7)
    assert_close(moved, kto(responses(), DESIRABLE, baseline=0.4))


def test_pairs_are_two_single_responses():
    chosen, rejected = pair()
    good, bad = torch.ones(6, dtype=torch.bool), torch.zeros(6, dtype=torch.bool)
    assert_close(
        apo_zero(chosen, rejected), apo_zero_unpaired(chosen, good) + apo_zero_unpaired(rejected, bad)
    )
    halves = bco(chosen, good, delta=0.0) + bco(rejected, bad, delta=0.0)
    assert_close(bco_pair(chosen, rejected), halves)


@pytest.mark.parametrize("loss", [kto, apo_zero_unpaired])
def test_weights_scale_their_own_kind(loss):
    statistics = STATISTICS[loss.__name__]
    plain = loss(responses(), DESIRABLE, **statistics)
    weighted = loss(responses(), DESIRABLE, desirable_weight=3.0, undesirable_weight=0.5, **statistics)
    assert_close(weighted, plain * torch.where(DESIRABLE, 3.0, 0.5))


def test_the_other_label_pushes_the_other_way():
    r = responses(requires_grad=True)
    for name, loss in UNPAIRED_LOSSES.items():
        (grad,) = torch.autograd.grad(loss(r, DESIRABLE, **STATISTICS[name]).sum(), r.policy_N)
        assert torch.equal(grad < 0, DESIRABLE)


def test_kto_baseline_is_a_mean_never_below_zero_and_without_gradient():
    r = responses(requires_grad=True)
    up, down = (shifted(r, by - r.log_ratio_N.detach().mean()) for by in (0.7, -0.7))
    assert_close(kto_baseline(up).item(), 0.7)
    assert kto_baseline(down).item() == 0
    assert not kto_baseline(up).requires_grad


def test_running_mean_weighs_every_value_the_same_however_steps_are_cut():
    values = torch.randn(20, generator=torch.Generator().manual_seed(0))
    state = RunningMean()
    for part in values.split([3, 1, 9, 7]):
        state = state.update(part)
    assert state.count == 20
    assert_close(state.mean, values.double().mean().item())
    # a checkpoint that holds the two numbers restores it
    assert RunningMean(state.mean, state.count) == state


@pytest.mark.parametrize("name", sorted(UNPAIRED_LOSSES))
def test_gradcheck_and_no_mixing(name):
    r = responses()

    def of(policy_N):
        return UNPAIRED_LOSSES[name](
            Responses(policy_N, r.length_N, r.reference_N), DESIRABLE, **STATISTICS[name]
        )

    assert torch.autograd.gradcheck(of, r.policy_N.clone().requires_grad_())
    jacobian = torch.autograd.functional.jacobian(of, r.policy_N)
    assert torch.equal(jacobian, torch.diag(jacobian.diagonal()))
    index = torch.tensor([4, 1])
    part = UNPAIRED_LOSSES[name](taken(r, index), DESIRABLE[index], **STATISTICS[name])
    assert_close(part, of(r.policy_N)[index])
