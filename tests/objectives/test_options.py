"""The options of an objective are those its losses take, no more; one that does not apply is refused, never ignored."""

from typing import get_args, get_type_hints

import pytest

from megatron_align.errors import InputError
from megatron_align.losses.divergences import DIVERGENCES
from megatron_align.losses.dpo import DPO_LOSSES
from megatron_align.losses.kto_bco import UNPAIRED_LOSSES
from megatron_align.losses.reference_free import CPO_LOSSES, TPO_LOSSES
from megatron_align.objectives.dpo import DPO_OPTIONS, DPOOptions
from megatron_align.objectives.kto_bco import KTOOptions
from megatron_align.objectives.reference_free import CPOOptions, TPOOptions
from megatron_align.objectives.registry import OBJECTIVES, build_objective
from megatron_align.objectives.reward import RewardOptions
from tests.losses.draw import pair

VALUES = {
    "label_smoothing": 0.1,
    "f_divergence_type": "js_divergence",
    "discopop_tau": 0.1,
    "margin_scale": 2.0,
    "simpo_gamma": 0.3,
    "alpha": 0.2,
    "tpo_l_gamma": 0.3,
}
TYPES = [(DPOOptions, name, DPO_OPTIONS[name]) for name in DPO_OPTIONS]
TYPES += [(CPOOptions, name, loss.options) for name, loss in CPO_LOSSES.items()]
TYPES += [(TPOOptions, name, loss.options) for name, loss in TPO_LOSSES.items()]


@pytest.mark.parametrize("kind, name, options", TYPES, ids=[f"{k.name}-{n}" for k, n, _ in TYPES])
def test_every_loss_type_takes_its_options_and_no_others(kind, name, options):
    build_objective(kind(loss_type=name, **{option: VALUES[option] for option in options}))
    fields = kind.__dataclass_fields__
    for other in VALUES.keys() & fields.keys() - set(options):
        with pytest.raises(InputError, match=other):
            kind(loss_type=name, **{other: VALUES[other]})


@pytest.mark.parametrize("losses", [DPO_LOSSES, CPO_LOSSES, TPO_LOSSES], ids=["dpo", "cpo", "tpo"])
def test_every_loss_reads_each_option_that_it_lists(losses):
    """At another value of the option the loss is another; a name that the function lacks is a TypeError."""
    chosen, rejected = pair()
    values = {**VALUES, "divergence": DIVERGENCES["js_divergence"], "beta": 0.7}
    for name, loss in losses.items():
        statistics = {"margin_N": chosen.length_N} if loss.reads_margin else {}
        plain = loss(chosen, rejected, beta=0.3, **statistics)
        for option in ("beta", *loss.options):
            changed = loss(chosen, rejected, **{"beta": 0.3, option: values[option]}, **statistics)
            assert not changed.equal(plain), (name, option)


def test_every_loss_of_single_responses_is_an_objective():
    assert {*get_args(get_type_hints(KTOOptions)["loss_type"]), "bco"} == set(UNPAIRED_LOSSES)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_loss_has_the_divergence_that_is_named(name):
    chosen, rejected = pair()
    built = build_objective(DPOOptions(f_divergence_type=name, beta=0.3)).losses(chosen, rejected)
    for other, divergence in DIVERGENCES.items():
        loss = DPO_LOSSES["sigmoid"](chosen, rejected, beta=0.3, divergence=divergence)
        assert built.equal(loss) == (other == name)


REFUSED = {
    "another loss's option": (DPOOptions, {"loss_type": "hinge", "label_smoothing": 0.1}, "belongs to loss_type"),
    "unknown loss": (DPOOptions, {"loss_type": "sigmod"}, "got 'sigmod'; did you mean 'sigmoid'"),
    "unknown loss of a list": (DPOOptions, {"loss_type": ["sft", "ippo"]}, "got 'ippo'; did you mean 'ipo'"),
    "no loss": (DPOOptions, {"loss_type": []}, "at least one loss type"),
    "weights": (DPOOptions, {"loss_type": ["sft", "ipo"], "loss_weights": [1.0]}, "one for each of 2 loss types"),
    "beta": (DPOOptions, {"beta": 0.0}, "beta must be positive, got 0.0"),
    "NaN beta": (KTOOptions, {"beta": float("nan")}, "beta must be positive, got nan"),
    "smoothing": (DPOOptions, {"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\)"),
    "alpha of no divergence": (DPOOptions, {"f_alpha_divergence_coef": 0.3}, "belongs to f_div"),
    "divergence of some": (DPOOptions, {"loss_type": ["apo_zero", "ipo"], "f_divergence_type": "forward_kl"}, "none"),
    "weighting a mixture": (DPOOptions, {"loss_type": "aot", "use_weighting": True}, "and aot mixes"),
    "margins in a mixture": (DPOOptions, {"loss_type": ["aot", "margin"]}, "reads a margin for each pair, and aot"),
    "likelihood twice": (DPOOptions, {"loss_type": ["ipo", "sft"], "rpo_alpha": 1.0}, "stands for loss_type sft"),
    "LD alpha": (DPOOptions, {"ld_alpha": 1.5}, r"ld_alpha must be in \[0, 1\]"),
    "likelihood of alphapo": (CPOOptions, {"loss_type": "alphapo", "cpo_alpha": 1.0}, "alphapo has no likelihood term"),
    "gamma of a sum": (CPOOptions, {"simpo_gamma": 1.0}, "simpo_gamma belongs to loss_type simpo, alphapo"),
    "gamma of TPO's sum": (TPOOptions, {"tpo_l_gamma": 1.0}, "tpo_l_gamma belongs to loss_type tpo-l"),
    "no gold": (TPOOptions, {"tpo_alpha": 0.0}, "tpo_alpha must be positive .*use objective cpo"),
    "scores that nobody reads": (RewardOptions, {"score_normalization": "range"}, "scores that alpha > 0 reads"),
    "negative alpha": (RewardOptions, {"alpha": -1.0}, "alpha must not be negative"),
}  # fmt: skip


@pytest.mark.parametrize("kind, options, need", REFUSED.values(), ids=list(REFUSED))
def test_what_does_not_apply_is_refused(kind, options, need):
    with pytest.raises(InputError, match=need):
        kind(**options)


def test_every_objective_names_itself():
    assert {name: kind.Options().name for name, kind in OBJECTIVES.items()} == {
        name: name for name in OBJECTIVES
    }
