"""Law 3 for policy gradients: advantages, loss and gradient of a step equal TRL's GRPOTrainer and RLOOTrainer.

Given completions, rewards and log-probs; float64 on both sides, so 1e-9 is rounding.
"""

import ast
import inspect
import math

import pytest
import torch
from torch.testing import assert_close

trl = pytest.importorskip(
    "trl", minversion="1.16", reason="the judge is the code of TRL 1.16, which needs Python 3.11"
)

from megatron_align.losses.advantage_estimator import AdvantageEstimator, Experience
from megatron_align.losses.advantages import ScoredGroups, group_advantages
from megatron_align.losses.engine_mismatch import engine_correction
from megatron_align.losses.policy_gradient import (
    POLICY_LOSSES,
    PolicyGradient,
    entropy_threshold,
    token_weights,
)
from megatron_align.losses.rewards import combine_rewards, truncated
from megatron_align.losses.segments import per_token
from tests.losses.policy_judge import (
    COMPLETIONS,
    EOS,
    GROUPS,
    LENGTH_C,
    NONE,
    PAD,
    REWARDS,
    SIZE_G,
    K,
    flat,
    judge,
    logprobs,
    tokens,
)
from tests.objectives.trl_judge import Bigram

TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}
SEQUENCE = {"importance_sampling_level": "sequence"}
KL = {"beta": 0.3}


def policies():
    """The policy that sampled, one that has moved far enough for the clip, and a reference."""
    return Bigram(1), Bigram(2, scale=0.8), Bigram(3)


def groups(rewards=REWARDS, **more):
    reward_C = torch.tensor(rewards, dtype=torch.float64)
    return ScoredGroups.of(reward_C, SIZE_G, scored_C=~reward_C.isnan(), **more)


def ours(three, advantage_N, loss_type, *, mask_N=None, tokens_of_rollout=None, options=(), **terms):
    """Return our loss of the step and the gradient of the policy's table."""
    more = {
        name: terms.pop(name) for name in ("correction_N", "sampler_N", "entropy_kept_N") if name in terms
    }
    kept_N = more.pop("entropy_kept_N", None)
    given = tokens(three, advantage_N, beta=terms.get("beta", 0.0), mask_N=mask_N, **more)
    loss_N = PolicyGradient(loss_type=loss_type, options=dict(options), **terms)(given, kept_N).loss_N
    weight_N = token_weights(
        POLICY_LOSSES[loss_type].aggregation,
        given,
        completion_weight=1 / len(COMPLETIONS),
        token_weight=1 / (tokens_of_rollout or given.counted_C().sum()),
        max_completion_length=512,
    )
    loss = (weight_N * loss_N).sum()
    return loss, torch.autograd.grad(loss, three[1].table_VV)[0]


def assert_same(got, judged):
    assert_close(got[0], judged.loss, **TOLERANCE)
    assert_close(got[1], judged.gradient_VV, **TOLERANCE)
    assert judged.gradient_VV.abs().max() > 1e-6


def test_we_have_every_loss_type_of_trl():
    source = inspect.getsource(trl.GRPOTrainer._compute_loss)
    compared = {
        value
        for node in ast.walk(ast.parse("if 1:\n" + source))
        if isinstance(node, ast.Compare) and ast.unparse(node.left) == "self.loss_type"
        for literal in node.comparators
        for value in (
            ast.literal_eval(literal) if isinstance(literal, ast.List) else [ast.literal_eval(literal)]
        )
    }
    assert compared == set(POLICY_LOSSES)


CASES = [
    *((name, {}, {}) for name in POLICY_LOSSES),
    *((name, {}, SEQUENCE | KL) for name in POLICY_LOSSES),
    *((name, {}, KL | {"use_bias_correction_kl": False}) for name in ("dapo", "vespo")),
    ("grpo", {"epsilon": 0.1, "epsilon_high": 0.28, "delta": 1.5}, {}),
    ("luspo", {"delta": 1.5}, SEQUENCE),
    ("cispo", {"epsilon_high": 5.0}, {}),
    ("sapo", {"sapo_temperature_pos": 2.0, "sapo_temperature_neg": 3.0}, {}),
    ("vespo", {"vespo_k_pos": 1.3, "vespo_lambda_neg": 0.7}, {}),
    ("dapo", {}, {"off_policy_mask_threshold": 0.2}),
]


@pytest.mark.parametrize("loss_type, options, terms", CASES)
def test_loss_and_gradient_equal_trl(loss_type, options, terms):
    three = policies()
    judged = judge(trl.GRPOTrainer, three, loss_type=loss_type, **options, **terms)
    advantage_N, _ = AdvantageEstimator()(Experience(groups=groups(), length_C=LENGTH_C))
    assert_close(advantage_N, flat(judged.rollout["advantages"][:, None]), **TOLERANCE)
    assert_same(ours(three, advantage_N, loss_type, options=options, **terms), judged)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("rewards", [REWARDS, [1.0, NONE, 0.5, 2.0, NONE, NONE, 0.0, 0.0, 0.0]])
def test_advantages_equal_trl(scale, rewards):
    judged = judge(trl.GRPOTrainer, policies(), rewards=rewards, scale_rewards=scale)
    estimator = AdvantageEstimator(scale_rewards=scale)
    advantage_N, _ = estimator(Experience(groups=groups(rewards), length_C=LENGTH_C))
    assert_close(advantage_N, flat(judged.rollout["advantages"][:, None]), **TOLERANCE)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "luspo"])
def test_truncated_answers_are_masked_as_trl_masks_them(loss_type):
    """Out of the loss and of the count of tokens; their rewards stay in the group's mean."""
    three = policies()
    judged = judge(trl.GRPOTrainer, three, loss_type=loss_type, mask_truncated_completions=True)
    cut_C = truncated(torch.tensor([ids[-1] for ids in COMPLETIONS]), [EOS, PAD])
    assert cut_C.sum() == GROUPS
    advantage_N, _ = AdvantageEstimator()(Experience(groups=groups(), length_C=LENGTH_C))
    assert_same(ours(three, advantage_N, loss_type, mask_N=per_token(~cut_C, LENGTH_C)), judged)


def test_a_step_of_several_on_one_rollout_divides_by_the_rollouts_tokens():
    """dapo of one of two steps: TRL divides by the generation batch's tokens, over the steps that it serves."""
    three = policies()
    judged = judge(trl.GRPOTrainer, three, steps_per_generation=2)
    advantage_N, _ = AdvantageEstimator()(Experience(groups=groups(), length_C=LENGTH_C))
    got = ours(three, advantage_N, "dapo", tokens_of_rollout=float(LENGTH_C.sum()) / 2)
    assert_same(got, judged)


@pytest.mark.parametrize(
    "mode, loss_type",
    [
        *((mode, "dapo") for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")),
        *((mode, "vespo") for mode in ("token_truncate", "token_mask")),  # TRL has no others for it
    ],
)
def test_engine_correction_equals_trl(mode, loss_type):
    three = policies()
    old_N = logprobs(three[0]).detach()
    noise = torch.Generator().manual_seed(0)
    sampler_N = old_N + 0.4 * torch.randn(old_N.shape, dtype=torch.float64, generator=noise)
    sampler_N[3] = NONE
    judged = judge(
        trl.GRPOTrainer,
        three,
        samples=[part.tolist() for part in sampler_N.split(LENGTH_C.tolist())],
        loss_type=loss_type,
        use_vllm=True,
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_max=1.8,
        vllm_importance_sampling_clip_min=0.5,
    )
    correction_N = engine_correction(old_N - sampler_N, LENGTH_C, mode=mode, cap=1.8, floor=0.5)
    advantage_N, _ = AdvantageEstimator()(Experience(groups=groups(), length_C=LENGTH_C))
    assert_same(ours(three, advantage_N, loss_type, correction_N=correction_N), judged)


def test_high_entropy_tokens_equal_trl():
    three = policies()
    judged = judge(trl.GRPOTrainer, three, top_entropy_quantile=0.4, **KL)
    logprobs_VV = three[1].table_VV.detach().log_softmax(-1)
    entropy_V = -(logprobs_VV.exp() * logprobs_VV).sum(1)
    before = [
        token
        for prompt, ids in zip([3 + 2, 1, 4], [COMPLETIONS[i : i + K] for i in (0, K, 2 * K)], strict=True)
        for answer in ids
        for token in [prompt, *answer[:-1]]
    ]
    entropy_N = entropy_V[torch.tensor(before)]
    # TRL takes the quantile in fp32
    kept_N = entropy_N >= entropy_threshold(entropy_N, 0.4) - 1e-6
    assert 0 < kept_N.sum() < len(kept_N)
    advantage_N, _ = AdvantageEstimator()(Experience(groups=groups(), length_C=LENGTH_C))
    assert_same(ours(three, advantage_N, "dapo", entropy_kept_N=kept_N, **KL), judged)


@pytest.mark.parametrize("beta", [0.0, 0.05])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("rewards", [REWARDS, [1.0, NONE, 0.5, 2.0, NONE, NONE, 0.0, 0.0, 0.0]])
def test_rloo_equals_trl(beta, normalize, rewards):
    """KL in the reward of the answer, leave-one-out, the ratio of the entire answer."""
    three = policies()
    clip = (-1.0, 2.0)
    judged = judge(
        trl.RLOOTrainer,
        three,
        rewards=rewards,
        beta=beta,
        normalize_advantages=normalize,
        reward_clip_range=clip,
    )
    estimator = AdvantageEstimator(
        advantage="rloo",
        beta=beta,
        kl_in="sequence_reward",
        normalize_advantages=normalize,
        reward_clip_range=clip,
    )
    old_N, reference_N = logprobs(three[0]).detach(), logprobs(three[2]).detach()
    experience = Experience(groups=groups(rewards), length_C=LENGTH_C, old_N=old_N, reference_N=reference_N)
    advantage_N, _ = estimator(experience)
    assert_close(advantage_N, flat(judged.rollout["advantages"][:, None]), **TOLERANCE)
    terms = SEQUENCE | {"sequence_ratio": "sum"}
    assert_same(ours(three, advantage_N, "grpo", **terms), judged)


def test_rewards_that_are_normalised_and_then_summed_equal_trl():
    """GDPO's advantages are those of rewards normalised in groups, with the deviation of the batch."""
    nan, weights = math.nan, torch.tensor([0.5, 2.0]).double()
    reward_RC = torch.tensor([[1, 4, nan, nan, 7, 8], [3, nan, 5, nan, nan, 6]]).double()
    grouped = reward_RC.T.view(2, 3, 2)
    nanstd = trl.trainer.utils.nanstd
    scaled = (grouped - grouped.nanmean(1, keepdim=True)) / (nanstd(grouped, dim=1, keepdim=True) + 1e-4)
    total_C = (scaled.view(6, 2) * weights).nansum(1)
    total_C[3] = nan
    wanted_C = ((total_C - total_C.nanmean()) / (nanstd(total_C) + 1e-4)).nan_to_num(0)

    rewards = [[None if math.isnan(value) else value for value in row] for row in reward_RC.tolist()]
    size_G = torch.tensor([3, 3])
    reward_C, scored_C = combine_rewards(
        rewards, weights.tolist(), ["a", "b"], normalize=["group", "group"], size_G=size_G
    )
    got_C = group_advantages(ScoredGroups.of(reward_C, size_G, scored_C=scored_C), "batch")
    assert_close(got_C, wanted_C)
