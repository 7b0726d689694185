"""Law 13: every option of grpo and rloo changes the loss of a step on rollouts, or is refused; the KL too.

Shapes: C completions of G prompts, N tokens of them.
"""

from types import SimpleNamespace

import pytest
import torch

from megatron_align.config.rollout import RolloutConfig
from megatron_align.errors import InputError
from megatron_align.objectives.policy_gradient import GRPO, RLOO, GRPOOptions, RLOOOptions
from megatron_align.objectives.scored_rollouts import ScoredRollouts
from tests.objectives.test_policy_gradient_options import FINE, LENGTH_C, LIMIT, NEEDED, given_of_a_step

UNBUILT = {"gae_lambda"}


def outcome(options, **more):
    """Return loss and gradient of a step on rollouts, as a run computes them."""
    step = given_of_a_step()
    objective = (RLOO if options.name == "rloo" else GRPO)(options)
    objective.rollout = RolloutConfig(max_tokens=LIMIT, **more)
    rollouts = ScoredRollouts(
        reward_C=step["reward_C"],
        scored_C=torch.ones(4, dtype=torch.bool),
        size_G=step["size_G"],
        weight_G=torch.ones(2, dtype=torch.float64),
        minibatch_G=torch.zeros(2, dtype=torch.int64),
        length_C=LENGTH_C,
        truncated_C=step["truncated_C"],
    )
    given = {
        "old_logprobs": step["old_N"] if "old_logprobs" in objective.needs else None,
        "reference_logprobs": step["reference_N"] if "reference_token_logprobs" in objective.needs else None,
    }
    columns = objective.columns(rollouts, *given.values())
    columns |= {name: value for name, value in given.items() if value is not None}
    if "token_entropies" in objective.needs:
        kept_N = step["entropy_N"] >= objective.entropy_bound(step["entropy_N"][columns["shares"] > 0])
        columns["entropy_shares"] = kept_N / kept_N.sum()
    columns["engine_logprobs"] = step["old_N"] + 0.1 * step["reference_N"]
    rows = SimpleNamespace(
        columns=columns,
        completions=SimpleNamespace(rows_C=LENGTH_C, columns={"scored": torch.ones(4, dtype=torch.float64)}),
    )
    found = []
    for far in (1, -1, 30):  # so far from the old policy that each bound is passed
        policy_N = (step["old_N"] + far * (step["policy_N"] - step["old_N"])).requires_grad_()
        loss, _ = objective.loss(policy_N, rows, {"entropy": step["entropy_N"]})
        found.append((loss.item(), torch.autograd.grad(loss, policy_N)[0].tolist()))
    return found


def options(**given):
    return GRPOOptions(**{"iterations": 2, **given})


@pytest.mark.parametrize("given", FINE)
@pytest.mark.parametrize("iterations", [1, 2])
def test_every_option_changes_the_loss(given, iterations):
    """With old log-probs of a pass of their own, and with those of the loss itself."""
    if given.get("advantage") == "gae":
        pytest.skip("it needs a critic: refused")
    given = {name: value for name, value in given.items() if name not in UNBUILT} | {"iterations": iterations}
    on_policy = {"epsilon", "epsilon_high", "delta", "log_ratio_bound", "sequence_ratio", "loss_type"}
    on_policy |= {"off_policy_mask_threshold", "importance_sampling_level", "use_bias_correction_kl"}
    on_policy |= {name for name in given if name.startswith(("sapo", "vespo"))}
    for name in given:
        if name == "iterations" or (iterations == 1 and name in on_policy):
            continue  # all ratios are 1
        if name in NEEDED:
            needs = {"beta": 0.01} if name == "kl_in" else {}
            pair = (
                options(**needs, iterations=iterations, **{name: given[name]}),
                options(**needs, iterations=iterations),
            )
        else:
            pair = options(**given), options(**{key: value for key, value in given.items() if key != name})
        assert outcome(pair[0]) != outcome(pair[1]), name


@pytest.mark.parametrize("place", ["loss", "token_reward", "sequence_reward"])
@pytest.mark.parametrize("advantage", ["group", "rloo", "opo", "reinforce", "reinforce_baseline"])
@pytest.mark.parametrize("iterations", [1, 2])
def test_a_kl_penalty_is_applied_wherever_it_is_put(place, advantage, iterations):
    given = {"advantage": advantage, "iterations": iterations}
    without = outcome(options(**given))
    small = outcome(options(**given, beta=0.1, kl_in=place))
    large = outcome(options(**given, beta=0.3, kl_in=place))
    assert len({each[0][0] for each in (without, small, large)}) == 3


def test_the_engines_correction_changes_the_loss():
    assert outcome(options()) != outcome(options(), correction=None)
    assert outcome(RLOOOptions()) != outcome(RLOOOptions(), correction=None)


@pytest.mark.parametrize(
    "given, line",
    [({"advantage": "gae"}, "needs a critic, which objective.name ppo trains; got gae with grpo")],
)
def test_what_a_run_cannot_do_is_refused(given, line):
    with pytest.raises(InputError, match=line):
        GRPO(options(**given))


@pytest.mark.parametrize("loss_type", ["bnpo", "grpo"])
def test_on_policy_distillation_is_the_reverse_kl_of_each_token(loss_type):
    """The documented options: a token's gradient is its own log-ratio to the teacher, whatever comes after it."""
    step = given_of_a_step()
    objective = GRPO(
        GRPOOptions(
            loss_type=loss_type,
            advantage="reinforce",
            normalize_advantages=False,
            beta=1.0,
            kl_in="token_reward",
            gamma=0.0,
        )
    )
    rollouts = ScoredRollouts(
        reward_C=torch.zeros(4, dtype=torch.float64),
        scored_C=torch.ones(4, dtype=torch.bool),
        size_G=step["size_G"],
        weight_G=torch.ones(2, dtype=torch.float64),
        minibatch_G=torch.zeros(2, dtype=torch.int64),
        length_C=LENGTH_C,
        truncated_C=step["truncated_C"],
    )
    columns = objective.columns(rollouts, step["old_N"], step["reference_N"])
    torch.testing.assert_close(columns["advantages"], step["reference_N"] - step["old_N"])
    columns |= {"old_logprobs": step["old_N"], "reference_logprobs": step["reference_N"]}
    rows = SimpleNamespace(
        columns=columns,
        completions=SimpleNamespace(rows_C=LENGTH_C, columns={"scored": torch.ones(4, dtype=torch.float64)}),
    )
    policy_N = step["old_N"].clone().requires_grad_()
    loss, _ = objective.loss(policy_N, rows, {"entropy": step["entropy_N"]})
    [gradient_N] = torch.autograd.grad(loss, policy_N)
    wanted_N = columns["loss_weights"] * (step["old_N"] - step["reference_N"])
    torch.testing.assert_close(gradient_N, wanted_N)
