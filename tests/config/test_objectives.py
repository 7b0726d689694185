"""The options of an objective are those its losses take, no more; one that does not apply is refused, never ignored."""

import pytest

from megatron_align.config.objectives import (
    COUPLED,
    CPO_OPTIONS,
    DPO_OPTIONS,
    OBJECTIVES,
    TPO_OPTIONS,
    CPOConfig,
    DPOConfig,
    KTOConfig,
    RewardConfig,
    TPOConfig,
)
from megatron_align.errors import InputError
from megatron_align.losses.combine import parameters
from megatron_align.losses.divergences import DIVERGENCES
from megatron_align.losses.dpo import BATCH_COUPLED, DPO_LOSSES
from megatron_align.losses.reference_free import CPO_LOSSES, TPO_LOSSES
from megatron_align.losses.unpaired import UNPAIRED_LOSSES
from megatron_align.objectives.registry import build_objective

# How the losses call what the configuration calls otherwise; statistics are no options.
NAMES = {"divergence": "f_divergence_type", "margin_N": "margin_scale"}
STATISTICS = {"mean_length", "delta"}


def options_of(loss):
    return {NAMES.get(name, name) for name in parameters(loss) - STATISTICS - {"beta"}}


def test_every_loss_has_its_options_and_no_others():
    assert {name: options_of(loss) for name, loss in DPO_LOSSES.items()} == {
        name: set(options) for name, options in DPO_OPTIONS.items()
    }
    assert {name: options_of(loss) for name, loss in CPO_LOSSES.items()} == {
        name: set(options) for name, options in CPO_OPTIONS.items()
    }
    # the same functions as CPO's, but AlphaPO's reward is CPO's alone
    assert {name: options_of(loss) - {"alpha"} for name, loss in TPO_LOSSES.items()} == {
        name: set(options) for name, options in TPO_OPTIONS.items()
    }
    assert set(COUPLED) == BATCH_COUPLED
    assert {"kto", "apo_zero_unpaired", "bco"} == set(UNPAIRED_LOSSES)


@pytest.mark.parametrize("name", DPO_OPTIONS)
def test_every_loss_type_builds_with_its_options(name):
    values = {
        "label_smoothing": 0.1,
        "f_divergence_type": "js_divergence",
        "discopop_tau": 0.1,
        "margin_scale": 2.0,
    }
    given = {option: values[option] for option in DPO_OPTIONS[name]}
    assert build_objective(DPOConfig(loss_type=name, **given), None).metrics


@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_divergence_builds(name):
    assert build_objective(DPOConfig(f_divergence_type=name), None).metrics


REFUSED = {
    "another loss's option": (DPOConfig, {"loss_type": "hinge", "label_smoothing": 0.1}, "belongs to loss_type"),
    "unknown loss": (DPOConfig, {"loss_type": "sigmod"}, "got 'sigmod'; did you mean 'sigmoid'"),
    "unknown loss of a list": (DPOConfig, {"loss_type": ["sft", "ippo"]}, "got 'ippo'; did you mean 'ipo'"),
    "no loss": (DPOConfig, {"loss_type": []}, "at least one loss type"),
    "weights": (DPOConfig, {"loss_type": ["sft", "ipo"], "loss_weights": [1.0]}, "one for each of 2 loss types"),
    "beta": (DPOConfig, {"beta": 0.0}, "beta must be positive, got 0.0"),
    "NaN beta": (KTOConfig, {"beta": float("nan")}, "beta must be positive, got nan"),
    "smoothing": (DPOConfig, {"label_smoothing": 0.5}, r"label_smoothing must lie in \[0, 0.5\)"),
    "alpha of no divergence": (DPOConfig, {"f_alpha_divergence_coef": 0.3}, "belongs to f_div"),
    "divergence of some": (DPOConfig, {"loss_type": ["apo_zero", "ipo"], "f_divergence_type": "forward_kl"}, "none"),
    "weighting a mixture": (DPOConfig, {"loss_type": "aot", "use_weighting": True}, "and aot mixes"),
    "margins in a mixture": (DPOConfig, {"loss_type": ["aot", "margin"]}, "reads a margin for each pair, and aot"),
    "likelihood twice": (DPOConfig, {"loss_type": ["ipo", "sft"], "rpo_alpha": 1.0}, "stands for loss_type sft"),
    "LD alpha": (DPOConfig, {"ld_alpha": 1.5}, r"ld_alpha must lie in \[0, 1\]"),
    "likelihood of alphapo": (CPOConfig, {"loss_type": "alphapo", "cpo_alpha": 1.0}, "alphapo has no likelihood term"),
    "gamma of a sum": (CPOConfig, {"simpo_gamma": 1.0}, "simpo_gamma belongs to loss_type simpo, alphapo"),
    "gamma of TPO's sum": (TPOConfig, {"tpo_l_gamma": 1.0}, "tpo_l_gamma belongs to loss_type tpo-l"),
    "no gold": (TPOConfig, {"tpo_alpha": 0.0}, "tpo_alpha must be positive .*it is objective cpo"),
    "scores that nobody reads": (RewardConfig, {"score_normalization": "range"}, "scores that alpha > 0 reads"),
    "negative alpha": (RewardConfig, {"alpha": -1.0}, "alpha must not be negative"),
}  # fmt: skip


@pytest.mark.parametrize("kind, options, need", REFUSED.values(), ids=list(REFUSED))
def test_what_does_not_apply_is_refused(kind, options, need):
    with pytest.raises(InputError, match=need):
        kind(**options)


def test_every_objective_names_itself():
    assert {name: kind().name for name, kind in OBJECTIVES.items()} == {name: name for name in OBJECTIVES}
