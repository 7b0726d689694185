"""Advantages equal float64 references written from their definitions, one completion at a time, and refuse bad rewards.

Parity with TRL's own code is in test_policy_gradient_trl.py.
"""

import math

import pytest
import torch
from torch.testing import assert_close

from megatron_align.errors import InputError
from megatron_align.losses.advantage_estimator import COMPARING, WHITENED, AdvantageEstimator, Experience
from megatron_align.losses.advantages import (
    Moments,
    ScoredGroups,
    generalised_advantages,
    group_advantages,
    leave_one_out_advantages,
    optimal_baseline_advantages,
    token_rewards,
    whiten,
)
from megatron_align.losses.rewards import combine_rewards, overlong_penalty, truncated

REWARD_C = torch.tensor([1.0, 0.0, 4.0, 2.0, 2.0, -1.0, 0.5, 0.5], dtype=torch.float64)
SIZE_G = torch.tensor([3, 2, 3])  # groups may differ in size
LENGTH_C = torch.tensor([2, 1, 3, 2, 4, 1, 1, 2])
N = int(LENGTH_C.sum())
LISTS = [part.tolist() for part in REWARD_C.split(SIZE_G.tolist())]


def groups(reward_C=REWARD_C, **more):
    return ScoredGroups.of(reward_C, SIZE_G, **more)


def draw(seed):
    return torch.randn(N, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def mean(values):
    return sum(values) / len(values)


def std(values, unbiased=True):
    return math.sqrt(sum((v - mean(values)) ** 2 for v in values) / (len(values) - unbiased))


def flat(lists):
    return torch.tensor([value for part in lists for value in part], dtype=torch.float64)


def test_where_nothing_counts_there_is_no_advantage():
    """Scored completions that are left out of the baseline, all of their prompt's: there is none."""
    none = torch.zeros(4, dtype=torch.bool)
    left_out = ScoredGroups.of(torch.tensor([1.0, 2, 3, 5]), torch.tensor([2, 2]), counted_C=none)
    assert left_out.centred().tolist() == [0, 0, 0, 0]
    none[3] = True
    known = ScoredGroups.of(torch.tensor([1.0, 2, 3, 5]), torch.tensor([2, 2]), counted_C=none)
    assert known.centred().tolist() == [0, 0, -2, 0]


@pytest.mark.parametrize("unbiased", [True, False])
def test_group_scaling(unbiased):
    want = [[(r - mean(part)) / (std(part, unbiased) + 1e-6) for r in part] for part in LISTS]
    assert_close(group_advantages(groups(), std_eps=1e-6, unbiased=unbiased), flat(want))
    spread = std(REWARD_C.tolist(), unbiased) + 1e-4
    want = [[(r - mean(part)) / spread for r in part] for part in LISTS]
    assert_close(group_advantages(groups(), "batch", unbiased=unbiased), flat(want))
    assert_close(group_advantages(groups(), "none"), flat([[r - mean(p) for r in p] for p in LISTS]))


def test_a_group_without_signal_has_no_advantage_and_is_found():
    level = torch.tensor([1.0, 1, 1, 0, 1, 2, 2, 2], dtype=torch.float64)
    assert groups(level).with_signal().tolist() == [False, True, False]
    advantage_C = group_advantages(groups(level))
    assert (advantage_C[[0, 1, 2, 5, 6, 7]] == 0).all()


def test_leave_one_out_is_the_mean_of_the_others():
    want = [[r - (sum(part) - r) / (len(part) - 1) for r in part] for part in LISTS]
    assert_close(leave_one_out_advantages(groups()), flat(want))


def test_opo_weighs_the_baseline_by_length():
    lengths = [part.tolist() for part in LENGTH_C.split(SIZE_G.tolist())]
    baselines = [
        sum(n * r for n, r in zip(*both, strict=True)) / sum(both[0])
        for both in zip(lengths, LISTS, strict=True)
    ]
    want = [[r - baseline for r in part] for part, baseline in zip(LISTS, baselines, strict=True)]
    assert_close(optimal_baseline_advantages(groups(), LENGTH_C), flat(want))


def test_unscored_and_uncounted_completions():
    """None: no advantage, in no statistic. Scored but not counted (truncated): an advantage against the others."""
    scored_C = torch.tensor([1, 0, 1, 1, 0, 0, 0, 1], dtype=torch.bool)
    unknown = groups(REWARD_C.masked_fill(~scored_C, math.nan), scored_C=scored_C)
    for advantage_C in (
        group_advantages(unknown),
        group_advantages(unknown, "none"),
        leave_one_out_advantages(unknown),
        optimal_baseline_advantages(unknown, LENGTH_C),
    ):
        assert (advantage_C[~scored_C] == 0).all()
        assert advantage_C[0] < 0 < advantage_C[2]
        assert (advantage_C[[3, 7]] == 0).all()  # alone in their groups
    partly = groups(counted_C=torch.tensor([1, 0, 1, 1, 1, 1, 1, 1], dtype=torch.bool))
    assert_close(group_advantages(partly, "none")[:3], torch.tensor([-1.5, -2.5, 1.5]).double())
    assert_close(leave_one_out_advantages(partly)[:3], torch.tensor([-3.0, -2.5, 3.0]).double())


@pytest.mark.parametrize("estimator", COMPARING)
def test_one_completion_per_prompt_is_refused_where_completions_are_compared(estimator):
    alone = ScoredGroups.of(torch.ones(3), torch.tensor([2, 1]))
    with pytest.raises(InputError, match="at least 2 of each, got 1 for prompt 1 of the step"):
        AdvantageEstimator(advantage=estimator)(Experience(groups=alone, length_C=torch.ones(3).long()))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rewards_that_are_no_numbers_are_refused_with_their_place(bad):
    rewards = REWARD_C.clone()
    rewards[4] = bad
    with pytest.raises(InputError, match=f"got {bad} for completion 1 of prompt 1 of the step"):
        groups(rewards)
    with pytest.raises(
        InputError, match=f"reward math must return a finite number or None, got {bad} .* 1 of"
    ):
        combine_rewards([[1, 2], [None, bad]], [1, 1], ["length", "math"])
    with pytest.raises(InputError, match="reward math must return .* each of 2 completions, got 1"):
        combine_rewards([[1, 2], [1]], [1, 1], ["length", "math"])
    with pytest.raises(ValueError, match="zip"):  # a programmer's error
        combine_rewards([[1, 2]], [1, 1], ["length", "math"])


def test_rewards_are_a_weighted_sum_and_none_is_no_score():
    reward_C, scored_C = combine_rewards([[1, None, 3], [None, None, 2.0]], [0.5, 2], ["a", "b"])
    assert reward_C.tolist() == [0.5, 0, 5.5]
    assert scored_C.tolist() == [True, False, True]


@pytest.mark.parametrize("weights", [[0.5], [0.5, 1, 2]])
def test_each_reward_needs_its_weight(weights):
    """A single weight is not that of all functions."""
    with pytest.raises(InputError, match=rf"2 rewards \(a, b\) needs a weight, got {len(weights)} weights"):
        combine_rewards([[1.0, 2.0], [3.0, 4.0]], weights, ["a", "b"])


def test_weights_of_each_completion_and_normalisation_over_the_batch():
    rewards = [[1.0, 3.0, None, 5.0], [1.0, 1.0, 1.0, 1.0]]
    reward_C, _ = combine_rewards(
        rewards, [[1, 1, 1, 2], [0, 10, 10, 0]], ["a", "b"], normalize=["batch", "none"]
    )
    deviation = 2 + 1e-4
    assert_close(reward_C, torch.tensor([-2 / deviation, 10, 10, 2 * 2 / deviation]).double())


def test_gae_equals_its_definition_on_every_packed_completion():
    reward_N, value_N, gamma, lam = draw(0), draw(1), 0.9, 0.8
    advantage_N, return_N = generalised_advantages(reward_N, value_N, LENGTH_C, gamma=gamma, gae_lambda=lam)
    start = 0
    for length in LENGTH_C.tolist():
        r, v = reward_N[start : start + length].tolist(), [*value_N[start : start + length].tolist(), 0.0]
        errors = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            want = sum((gamma * lam) ** k * errors[t + k] for k in range(length - t))
            assert math.isclose(advantage_N[start + t], want, rel_tol=1e-12, abs_tol=1e-12)
            assert math.isclose(return_N[start + t], want + v[t], rel_tol=1e-12, abs_tol=1e-12)
        start += length


def test_gae_with_lambda_one_is_the_return_less_the_value_and_with_zero_one_step_ahead():
    reward_N, value_N = token_rewards(REWARD_C, LENGTH_C, draw(0)), draw(1)
    advantage_N, return_N = generalised_advantages(reward_N, value_N, LENGTH_C)
    assert_close(advantage_N, return_N - value_N)
    starts = LENGTH_C.cumsum(0) - LENGTH_C
    totals = torch.stack([part.sum() for part in reward_N.split(LENGTH_C.tolist())])
    assert_close(return_N[starts], totals)
    one_step, _ = generalised_advantages(reward_N, torch.zeros(N), LENGTH_C, gae_lambda=0.0)
    assert_close(one_step, reward_N)


def test_ranks_that_whiten_with_shared_moments_agree_with_one_rank():
    """The fault "two halves of one sample got different transforms": local moments do differ."""
    values = draw(4) * 3 + 5
    halves = values[:7], values[7:]
    shared = Moments.of(halves[0]) + Moments.of(halves[1])
    white = torch.cat([whiten(half, shared) for half in halves])
    assert_close(white, (values - values.mean()) / (values.std() + 1e-4))
    assert not torch.allclose(torch.cat([whiten(half, Moments.of(half)) for half in halves]), white)
    assert_close(whiten(values, shared, centre=False), values / (values.std() + 1e-4))
    assert_close(shared.deviation(unbiased=False), values.std(unbiased=False).item())
    assert Moments.of(values[:1]).deviation() == 0
    assert Moments.of(values[:0]).mean == 0


def experience(**more):
    given = {"groups": groups(), "length_C": LENGTH_C, "old_N": draw(0), "reference_N": draw(1)}
    return Experience(**(given | more))


def test_token_level_kl_keeps_scores_apart_from_the_penalty():
    """The report's: normalised score - beta x KL from here to the answer's end, which no deviation divides."""
    advantage_N, _ = AdvantageEstimator(beta=0.2, kl_in="token_reward")(experience())
    kl_N, start = draw(0) - draw(1), 0
    for c, length in enumerate(LENGTH_C.tolist()):
        score = group_advantages(groups())[c]
        for t in range(start, start + length):
            assert_close(advantage_N[t], score - 0.2 * kl_N[t : start + length].sum())
        start += length


def test_sequence_level_kl_lowers_the_score_before_groups_are_compared():
    advantage_N, _ = AdvantageEstimator(beta=0.2, kl_in="sequence_reward")(experience())
    penalty_C = torch.stack([part.sum() for part in (draw(0) - draw(1)).split(LENGTH_C.tolist())])
    want_C = group_advantages(groups(REWARD_C - 0.2 * penalty_C))
    assert_close(advantage_N, want_C.repeat_interleave(LENGTH_C))


@pytest.mark.parametrize("kl_in", ["token_reward", "sequence_reward"])
@pytest.mark.parametrize("advantage", ["group", "rloo", "opo", "reinforce", "reinforce_baseline", "gae"])
def test_a_requested_kl_is_applied_by_every_estimator(advantage, kl_in):
    """Peers drop it silently for group advantages. And it is 0 where policy and reference are equal."""
    options = {"advantage": advantage, "kl_in": kl_in}
    given = experience(value_N=draw(2))
    plain, _ = AdvantageEstimator(**options)(given)
    moved, _ = AdvantageEstimator(beta=0.3, **options)(given)
    assert (moved - plain).abs().max() > 1e-3
    equal, _ = AdvantageEstimator(beta=0.3, **options)(experience(value_N=draw(2), reference_N=draw(0)))
    assert_close(equal, plain)
    with pytest.raises(ValueError, match="needs log-probs"):
        AdvantageEstimator(beta=0.3, **options)(experience(reference_N=None))


@pytest.mark.parametrize("advantage", WHITENED)
def test_reinforce_plus_plus_whitens_over_the_tokens_that_count(advantage):
    mask_N = torch.ones(N, dtype=torch.bool)
    mask_N[4:6] = False
    given = experience(mask_N=mask_N, value_N=draw(2))
    raw, returns = AdvantageEstimator(advantage=advantage, gamma=0.9)(given)
    white, same_returns = AdvantageEstimator(advantage=advantage, gamma=0.9, normalize_advantages=True)(given)
    counted = raw[mask_N]
    assert_close(white[mask_N], (counted - counted.mean()) / (counted.std() + 1e-4))
    assert (white[~mask_N] == 0).all()
    if advantage == "gae":
        assert torch.equal(returns, same_returns)  # whitening leaves the critic's targets


def test_a_critic_learns_nothing_from_completions_that_were_not_scored():
    """Their return is the critic's own value, not a reward of 0; the others' returns are as without them."""
    scored_C = torch.ones(len(REWARD_C), dtype=torch.bool)
    scored_C[2] = False  # tokens 3 to 5
    given = experience(groups=groups(scored_C=scored_C), value_N=draw(2).float())
    _, return_N = AdvantageEstimator(advantage="gae", gae_lambda=0.9)(given)
    _, all_scored_N = AdvantageEstimator(advantage="gae", gae_lambda=0.9)(experience(value_N=draw(2).float()))
    assert torch.equal(return_N[3:6], draw(2).float()[3:6].double())
    rest = torch.arange(N).sub(4).abs() > 1
    assert torch.equal(return_N[rest], all_scored_N[rest])


def test_reinforce_discounts_the_score_from_the_answers_end():
    advantage_N, _ = AdvantageEstimator(advantage="reinforce", gamma=0.5)(experience())
    want = [r * 0.5**left for r, n in zip(REWARD_C, LENGTH_C, strict=True) for left in reversed(range(n))]
    assert_close(advantage_N, torch.stack(want))
    baseline_N, _ = AdvantageEstimator(advantage="reinforce_baseline")(experience())
    assert_close(baseline_N, groups().centred().repeat_interleave(LENGTH_C))


def test_overlong_answers_and_truncation():
    penalty_C = overlong_penalty(torch.tensor([1, 8, 9, 11, 12, 20]), limit=12, buffer=4, factor=2.0)
    assert penalty_C.tolist() == [0, 0, -0.5, -1.5, -2, -2]
    with pytest.raises(InputError, match="a buffer of 1 to 12 tokens"):
        overlong_penalty(torch.tensor([1]), limit=12, buffer=13)
    assert truncated(torch.tensor([5, 2, 3]), [2, 5]).tolist() == [False, False, True]
