"""Options of policy gradients have TRL's defaults, and one that would have no effect is refused (law 13)."""

from dataclasses import fields

import pytest

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
    {"loss_type": "cispo", "epsilon_high": 5.0, "epsilon": 0.5},
    {"beta": 0.01, "kl_in": "token_reward", "gamma": 0.99},
    {"beta": 0.01, "kl_estimator": "k1"},
    {"beta": 0.01, "use_bias_correction_kl": False, "correct_kl": True},
    {"loss_type": "vespo", "vespo_k_pos": 1.0},
    {"delta": 4.0, "log_ratio_bound": 20.0},
    ALONE,
]


@pytest.mark.parametrize("given", FINE)
def test_what_is_given_reaches_the_loss_or_the_estimator(given):
    """Each option changes what is built: none is ignored."""
    built = options(**given)
    for name in given:
        if name == "max_completion_length":
            continue  # read by the caller of token_weights
        without = {key: value for key, value in given.items() if key != name}
        if name in ("beta", "loss_type", "importance_sampling_level", "kl_in", "advantage"):
            continue  # the others need it
        other = options(**without)
        assert (built.policy_gradient(), built.advantage_estimator()) != (
            other.policy_gradient(),
            other.advantage_estimator(),
        ), name


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
    ({"off_policy_mask_threshold": 0.0}, "off_policy_mask_threshold must be positive"),
    ({"advantage": "rloo", "scale_rewards": "group"}, "scale_rewards belongs to advantage group"),
    ({"advantage": "rloo", "std_eps": 1e-6}, "std_eps belongs to advantages that a deviation divides"),
    ({"scale_rewards": "none", "unbiased_std": False}, "unbiased_std belongs to"),
    ({"gamma": 0.9}, "gamma belongs to advantage reinforce or gae, or kl_in token_reward"),
    ({"advantage": "gae", "gamma": 1.1}, "gamma must be in"),
    ({"gae_lambda": 0.9}, "gae_lambda belongs to advantage gae"),
    ({"std_eps": -1.0}, "std_eps must not be negative"),
    ({"reward_clip_range": [1.0, -1.0]}, "the smaller first"),
    ({"overlong_factor": 1.0}, "overlong_factor belongs to an overlong_buffer"),
    ({"overlong_buffer": 0}, "overlong_buffer must be positive"),
]


@pytest.mark.parametrize("given, message", REFUSED)
def test_options_without_effect_and_out_of_range_are_refused(given, message):
    with pytest.raises(InputError, match=message):
        options(**given)
