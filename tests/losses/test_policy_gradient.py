"""Policy-gradient losses obey the laws of their formulas, and no number depends on how a step is cut.

Peers' known faults stand here by name; parity with TRL is in test_policy_gradient_trl.py.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from megatron_align.errors import InputError
from megatron_align.losses.engine_mismatch import effective_sample_share, engine_correction
from megatron_align.losses.kl import KL_ESTIMATORS
from megatron_align.losses.policy_gradient import (
    POLICY_LOSSES,
    PolicyGradient,
    PolicyTokens,
    entropy_threshold,
    importance_ratio,
    token_weights,
)
from megatron_align.losses.segments import backward_sums, next_in_segment, suffix_sums, tokens_left
from megatron_align.losses.value import value_loss

LENGTH_C = torch.tensor([4, 1, 0, 3, 6, 2])
N = int(LENGTH_C.sum())
MASK_N = torch.tensor([1, 1, 0, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 0, 0], dtype=torch.bool)


def draw(seed, scale=0.3):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(N, dtype=torch.float64, generator=generator)


def step(**more):
    """The tokens of a step of six completions, one of them empty, one masked entirely."""
    old_N = -2 + draw(0)
    return PolicyTokens(
        policy_N=(old_N + draw(1)).requires_grad_(),
        advantage_N=draw(2, 1.0),
        length_C=LENGTH_C,
        **({"old_N": old_N, "mask_N": MASK_N, "reference_N": old_N + draw(3)} | more),
    )


def parts(tokens, cuts=(0, 2, 5, 6)):
    """Cut a step's completions into packs."""
    ends = [0, *LENGTH_C.cumsum(0).tolist()]
    for a, b in zip(cuts, cuts[1:], strict=False):
        rows = slice(ends[a], ends[b])
        of_rows = {
            name: value[rows]
            for name in ("policy_N", "advantage_N", "old_N", "mask_N", "reference_N", "correction_N")
            if (value := getattr(tokens, name)) is not None
        }
        yield replace(tokens, length_C=LENGTH_C[a:b], **of_rows)


def loss_of(tokens, loss_type, counted, **terms):
    weight_N = token_weights(
        POLICY_LOSSES[loss_type].aggregation,
        tokens,
        completion_weight=1 / len(LENGTH_C),
        token_weight=1 / counted,
        max_completion_length=8,
    )
    return (weight_N * PolicyGradient(loss_type=loss_type, **terms)(tokens).loss_N).sum()


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", POLICY_LOSSES)
def test_a_step_cut_into_packs_and_ranks_has_the_same_loss(loss_type, level):
    """The faults "loss x dp", "mean of micro-batch means" and "bnpo per local micro-batch": parts simply add up."""
    tokens, counted = step(), MASK_N.sum()
    terms = {"beta": 0.1, "importance_sampling_level": level}
    complete = loss_of(tokens, loss_type, counted, **terms)
    cut = sum(loss_of(part, loss_type, counted, **terms) for part in parts(tokens))
    assert_close(cut, complete, rtol=1e-13, atol=0)
    gradients = [torch.autograd.grad(loss, tokens.policy_N)[0] for loss in (complete, cut)]
    assert_close(*gradients, rtol=1e-12, atol=1e-16)
    local = sum(loss_of(part, loss_type, part.counted_C().sum(), **terms) for part in parts(tokens))
    per_token = POLICY_LOSSES[loss_type].aggregation.endswith("token_mean")
    assert torch.isclose(local, complete) != per_token  # normalisers of a pack would give another number


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", POLICY_LOSSES)
def test_on_policy_the_gradient_is_that_of_reinforce(loss_type, level):
    """Ratio 1 everywhere: minus the advantage at each token; stored log-probs equal to the policy's change nothing."""
    at = step().policy_N.detach()
    for old_N in (None, at):
        tokens = step(old_N=old_N, reference_N=None)
        terms = PolicyGradient(
            loss_type=loss_type,
            importance_sampling_level=level,
            options={"epsilon_high": 5.0} if loss_type == "cispo" else {},
        )(tokens)
        assert (terms.ratio_N == 1).all()
        assert not terms.clipped_N.any()
        (gradient,) = torch.autograd.grad(terms.loss_N.sum(), tokens.policy_N)
        want = -tokens.advantage_N * MASK_N
        if level == "sequence" and loss_type not in ("cispo", "vespo"):
            # the mean ratio's gradient: each token gets its completion's mean advantage
            want = tokens.spread(tokens.completion_means(want)) * MASK_N
        assert_close(gradient, want)


@pytest.mark.parametrize("loss_type", POLICY_LOSSES)
def test_masked_tokens_have_no_part_in_value_or_gradient(loss_type):
    """Whatever they hold, infinite ratios too; a completion that is masked entirely is no NaN."""
    tokens, wild = step(), step()
    with torch.no_grad():
        wild.policy_N[~MASK_N] = 900.0
    for terms in ({"beta": 0.1}, {"beta": 0.1, "importance_sampling_level": "sequence"}):
        losses = [loss_of(t, loss_type, MASK_N.sum(), **terms) for t in (tokens, wild)]
        assert losses[0] == losses[1]
        gradients = [
            torch.autograd.grad(loss, t.policy_N)[0] for loss, t in zip(losses, (tokens, wild), strict=True)
        ]
        assert torch.equal(*gradients)
        assert (gradients[0][~MASK_N] == 0).all()
        assert gradients[0].isfinite().all()


@pytest.mark.parametrize("loss_type", sorted(set(POLICY_LOSSES) - {"cispo", "vespo"}))
def test_gradcheck(loss_type):
    """But for the two whose weight has no gradient, by definition."""
    tokens = step()

    def of(policy_N):
        return PolicyGradient(loss_type=loss_type, beta=0.1)(replace(tokens, policy_N=policy_N)).loss_N

    assert torch.autograd.gradcheck(of, tokens.policy_N)


def test_delta_is_dual_clip():
    """With delta above 1 + epsilon_high: max(-w A, -clip(w) A), at most c |A| where A is negative."""
    tokens = step(mask_N=None, reference_N=None)
    with torch.no_grad():
        tokens.policy_N[:4] += 2
    delta = 1.5
    loss_N = PolicyGradient(loss_type="grpo", options={"delta": delta})(tokens).loss_N
    ratio_N, advantage_N = importance_ratio(tokens), tokens.advantage_N
    ppo_N = torch.maximum(-ratio_N * advantage_N, -ratio_N.clamp(0.8, 1.2) * advantage_N)
    dual_N = torch.where(advantage_N < 0, torch.minimum(ppo_N, -delta * advantage_N), ppo_N)
    assert_close(loss_N, dual_N)
    assert not torch.equal(dual_N, ppo_N)


def test_sequence_ratio_is_a_geometric_mean_or_the_ratio_of_the_answer():
    tokens = step(mask_N=None)
    log_C = [part.sum() for part in (tokens.policy_N - tokens.old_N).split(LENGTH_C.tolist())]
    for kind in ("mean", "sum"):
        ratio_N = importance_ratio(tokens, "sequence", sequence_ratio=kind)
        of = LENGTH_C.clamp(min=1) if kind == "mean" else torch.ones_like(LENGTH_C)
        want = [(value / n).exp() for value, n in zip(log_C, of, strict=True)]
        assert_close(ratio_N, tokens.spread(torch.stack(want)))


def test_a_bound_on_log_ratios_keeps_them_finite():
    tokens = step(mask_N=None)
    with torch.no_grad():
        tokens.policy_N[0] = 900.0
    assert importance_ratio(tokens)[0] == math.inf
    bounded = PolicyGradient(log_ratio_bound=20.0, beta=0.1)(tokens)
    assert bounded.ratio_N.max() == math.exp(20)
    assert bounded.loss_N.isfinite().all()


def test_the_kl_term_is_added_after_masks_and_corrections():
    """TRL's order; SWIFT multiplies the KL term by the correction too."""
    tokens = step(correction_N=torch.full((N,), 0.5, dtype=torch.float64))
    terms = {"loss_type": "dapo", "use_bias_correction_kl": False}
    kept_N = torch.zeros(N, dtype=torch.bool)
    only_kl = PolicyGradient(beta=0.3, **terms)(tokens, kept_N)
    assert_close(only_kl.loss_N, 0.3 * only_kl.kl_N)
    surrogate = PolicyGradient(**terms)(replace(tokens, reference_N=None)).loss_N
    assert_close(PolicyGradient(beta=0.3, **terms)(tokens).loss_N, surrogate + 0.3 * only_kl.kl_N)
    uncorrected = PolicyGradient(**terms)(replace(tokens, reference_N=None, correction_N=None)).loss_N
    assert_close(surrogate, 0.5 * uncorrected)
    both = PolicyGradient(beta=0.3, correct_kl=True, **terms)(tokens).loss_N
    assert_close(both, surrogate + 0.15 * only_kl.kl_N)


def test_a_kl_term_without_its_log_probs_is_refused():
    """Never dropped silently: beta needs the reference, correct_kl the correction."""
    with pytest.raises(ValueError, match="beta 0.1 needs log-probs of the reference, got none"):
        PolicyGradient(beta=0.1)(step(reference_N=None))
    with pytest.raises(ValueError, match="correct_kl needs the correction"):
        PolicyGradient(beta=0.1, correct_kl=True)(step())


@pytest.mark.parametrize("bounds", [{"epsilon": 0.2}, {"epsilon": 0.3, "epsilon_high": 0.7}])
def test_cispo_bounds_that_cross_are_refused(bounds):
    with pytest.raises(InputError, match="must be above the smallest, 1 - epsilon = 0.[78]; got"):
        PolicyGradient(loss_type="cispo", options=bounds)(step())


def test_cispo_with_a_lower_bound():
    tokens = step(mask_N=None, reference_N=None)
    options = {"epsilon_high": 1.1, "epsilon": 0.1}
    terms = PolicyGradient(loss_type="cispo", options=options)(tokens)
    bounded_N = importance_ratio(tokens).detach().clamp(0.9, 1.1)
    assert_close(terms.loss_N, -bounded_N * tokens.advantage_N * tokens.policy_N)
    assert terms.clipped_N.any()


@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_a_kl_estimate_of_equal_models_is_zero(name):
    assert (KL_ESTIMATORS[name](torch.zeros(3)) == 0).all()


def test_kl_estimators_against_the_exact_divergence():
    """k1 and k3 are unbiased under the policy; k2 and k3 never negative; gradients as their docstrings say."""
    generator = torch.Generator().manual_seed(3)
    logits, other = torch.randn(2, 7, dtype=torch.float64, generator=generator)
    logits.requires_grad_()
    policy, reference = logits.log_softmax(0), other.log_softmax(0)
    exact = (policy.exp() * (policy - reference)).sum()
    (exact_gradient,) = torch.autograd.grad(exact, logits, retain_graph=True)
    probability = policy.exp().detach()
    for name, estimator in KL_ESTIMATORS.items():
        values = estimator(policy - reference)
        if name != "k2":
            assert_close((probability * values).sum(), exact)
        if name != "k1":
            assert (values >= 0).all()
        # the term in a loss on sampled tokens: its expectation under the frozen sampler
        (plain,) = torch.autograd.grad((probability * values).sum(), logits, retain_graph=True)
        weighed = (policy - policy.detach()).exp() * values
        (unbiased,) = torch.autograd.grad((probability * weighed).sum(), logits, retain_graph=True)
        if name == "k1":
            assert_close(plain, torch.zeros_like(plain))  # requested and not applied, without the weight
        if name == "k2":
            assert_close(plain, exact_gradient)
        else:
            assert_close(unbiased, exact_gradient)


def test_engine_correction_bounds_and_masks():
    difference_N = torch.tensor([0.0, 2.0, -2.0, math.nan, 0.3], dtype=torch.float64)
    length_C = torch.tensor([2, 3])
    e = math.exp
    rows = {
        ("token_truncate", 2.0, None): [1, 2, e(-2), 1, e(0.3)],
        ("token_mask", 2.0, 0.5): [1, 0, 0, 1, e(0.3)],
        ("sequence_truncate", 2.0, None): [2, 2, *[e(-1.7)] * 3],
        ("sequence_mask", None, 0.5): [e(2), e(2), 0, 0, 0],
    }
    for (mode, cap, floor), want in rows.items():
        got = engine_correction(difference_N, length_C, mode=mode, cap=cap, floor=floor)
        assert_close(got, torch.tensor(want, dtype=torch.float64))
    mask_N = torch.tensor([1, 0, 0, 1, 1], dtype=torch.bool)  # tokens that do not count: log-ratio 0
    masked_rows = {"token_truncate": [1, 1, 1, 1, e(0.3)], "sequence_truncate": [1, 1, *[e(0.3)] * 3]}
    for mode, want in masked_rows.items():
        got = engine_correction(difference_N, length_C, mode=mode, mask_N=mask_N)
        assert_close(got, torch.tensor(want, dtype=torch.float64))
    assert effective_sample_share(torch.ones(5)) == 1
    assert_close(effective_sample_share(torch.tensor([1.0, 0, 0, 0])), torch.tensor(0.25))


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 1.0])
def test_entropy_threshold_is_a_quantile(share):
    entropy_S = draw(9).abs()
    assert_close(entropy_threshold(entropy_S, share), torch.quantile(entropy_S, 1 - share))


def test_segments_count_from_the_end_and_know_empty_completions():
    assert tokens_left(torch.tensor([2, 0, 3])).tolist() == [1, 0, 2, 1, 0]
    values_N = torch.tensor([1.0, 2, 3, 4, 5])
    assert next_in_segment(values_N, torch.tensor([2, 0, 3])).tolist() == [2, 0, 4, 5, 0]
    assert backward_sums(values_N, torch.tensor([2, 0, 3]), 0.5).tolist() == [2, 2, 6.25, 6.5, 5]
    for lengths in ([2, 0, 3], [0, 5], [5, 0]):
        length_C = torch.tensor(lengths)
        assert suffix_sums(values_N, length_C).tolist() == backward_sums(values_N, length_C).tolist()
    nothing = torch.empty(0)
    assert suffix_sums(nothing, torch.tensor([0])).shape == (0,)
    assert backward_sums(nothing, torch.tensor([], dtype=torch.int64)).shape == (0,)
    assert next_in_segment(nothing, torch.tensor([0])).shape == (0,)


def test_value_clipping_takes_the_worse_of_two_errors():
    """Without gradient where the clipped value is worse and the value has left the band towards the return."""
    value_N = torch.tensor([0.1, 0.5, 0.5, -0.5], dtype=torch.float64, requires_grad=True)
    old_N, return_N = torch.zeros(4), torch.tensor([1.0, 1.0, 0.0, 1.0])
    loss_N = value_loss(value_N, old_N, return_N, clip=0.2)
    assert_close(loss_N, torch.tensor([0.81, 0.64, 0.25, 2.25], dtype=torch.float64) / 2)
    (gradient,) = torch.autograd.grad(loss_N.sum(), value_N)
    assert_close(gradient, torch.tensor([-0.9, 0, 0.5, -1.5], dtype=torch.float64))
    plain_N = value_loss(value_N, old_N, return_N, clip=None)
    assert_close(plain_N, (value_N - return_N) ** 2 / 2)
