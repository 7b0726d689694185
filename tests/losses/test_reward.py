"""Reward losses: alpha 0 is Bradley-Terry, missing scores leave no trace, ranked lists of two are Bradley-Terry."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from megatron_align.losses.ranked import RANKED_LOSSES, all_pairs, plackett_luce
from megatron_align.losses.reward import Rewards, bradley_terry, reward_loss, score_error

NAN = math.nan


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rewards(scores=None, seed=0):
    scores = torch.full((4,), NAN, dtype=torch.float64) if scores is None else torch.tensor(scores).double()
    return Rewards(draw(4, seed=seed).requires_grad_(), scores)


def test_alpha_zero_is_bradley_terry():
    w, l = rewards([1, 2, 3, 4]), rewards([0, 0, 0, NAN], seed=1)  # noqa: E741 -- the formula's letters
    want = torch.log1p(torch.exp(l.reward_N - w.reward_N))
    assert_close(reward_loss(w, l), want)
    assert_close(bradley_terry(w.reward_N, w.reward_N), torch.full_like(want, math.log(2)))


def test_the_reports_objective():
    w, l = rewards([1, 2, 3, 4]), rewards([0, 0, 0, 0], seed=1)  # noqa: E741
    want = torch.log1p(torch.exp(l.reward_N - w.reward_N)) + 0.3 * (
        (w.reward_N - w.score_N) ** 2 + (l.reward_N - l.score_N) ** 2
    )
    assert_close(reward_loss(w, l, alpha=0.3), want)


def test_a_missing_score_drops_its_term_and_only_that_gradient_included():
    w, l = rewards([1, NAN, 3, NAN]), rewards([0, 0, NAN, NAN], seed=1)  # noqa: E741
    loss = reward_loss(w, l, alpha=0.3)
    plain = bradley_terry(w.reward_N, l.reward_N)
    w_error, l_error = (w.reward_N - w.score_N) ** 2, (l.reward_N - l.score_N) ** 2
    want = plain + 0.3 * torch.stack(
        [w_error[0] + l_error[0], l_error[1], w_error[2], torch.zeros_like(plain[3])]
    )
    assert_close(loss, want)
    grads, plain_grads = (
        torch.autograd.grad(x.sum(), (w.reward_N, l.reward_N), retain_graph=True) for x in (loss, plain)
    )
    assert_close(grads[0][[1, 3]], plain_grads[0][[1, 3]])
    assert_close(grads[1][[2, 3]], plain_grads[1][[2, 3]])
    assert_close(score_error(rewards()), torch.zeros(4, dtype=torch.float64))


def test_margin_asks_for_so_much_more():
    w, l, margin = rewards(), rewards(seed=1), draw(4, seed=2)  # noqa: E741
    assert_close(reward_loss(w, l, margin_N=margin), bradley_terry(w.reward_N - margin, l.reward_N))


def test_centring_alone_sees_the_level_of_rewards():
    w, l = rewards(), rewards(seed=1)  # noqa: E741
    up = [Rewards(r.reward_N + 2, r.score_N) for r in (w, l)]
    assert_close(reward_loss(*up), reward_loss(w, l))
    total = w.reward_N + l.reward_N
    gap = reward_loss(*up, center_rewards_coefficient=0.01) - reward_loss(
        w, l, center_rewards_coefficient=0.01
    )
    assert_close(gap, 0.01 * ((total + 4) ** 2 - total**2))


def test_reward_loss_gradcheck():
    scores, margin = (
        (torch.tensor([1, NAN, 3, NAN]).double(), torch.tensor([0, 0, NAN, NAN]).double()),
        draw(4, seed=2),
    )

    def of(w, l):  # noqa: E741
        sides = (Rewards(w, scores[0]), Rewards(l, scores[1]))
        return reward_loss(*sides, margin_N=margin, alpha=0.3, center_rewards_coefficient=0.1)

    assert torch.autograd.gradcheck(of, (draw(4).requires_grad_(), draw(4, seed=1).requires_grad_()))


@pytest.mark.parametrize("name", sorted(RANKED_LOSSES))
def test_lists_of_two_are_bradley_terry(name):
    reward = draw(5, 2)
    scores = torch.tensor([[2.0, 1.0]]).expand(5, 2)
    assert_close(RANKED_LOSSES[name](reward, scores), bradley_terry(*reward.unbind(1)))
    assert_close(RANKED_LOSSES[name](reward.flip(1), scores.flip(1)), bradley_terry(*reward.unbind(1)))


@pytest.mark.parametrize("name", sorted(RANKED_LOSSES))
def test_empty_places_and_the_order_of_places_leave_no_trace(name):
    reward, scores = draw(3, 4), draw(3, 4, seed=1)
    loss = RANKED_LOSSES[name]
    want = loss(reward, scores)
    hole = torch.full((3, 1), NAN)
    assert_close(loss(torch.cat([hole, reward], 1), torch.cat([hole, scores], 1)), want)
    order = torch.tensor([2, 0, 3, 1])
    assert_close(loss(reward[:, order], scores[:, order]), want)


def test_plackett_luce_is_a_distribution_over_rankings():
    reward = draw(4)
    rankings = torch.tensor(list(itertools.permutations(range(4)))).double()
    probability = torch.exp(-plackett_luce(reward.expand(len(rankings), 4), rankings))
    assert_close(probability.sum().item(), 1.0)
    # the best place goes by softmax
    first = torch.stack([probability[rankings.argmax(1) == k].sum() for k in range(4)])
    assert_close(first, reward.softmax(0))


def test_all_pairs_is_the_mean_over_pairs():
    reward, scores = draw(1, 4), torch.tensor([[3.0, 1.0, 2.0, 1.0]])
    pairs = [(0, 1), (0, 2), (0, 3), (2, 1), (2, 3)]  # 1 and 3 are tied
    want = torch.stack([bradley_terry(reward[0, i], reward[0, j]) for i, j in pairs]).mean()
    assert_close(all_pairs(reward, scores)[0], want)
    tied = all_pairs(reward, torch.ones(1, 4))
    assert_close(tied, torch.zeros_like(tied))


def test_ties_in_plackett_luce_have_no_order_and_draw_together():
    reward = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64, requires_grad=True)
    scores = torch.tensor([[2.0, 1.0, 1.0]])
    swapped = plackett_luce(reward[:, [0, 2, 1]], scores[:, [0, 2, 1]])
    assert_close(plackett_luce(reward, scores), swapped)
    (grad,) = torch.autograd.grad(plackett_luce(reward, scores).sum(), reward)
    assert grad[0, 1] < grad[0, 2]
    equal = plackett_luce(torch.zeros(1, 3), scores)
    assert_close(equal.item(), math.log(3) + 2 * math.log(2))  # each of the tied faces both


@pytest.mark.parametrize("name", sorted(RANKED_LOSSES))
def test_ranked_gradcheck_with_empty_places_and_no_mixing(name):
    scores = torch.tensor([[3.0, 1.0, 2.0], [1.0, NAN, 2.0], [NAN, NAN, NAN]])

    def of(reward):
        return RANKED_LOSSES[name](reward, scores)

    reward = draw(3, 3).requires_grad_()
    assert torch.autograd.gradcheck(of, reward)
    jacobian = torch.autograd.functional.jacobian(of, reward)
    assert all(not jacobian[i, j].any() for i in range(3) for j in range(3) if i != j)
    assert not of(reward)[2].any()
