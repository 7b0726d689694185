"""Losses of the DPO family obey the laws of their formulas; no golden numbers.

At the reference each costs its formula's constant; losses of the margin see nothing else; options at their neutral
values are neutral; only the batch-coupled losses mix pairs; gradients are right and finite far out.
"""

import math
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from megatron_align.errors import InputError
from megatron_align.losses.divergences import DIVERGENCES, alpha_divergence, forward_kl, reverse_kl
from megatron_align.losses.dpo import (
    DPO_LOSSES,
    aot,
    discopop,
    exo_pair,
    hinge,
    ipo,
    reward_aware,
    robust,
    sigmoid,
    sigmoid_norm,
)
from megatron_align.losses.dpo import margin as margin_loss
from megatron_align.losses.pair_loss import WeightedLosses
from megatron_align.losses.responses import Responses, wpo_weights
from tests.losses.draw import at_reference, pair, shifted, taken

BETA = 0.3
MARGIN = torch.linspace(-1, 2, 6, dtype=torch.float64)
NEEDED = {name: {"margin_N": MARGIN} for name, loss in DPO_LOSSES.items() if loss.reads_margin}
EVERY = sorted(DPO_LOSSES)
BATCH_COUPLED = {name for name, loss in DPO_LOSSES.items() if loss.batch_coupled}
FOLLOWING = [name for name in EVERY if "divergence" in DPO_LOSSES[name].options]
OF_THE_MARGIN = [name for name in FOLLOWING if name not in ("ipo", "sigmoid_norm")]


def bound(name, **options):
    return partial(DPO_LOSSES[name], **NEEDED.get(name, {}), **options)


def log_margin(chosen, rejected):
    return chosen.log_ratio_N - rejected.log_ratio_N


AT_REFERENCE = {
    "sigmoid": math.log(2),
    "sigmoid_norm": math.log(2),
    "robust": math.log(2),
    "hinge": 1,
    "ipo": (1 / 0.2) ** 2,
    "exo_pair": math.log(0.5) - (math.log(1e-3) + math.log(1 - 1e-3)) / 2,
    "nca_pair": 2 * math.log(2),
    "bco_pair": 2 * math.log(2),
    "sppo_hard": 2 * (1 / 0.2) ** 2,
    "aot": math.log(2),
    "aot_unpaired": math.log(2),
    "apo_zero": 1,
    "apo_down": 1,
    "discopop": (math.log(2) + 1) / 2,
}


@pytest.mark.parametrize("name", sorted(AT_REFERENCE))
def test_policy_equal_to_reference_costs_a_constant(name):
    chosen, rejected = map(at_reference, pair())
    loss = DPO_LOSSES[name](chosen, rejected)
    assert_close(loss, torch.full_like(loss, AT_REFERENCE[name]))


def test_the_constants_cover_all_but_what_depends_on_data():
    assert set(EVERY) - set(AT_REFERENCE) == {"margin", "reward_aware"}


@pytest.mark.parametrize("name", [*OF_THE_MARGIN, "aot"])
def test_only_the_margin_matters(name):
    chosen, rejected = pair()
    loss = bound(name)
    assert_close(loss(shifted(chosen, 3, -1), shifted(rejected, 3, -1)), loss(chosen, rejected))


# DiscoPOP is not convex: around margin 0, at small tau, its blend itself rises.
@pytest.mark.parametrize("name", sorted(set(EVERY) - {"discopop"}))
def test_descent_widens_the_margin_near_the_reference(name):
    chosen, rejected = pair(requires_grad=True)
    start = [
        Responses(r.reference_N.clone().requires_grad_(), r.length_N, r.reference_N)
        for r in (chosen, rejected)
    ]
    margin = {"margin_N": torch.ones(6, dtype=torch.float64)} if name in ("margin", "reward_aware") else {}
    loss = DPO_LOSSES[name](*start, **(NEEDED.get(name, {}) | margin)).sum()
    up, down = torch.autograd.grad(loss, [r.policy_N for r in start], materialize_grads=True)
    assert (up - down < 0).all()


def test_swapping_the_pair_differs_by_beta_times_margin():
    chosen, rejected = pair()
    gap = sigmoid(rejected, chosen, beta=BETA) - sigmoid(chosen, rejected, beta=BETA)
    assert_close(gap, BETA * log_margin(chosen, rejected))


@pytest.mark.parametrize("name", ["robust", "sigmoid", "aot", "aot_unpaired"])
def test_label_smoothing_zero_is_none(name):
    plain = {"robust": "sigmoid"}.get(name, name)
    assert_close(bound(name, label_smoothing=0.0)(*pair()), bound(plain)(*pair()))


def test_label_smoothing_is_the_expected_loss_under_flips():
    chosen, rejected = pair()
    mixed = 0.8 * sigmoid(chosen, rejected) + 0.2 * sigmoid(rejected, chosen)
    assert_close(sigmoid(chosen, rejected, label_smoothing=0.2), mixed)


def test_robust_is_unbiased_under_flips():
    chosen, rejected = pair()
    loss = partial(robust, beta=BETA, label_smoothing=0.2)
    expected = 0.8 * loss(chosen, rejected) + 0.2 * loss(rejected, chosen)
    assert_close(expected, sigmoid(chosen, rejected, beta=BETA))


def test_exo_is_zero_where_the_margin_is_the_smoothed_label():
    chosen, rejected = pair()
    target = math.log(0.9 / 0.1) / BETA
    tuned = shifted(chosen, target - log_margin(chosen, rejected))
    loss = exo_pair(tuned, rejected, beta=BETA, label_smoothing=0.1)
    assert_close(loss, torch.zeros_like(loss))
    assert (exo_pair(*pair(), beta=BETA, label_smoothing=0.1) > 0).all()


@pytest.mark.parametrize(
    "loss, wrong", [(exo_pair, 0.0), (exo_pair, 0.5), (robust, 0.5), (sigmoid, -0.1), (aot, 0.6)]
)
def test_label_smoothing_out_of_range_is_refused(loss, wrong):
    with pytest.raises(InputError, match="label_smoothing"):
        loss(*pair(), label_smoothing=wrong)


def test_ipo_and_sigmoid_norm_average_over_tokens():
    chosen, rejected = pair()
    per_token = chosen.log_ratio_N / chosen.length_N - rejected.log_ratio_N / rejected.length_N
    assert_close(ipo(chosen, rejected, beta=BETA), (per_token - 1 / (2 * BETA)) ** 2)
    assert_close(sigmoid_norm(chosen, rejected, beta=BETA), torch.log1p(torch.exp(-BETA * per_token)))


def test_bco_pair_is_a_sum_of_logistic_losses():
    chosen, rejected = pair()
    w, l = (BETA * r.log_ratio_N for r in (chosen, rejected))  # noqa: E741
    want = torch.log1p(torch.exp(-w)) + torch.log1p(torch.exp(l))
    assert_close(DPO_LOSSES["bco_pair"](chosen, rejected, beta=BETA), want)


def test_apo_is_a_sum_of_sigmoids():
    chosen, rejected = pair()
    w, l = (torch.sigmoid(BETA * r.log_ratio_N) for r in (chosen, rejected))  # noqa: E741 -- the formulas' letters
    assert_close(DPO_LOSSES["apo_zero"](chosen, rejected, beta=BETA), 1 - w + l)
    margin = torch.sigmoid(BETA * log_margin(chosen, rejected))
    assert_close(DPO_LOSSES["apo_down"](chosen, rejected, beta=BETA), w + 1 - margin)


def test_nca_pair_is_a_sum_of_logistic_losses():
    chosen, rejected = pair()
    w, l = (BETA * r.log_ratio_N for r in (chosen, rejected))  # noqa: E741
    want = torch.log1p(torch.exp(-w)) + 0.5 * (torch.log1p(torch.exp(w)) + torch.log1p(torch.exp(l)))
    assert_close(DPO_LOSSES["nca_pair"](chosen, rejected, beta=BETA), want)


def test_discopop_is_exponential_far_above_tau_and_logistic_far_below():
    chosen, rejected = pair()
    margin = BETA * log_margin(chosen, rejected)
    loss = discopop(chosen, rejected, beta=BETA, discopop_tau=1e-6)
    assert_close(loss, torch.where(margin > 0, torch.exp(-margin), torch.log1p(torch.exp(-margin))))
    assert (margin > 0).any()
    assert (margin < 0).any()


@pytest.mark.parametrize("name", sorted(BATCH_COUPLED))
def test_sorting_losses_do_not_depend_on_the_order_of_pairs(name):
    chosen, rejected = pair()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    loss = bound(name)
    assert_close(loss(taken(chosen, order), taken(rejected, order)), loss(chosen, rejected))


def test_sorting_losses_compare_distributions():
    chosen, rejected = pair()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    loss = DPO_LOSSES["aot_unpaired"]
    assert_close(loss(chosen, taken(rejected, order)), loss(chosen, rejected))
    assert not torch.allclose(sigmoid(chosen, taken(rejected, order)).sum(), sigmoid(chosen, rejected).sum())


@pytest.mark.parametrize("name", EVERY)
def test_only_batch_coupled_losses_mix_pairs(name):
    chosen, rejected = pair()

    def of(policy_N):
        return bound(name)(Responses(policy_N, chosen.length_N, chosen.reference_N), rejected)

    jacobian = torch.autograd.functional.jacobian(of, chosen.policy_N)
    diagonal = torch.equal(jacobian, torch.diag(jacobian.diagonal()))
    assert diagonal == (name not in BATCH_COUPLED)


@pytest.mark.parametrize("name", EVERY)
def test_gradcheck(name):
    chosen, rejected = pair()

    def of(chosen_N, rejected_N):
        sides = (
            Responses(chosen_N, chosen.length_N, chosen.reference_N),
            Responses(rejected_N, rejected.length_N, rejected.reference_N),
        )
        return bound(name)(*sides)

    assert torch.autograd.gradcheck(of, [r.policy_N.clone().requires_grad_() for r in (chosen, rejected)])


# Regressions and likelihoods grow without bound, and should.
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", EVERY)
def test_finite_in_fp32_at_log_ratios_of_thousands(name, sign):
    reference = torch.tensor([-9000.0, -9000.0])
    policy = reference + sign * torch.tensor([8000.0, -8000.0])
    sides = [
        Responses(p.requires_grad_(), torch.full((2,), 3.0), reference) for p in (policy, policy.flip(0))
    ]
    extra = {
        key: value[:2].float() if key == "margin_N" else value for key, value in NEEDED.get(name, {}).items()
    }
    loss = DPO_LOSSES[name](*sides, **extra)
    assert loss.dtype == torch.float32
    assert loss.isfinite().all()
    grads = torch.autograd.grad(loss.sum(), [s.policy_N for s in sides], materialize_grads=True)
    assert all(grad.isfinite().all() for grad in grads)


def test_the_margin_loss_shifts_the_margin():
    chosen, rejected = pair()
    assert_close(
        margin_loss(chosen, rejected, margin_N=torch.zeros(6), beta=BETA),
        sigmoid(chosen, rejected, beta=BETA),
    )
    moved = sigmoid(shifted(chosen, -MARGIN / BETA), rejected, beta=BETA)
    assert_close(margin_loss(chosen, rejected, margin_N=MARGIN, beta=BETA), moved)


def test_reward_aware_is_zero_only_where_the_margins_are_equal():
    chosen, rejected = pair()
    equal = BETA * log_margin(chosen, rejected)
    p, q = torch.sigmoid(MARGIN), torch.sigmoid(equal)
    divergence = p * torch.log(p / q) + (1 - p) * torch.log((1 - p) / (1 - q))
    assert_close(reward_aware(chosen, rejected, margin_N=MARGIN, beta=BETA), divergence)
    loss = reward_aware(chosen, rejected, margin_N=equal, beta=BETA)
    assert_close(loss, torch.zeros_like(loss))
    assert (reward_aware(chosen, rejected, margin_N=equal + 1, beta=BETA) > 0).all()


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_divergences_vanish_with_slope_one_at_the_reference(name):
    at = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    score = DIVERGENCES[name](at)
    assert_close(score, torch.zeros_like(score))
    (slope,) = torch.autograd.grad(score.sum(), at)
    assert_close(slope, torch.full_like(slope, 0.5 if name == "js_divergence" else 1.0))


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_divergences_rise_with_the_policy(name):
    score = DIVERGENCES[name](torch.linspace(-5, 5, 50, dtype=torch.float64))
    assert (score.diff() > 0).all()


def test_alpha_divergence_has_the_kls_as_its_ends():
    ratio = torch.linspace(-5, 5, 50, dtype=torch.float64)
    assert_close(alpha_divergence(ratio, alpha=1.0), reverse_kl(ratio))
    # the limit
    assert_close(alpha_divergence(ratio, alpha=1 + 1e-5), reverse_kl(ratio), rtol=1e-4, atol=1e-4)
    assert_close(alpha_divergence(ratio, alpha=0.0), forward_kl(ratio))
    assert_close(forward_kl(ratio), 1 - torch.exp(-ratio))


@pytest.mark.parametrize("name", OF_THE_MARGIN)
def test_reverse_kl_is_plain(name):
    assert_close(bound(name, divergence=reverse_kl)(*pair()), bound(name)(*pair()))


@pytest.mark.parametrize("name", FOLLOWING)
def test_a_divergence_stands_for_other_log_ratios(name):
    chosen, rejected = pair()
    other = [Responses(forward_kl(r.log_ratio_N), r.length_N, torch.zeros(6)) for r in (chosen, rejected)]
    assert_close(bound(name, divergence=forward_kl)(chosen, rejected), bound(name)(*other))


def test_wpo_weight_is_one_under_a_uniform_policy():
    length = torch.tensor([3.0, 7.0], dtype=torch.float64, requires_grad=True)
    weights = wpo_weights(-length * math.log(11), -length * math.log(11), length)
    assert_close(weights, torch.ones_like(weights))
    assert not weights.requires_grad
    twice = wpo_weights(
        -length * math.log(11 / 2), -length * math.log(11), length
    )  # each token twice as likely
    assert_close(twice, torch.full_like(weights, 2))


def test_weighted_sum_of_losses():
    """Each option goes to the losses that take it, margins to those that read them."""
    chosen, rejected = pair()
    losses = tuple(DPO_LOSSES[name] for name in ("discopop", "hinge", "margin"))
    weighted = WeightedLosses(losses, (0.5, 1.0, 2.0), {"beta": BETA, "discopop_tau": 0.2})
    want = 0.5 * discopop(chosen, rejected, beta=BETA, discopop_tau=0.2) + hinge(chosen, rejected, beta=BETA)
    want = want + 2 * margin_loss(chosen, rejected, beta=BETA, margin_N=MARGIN)
    assert_close(weighted(chosen, rejected, MARGIN), want)
    alone = WeightedLosses((DPO_LOSSES["sigmoid"],), (1.0,), {"beta": BETA})
    assert_close(alone(chosen, rejected), sigmoid(chosen, rejected, beta=BETA))


def test_a_missing_reference_is_named():
    chosen, rejected = (Responses(r.policy_N, r.length_N) for r in pair())
    with pytest.raises(InputError, match="needs reference"):
        sigmoid(chosen, rejected)
