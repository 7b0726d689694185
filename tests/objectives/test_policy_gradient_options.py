"""Options of policy gradients have TRL's defaults and an effect each, and one that would have none is refused (law 13).

Shapes: C completions of G prompts, N tokens of them.
"""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from megatron_align.errors import InputError
from megatron_align.losses.advantage_estimator import AdvantageEstimator
from megatron_align.losses.policy_gradient import POLICY_LOSSES, PolicyGradient
from megatron_align.objectives.policy_gradient_options import PolicyGradientOptions


def options(**given):
    return PolicyGradientOptions(name="grpo", **given)


def test_defaults_build_the_library_defaults():
    assert options().policy_gradient() == PolicyGradient()
    assert options().advantage_estimator() == AdvantageEstimator()


def test_defaults_are_those_of_trl():
    trl = pytest.importorskip("trl")
    from tests.losses.policy_judge import defaults

    theirs = defaults(trl.GRPOConfig)
    stand_for_null = {"epsilon": 0.2, "max_completion_length": 512, "use_bias_correction_kl": True}
    stand_for_null |= {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05, "scale_rewards": "group"}
    stand_for_null |= {
        "vespo_k_pos": 2.0,
        "vespo_lambda_pos": 3.0,
        "vespo_k_neg": 3.0,
        "vespo_lambda_neg": 2.0,
    }
    shared = [field.name for field in fields(PolicyGradientOptions) if field.name in theirs]
    assert len(shared) > 15
    for name in shared:
        ours = getattr(options(), name)
        assert theirs[name] == (stand_for_null.get(name) if ours is None else ours), name
    # what null stands for is written in the functions
    of_functions = {
        name: value for name, value in stand_for_null.items() if name.startswith(("sapo", "vespo"))
    }
    vespo = POLICY_LOSSES["vespo"].function.__kwdefaults__
    sapo = POLICY_LOSSES["sapo"].function.__kwdefaults__
    assert vespo | sapo == of_functions


ALONE = {"advantage": "gae", "gamma": 0.9, "gae_lambda": 0.9, "std_eps": 1e-8, "unbiased_std": False}
FINE = [
    {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
    {
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "sequence_ratio": "sum",
        "advantage": "rloo",
    },
    {"loss_type": "dr_grpo", "max_completion_length": 1024, "scale_rewards": "none"},
    {"loss_type": "cispo", "epsilon_high": 5.0, "epsilon": 0.9},
    {"beta": 0.01, "kl_in": "token_reward", "gamma": 0.99},
    {"beta": 0.01, "kl_estimator": "k1"},
    {"beta": 0.01, "use_bias_correction_kl": False, "correct_kl": True},
    {"loss_type": "vespo", "vespo_k_pos": 1.0, "vespo_lambda_pos": 2.0},
    {"loss_type": "vespo", "vespo_k_neg": 2.0, "vespo_lambda_neg": 3.0},
    {"loss_type": "sapo", "sapo_temperature_pos": 0.5, "sapo_temperature_neg": 0.8},
    {"delta": 4.0, "log_ratio_bound": 20.0, "off_policy_mask_threshold": 0.01},
    {"mask_truncated_completions": True, "top_entropy_quantile": 0.5},
    {"entropy_coef": 0.1, "top_entropy_quantile": 0.5},
    {"truncated_in_baseline": False},
    {"overlong_buffer": 2, "overlong_factor": 2.0, "scale_rewards": "none"},
    {"reward_clip_range": [0.0, 1.0], "scale_rewards": "batch"},
    {"advantage": "reinforce", "normalize_advantages": False, "gamma": 0.5},
    ALONE,
]
# options that others need: their own effect is seen alone
NEEDED = {"beta", "loss_type", "importance_sampling_level", "kl_in", "advantage", "overlong_buffer"}

LENGTH_C = torch.tensor([2, 4, 3, 1])
N, LIMIT = 10, 4


def given_of_a_step():
    """What the documented example reads: two prompts with two answers each, the second answer was cut off."""
    draws = iter(torch.randn(7, N, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    old_N, entropy_N = -2 + next(draws), next(draws).abs()
    return {
        "reward_C": torch.tensor([1.0, 0.0, 3.0, -1.0], dtype=torch.float64),
        "size_G": torch.tensor([2, 2]),
        "length_C": LENGTH_C,
        "truncated_C": torch.tensor([False, True, False, False]),
        "limit": LIMIT,
        "old_N": old_N,
        "policy_N": old_N + next(draws),
        "reference_N": old_N + next(draws),
        "value_N": next(draws),
        "correction_N": next(draws).abs(),
        "entropy_N": entropy_N,
        "entropy_S": entropy_N,
        "completions": 4,
        "step_tokens": N,
        "kept_tokens": N,
    }


def documented_step(chosen, **other):
    """Run the example of docs/online.md with these options, and return its variables."""
    page = Path(__file__).parents[2] / "docs" / "online.md"
    examples = re.findall(r"```python\n(.+?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    (example,) = (each for each in examples if "options = " in each)
    example, replaced = re.subn(r"(?m)^options = .+$", "options = chosen", example)
    assert replaced == 1
    scope = {"chosen": chosen, **given_of_a_step(), **other}
    exec(compile(example, page.name, "exec"), scope)
    return scope


def outcome(chosen):
    """Return what is built and what the example computes, as something that compares."""
    step = documented_step(chosen)
    values = [step[name].tolist() for name in ("advantage_N", "weight_N")]
    found = step["terms"].loss_N.tolist(), step["loss"].item()
    return chosen.policy_gradient(), chosen.advantage_estimator(), values, found


@pytest.mark.parametrize("given", FINE)
def test_what_is_given_reaches_the_loss_or_the_estimator(given):
    """Each option changes what is built or computed: none is ignored."""
    for name in given:
        if name in NEEDED:
            needs = {"beta": 0.01} if name == "kl_in" else {}
            pair = options(**needs, **{name: given[name]}), options(**needs)
        else:
            pair = options(**given), options(**{key: value for key, value in given.items() if key != name})
        assert outcome(pair[0]) != outcome(pair[1]), name


def test_every_option_is_among_those_whose_effect_is_seen():
    # Which steps train on rollouts: tests/training/test_online_layout.py; ptx is a loss of its own: test_ptx.py there
    of_all = {field.name for field in fields(PolicyGradientOptions)} - {
        "name",
        "iterations",
        "minibatches",
        "ptx",
    }
    assert {name for given in FINE for name in given} == of_all


@pytest.mark.parametrize("loss_type", POLICY_LOSSES)
def test_the_documented_example_runs_with_every_loss_type(loss_type):
    """And where nothing uses them, reference, critic and correction may be absent."""
    absent = {"reference_N": None, "value_N": None, "correction_N": None}
    assert documented_step(options(loss_type=loss_type), **absent)["loss"].isfinite()


def test_dr_grpo_divides_by_the_limit_of_generation_or_the_number_given():
    for given, divisor in ({}, LIMIT), ({"max_completion_length": 8}, 8):
        step = documented_step(options(loss_type="dr_grpo", **given))
        assert_close(step["weight_N"], torch.full((N,), 1 / 4 / divisor, dtype=torch.float64))


def test_truncated_and_overlong_answers():
    """The second answer, cut off at the limit: penalised, out of the other's baseline, and out of the loss."""
    chosen = {"overlong_buffer": 2, "overlong_factor": 2.0, "scale_rewards": "none"}
    step = documented_step(options(**chosen))
    assert step["groups"].reward_C.tolist() == [1, -2, 2, -1]  # lengths 2, 4, 3 and 1 of 4
    alone = documented_step(options(truncated_in_baseline=False, **chosen))
    assert alone["advantage_N"].tolist() == [0, 0, -3, -3, -3, -3, 1.5, 1.5, 1.5, -1.5]
    masked = documented_step(options(mask_truncated_completions=True, **chosen))
    assert (masked["terms"].loss_N == 0).tolist() == [False] * 2 + [True] * 4 + [False] * 4


def test_the_tokens_of_highest_entropy_keep_their_loss():
    step = documented_step(options(top_entropy_quantile=0.3))
    highest = set(step["entropy_N"].argsort(descending=True)[:3].tolist())
    assert set(step["terms"].loss_N.nonzero().flatten().tolist()) == highest


def test_a_mask_of_tokens_is_kept():
    mask_N = torch.arange(N) > 0
    truncated_C = given_of_a_step()["truncated_C"]
    assert options().loss_mask(truncated_C, LENGTH_C, mask_N) is mask_N
    both_N = options(mask_truncated_completions=True).loss_mask(truncated_C, LENGTH_C, mask_N)
    assert both_N.tolist() == [False, True, *[False] * 4, *[True] * 4]


REFUSED = [
    ({"loss_type": "ppo"}, "loss_type must be one of"),
    ({"kl_estimator": "k3"}, "kl_estimator belongs to a KL penalty, beta above 0; got k3"),
    ({"kl_in": "token_reward"}, "kl_in belongs to a KL penalty"),
    ({"use_bias_correction_kl": True}, "use_bias_correction_kl belongs to a KL penalty"),
    ({"beta": 0.1, "kl_in": "token_reward", "use_bias_correction_kl": True}, "belongs to kl_in loss"),
    ({"beta": 0.1, "kl_in": "sequence_reward", "correct_kl": True}, "belongs to kl_in loss"),
    ({"beta": 0.1, "kl_estimator": "k1", "use_bias_correction_kl": False}, "gradient is 0 in expectation"),
    ({"beta": -0.1}, "beta must not be negative"),
    ({"beta": float("nan")}, "beta must not be negative"),
    ({"loss_type": "sapo", "epsilon": 0.2}, "epsilon belongs to loss_type grpo"),
    ({"loss_type": "cispo", "delta": 2.0}, "delta belongs to loss_type grpo"),
    ({"sapo_temperature_pos": 1.0}, "sapo_temperature_pos belongs to loss_type sapo"),
    ({"epsilon": 0.0}, "epsilon must be positive"),
    ({"epsilon": 1.5}, "epsilon must be below 1"),
    ({"delta": 1.2}, "delta must be above 1 \\+ epsilon_high = 1.2"),
    ({"epsilon_high": 0.5, "delta": 1.3}, "delta must be above 1 \\+ epsilon_high = 1.5"),
    ({"sequence_ratio": "mean"}, "sequence_ratio belongs to level sequence"),
    ({"loss_type": "vespo", "importance_sampling_level": "sequence"}, "must be token with loss_type vespo"),
    ({"loss_type": "vespo", "log_ratio_bound": 20.0}, "log_ratio_bound belongs to"),
    ({"max_completion_length": 512}, "max_completion_length belongs to loss_type dr_grpo"),
    ({"top_entropy_quantile": 0.0}, "top_entropy_quantile must be in"),
    ({"entropy_coef": float("nan")}, "entropy_coef must be a number"),
    ({"off_policy_mask_threshold": 0.0}, "off_policy_mask_threshold must be positive"),
    ({"advantage": "rloo", "scale_rewards": "group"}, "scale_rewards belongs to advantage group"),
    ({"advantage": "rloo", "std_eps": 1e-6}, "std_eps belongs to advantages that a deviation divides"),
    ({"scale_rewards": "none", "unbiased_std": False}, "unbiased_std belongs to"),
    ({"gamma": 0.9}, "gamma belongs to advantage reinforce or gae, or kl_in token_reward"),
    ({"advantage": "gae", "gamma": 1.1}, "gamma must be in"),
    ({"gae_lambda": 0.9}, "gae_lambda belongs to advantage gae"),
    ({"std_eps": -1.0}, "std_eps must not be negative"),
    ({"reward_clip_range": [1.0, -1.0]}, "the smaller first"),
    ({"loss_type": "cispo", "epsilon": 0.2}, "above the smallest, 1 - epsilon = 0.8; got none, which is 0.2"),
    ({"loss_type": "cispo", "epsilon": 0.5, "epsilon_high": 0.5}, "1 - epsilon = 0.5; got 0.5"),
    ({"advantage": "gae", "truncated_in_baseline": False}, "truncated_in_baseline false belongs to adv"),
    ({"overlong_factor": 1.0}, "overlong_factor belongs to an overlong_buffer"),
    ({"overlong_buffer": 0}, "overlong_buffer must be positive"),
]


@pytest.mark.parametrize("given, message", REFUSED)
def test_options_without_effect_and_out_of_range_are_refused(given, message):
    with pytest.raises(InputError, match=message):
        options(**given)
