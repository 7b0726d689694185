"""Law 13 for PPO: every option of policy and critic changes a number. The critic's loss is its formula."""

from types import SimpleNamespace

import pytest
import torch

from megatron_align.config.rollout import RolloutConfig
from megatron_align.errors import InputError
from megatron_align.objectives.configuration import load_config
from megatron_align.objectives.ppo import PPO, CriticObjective, PPOOptions
from megatron_align.objectives.scored_rollouts import ScoredRollouts

LENGTH_C = torch.tensor([3, 5, 2, 4])
N = int(LENGTH_C.sum())
RUN = {
    "model": {"path": "m"},
    "data": {"train": "d"},
    "train": {"steps": 3},
    "checkpoint": {"dir": "c"},
    "objective": {"name": "ppo"},
    "rollout": {"engine": "data"},
}


def draw(seed, scale=1.0):
    return scale * torch.randn(N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def columns_of(options, *, scored_C=None, weight_G=(1.0, 1.0), truncated_C=(False,) * 4):
    objective = PPO(options)
    objective.rollout = RolloutConfig(max_tokens=6)
    rollouts = ScoredRollouts(
        reward_C=torch.tensor([0.3, -1.0, 0.8, 2.0], dtype=torch.float64),
        scored_C=torch.ones(4, dtype=torch.bool) if scored_C is None else scored_C,
        size_G=torch.tensor([1, 3]),
        weight_G=torch.tensor(weight_G, dtype=torch.float64),
        minibatch_G=torch.tensor([0, 1]),
        length_C=LENGTH_C,
        truncated_C=torch.tensor(truncated_C),
    )
    old_N, reference_N, value_N = draw(0), draw(1), draw(2)
    columns = objective.columns(rollouts, old_N, reference_N, value_N)
    return {**columns, "old_logprobs": old_N, "reference_logprobs": reference_N, "values": value_N}


def critic_of(options, columns):
    """Return the critic's loss, the sums of its metrics and its gradient, at values further and less far away."""
    found = []
    for far in (0.05, 1.0):
        value_N = (columns["values"] + draw(3, far)).requires_grad_()
        loss, sums = CriticObjective(options).loss(value_N, SimpleNamespace(columns=columns), {})
        found.append((loss.item(), torch.autograd.grad(loss, value_N)[0].tolist(), sums))
    return found


def numbers(options):
    columns = columns_of(options)
    critic = [(loss, gradient) for loss, gradient, _ in critic_of(options, columns)]
    return [columns[name].tolist() for name in ("advantages", "returns", "loss_weights")], critic


@pytest.mark.parametrize(
    "given",
    [
        {"gamma": 0.9},
        {"gae_lambda": 0.5},
        {"beta": 0.2},
        {"kl_estimator": "k3"},
        {"kl_in": "sequence_reward"},
        {"normalize_advantages": False},
        {"std_eps": 0.1},
        {"unbiased_std": False},
        {"reward_clip_range": [-0.5, 0.5]},
        {"overlong_buffer": 3},
        {"loss_type": "grpo"},
        {"cliprange_value": 0.4},
        {"cliprange_value": None},
        {"vf_coef": 1.0},
    ],
    ids=str,
)
def test_every_option_has_an_effect(given):
    assert numbers(PPOOptions(**given)) != numbers(PPOOptions())


def test_masked_answers_have_no_part_in_either_loss():
    options = PPOOptions(mask_truncated_completions=True)
    columns = columns_of(options, truncated_C=(False, True, False, False))
    for name in ("loss_weights", "value_weights", "shares"):
        assert columns[name][3:8].abs().max() == 0
        assert columns[name][:3].min() > 0


def test_the_critics_loss_is_the_mean_over_the_tokens_of_its_minibatch():
    options = PPOOptions()
    columns = columns_of(options)
    [_, (loss, _, sums)] = critic_of(options, columns)
    value_N, old_N, return_N = columns["values"] + draw(3, 1.0), columns["values"], columns["returns"]
    near_N = old_N + (value_N - old_N).clamp(-0.2, 0.2)
    error_N = torch.maximum((value_N - return_N).square(), (near_N - return_N).square()) / 2
    first, second = error_N[:3].mean(), error_N[3:].mean()
    assert loss == pytest.approx(0.1 * (first + second).item())
    assert sums["value_loss"].item() == pytest.approx((first + second).item())
    assert columns["value_weights"][:3].sum().item() == pytest.approx(1.0)


def test_prompts_weigh_in_the_critics_loss_as_in_the_policys():
    columns = columns_of(PPOOptions(minibatches=2), weight_G=(3.0, 1.0))
    assert torch.equal(columns["value_weights"], columns["loss_weights"])


def test_explained_variance():
    options = PPOOptions()
    columns = columns_of(options)
    columns["shares"] = torch.full((N,), 1 / N, dtype=torch.float64)
    objective = CriticObjective(options)

    def explained(value_N, **changed):
        given = SimpleNamespace(columns={**columns, **changed})
        _, sums = objective.loss(value_N, given, {})
        return objective.finish({name: value.item() for name, value in sums.items()})["explained_variance"]

    return_N = columns["returns"]
    assert explained(return_N) == 1
    assert explained(return_N + 3) == pytest.approx(1)  # a constant is no variance
    assert explained(torch.zeros(N)) == pytest.approx(0)
    assert explained(-return_N) == pytest.approx(-3)
    assert explained(draw(4), returns=torch.full((N,), 0.7)) == 0


def test_an_answer_that_nothing_scored_teaches_the_critic_its_own_value():
    scored_C = torch.tensor([True, False, True, True])
    columns = columns_of(PPOOptions(), scored_C=scored_C)
    assert torch.equal(columns["returns"][3:8], columns["values"][3:8])
    assert columns["advantages"][3:8].abs().max() == 0


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"objective.cliprange_value": -0.1}, "objective.cliprange_value must be positive, got -0.1"),
        ({"objective.vf_coef": 0}, "objective.vf_coef must be positive, got 0"),
        ({"objective.advantage": "rloo"}, "objective.advantage must be gae with objective ppo"),
        ({"objective.scale_rewards": "group"}, "objective.scale_rewards belongs to advantage group"),
        ({"objective.cliprange": 0.2}, "here it is objective.epsilon"),
        ({"critic.optimizer": {"lr": 0}}, "critic.optimizer.lr must be positive, got 0"),
        ({"critic.lr": 1e-5}, "unknown configuration key 'critic.lr'"),
        ({"critic.optimizer": {"lrr": 1}}, "unknown configuration key 'critic.optimizer.lrr'"),
        ({"objective.name": "rloo", "critic.path": "x"}, "objective rloo has no critic"),
        (
            {"objective.name": "sft", "rollout.engine": "transformers", "critic.optimizer": {"lr": 2e-5}},
            "objective sft has no critic",
        ),
        (
            {"objective.name": "grpo", "objective.advantage": "gae"},
            "needs a critic, which objective.name ppo trains",
        ),
        ({"objective.name": "grpo", "objective.vf_coef": 0.1}, "objective.name ppo"),
    ],
)
def test_refused(changes, line):
    with pytest.raises(InputError, match=line):
        load_config(RUN, changes)
