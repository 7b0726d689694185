"""Law 3, the DPO objective: value and gradient equal TRL's own ``DPOTrainer`` code for every loss type and option."""

import ast
import inspect
from types import SimpleNamespace

import pytest
import torch

trl = pytest.importorskip("trl")

from megatron_align.losses.divergences import DIVERGENCES
from megatron_align.losses.dpo import DPO_LOSSES
from megatron_align.objectives.dpo import DPO_OPTIONS, DPOOptions
from tests.objectives.trl_judge import Bigram, bare, cat, our_loss, same_prompts

OURS_ONLY = {"margin", "reward_aware"}
TRLS = sorted(set(DPO_OPTIONS) - OURS_ONLY)
COUPLED = {name for name, loss in DPO_LOSSES.items() if loss.batch_coupled}
FOLLOWING = [name for name in TRLS if "f_divergence_type" in DPO_OPTIONS[name]]
OPTIONS = {"beta": 0.4}  # so that some margins pass the hinge
OPTIONS_OF = {
    "exo_pair": {"label_smoothing": 0.01},
    "robust": {"label_smoothing": 0.2},
    "aot": {"label_smoothing": 0.1},
    "aot_unpaired": {"label_smoothing": 0.1},
    "discopop": {"discopop_tau": 0.3},
}
SIDES = same_prompts(3, 4)
# TRL multiplies the loss by the weights in place, which autograd refuses for an expanded tensor and for a relu's.
WPO_BROKEN = {"sft", "hinge"}


def judged(policy, reference, loss_types, weights=None, **options):
    """Return TRL's loss; options under TRL's names."""
    settings = {
        "beta": 0.1,
        "label_smoothing": 0.0,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "ld_alpha": None,
        "use_weighting": False,
        "discopop_tau": 0.05,
    } | options
    trainer = bare(
        trl.DPOTrainer,
        model=policy,
        ref_model=reference,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=settings["discopop_tau"]),
        loss_types=loss_types,
        loss_weights=weights or [1.0] * len(loss_types),
        **settings,
    )
    torch.set_default_dtype(torch.float64)  # EXO's label smoothing becomes a tensor of the default dtype
    try:
        return trainer._compute_loss(policy, cat(*SIDES), return_outputs=False)
    finally:
        torch.set_default_dtype(torch.float32)


def assert_equals_trl(models, loss_types, weights=None, rtol=1e-12, **options):
    """Compare the loss and its gradient with TRL's."""
    given = DPOOptions(loss_type=loss_types, loss_weights=weights, **options)
    ours, theirs = our_loss(given, SIDES, *models), judged(*models, loss_types, weights, **options)
    grads = [torch.autograd.grad(loss, models[0].table_VV)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(ours.to(theirs.dtype), theirs, rtol=rtol, atol=rtol)
    torch.testing.assert_close(*grads, rtol=rtol, atol=rtol)


@pytest.fixture
def models():
    return Bigram(1), Bigram(2)


def options_of(name):
    return OPTIONS | OPTIONS_OF.get(name, {})


def test_we_have_every_loss_type_of_trl(models):
    with pytest.raises(ValueError, match="Unknown loss type") as caught:
        judged(*models, ["nonsense"])
    names = ast.literal_eval("[" + str(caught.value).split("[")[1])
    assert sorted(names) == TRLS


@pytest.mark.parametrize("name", TRLS)
def test_equals_trl(models, name):
    assert_equals_trl(models, [name], **options_of(name))


@pytest.mark.parametrize("divergence", sorted(set(DIVERGENCES) - {"alpha_divergence"}))
@pytest.mark.parametrize("name", FOLLOWING)
def test_f_divergences_equal_trl(models, name, divergence):
    assert_equals_trl(models, [name], f_divergence_type=divergence, **options_of(name))


def test_trl_and_we_follow_a_divergence_with_the_same_losses():
    source = inspect.getsource(trl.DPOTrainer.__init__)
    names = source.split("f_divergence_loss_types = {")[1].split("}")[0]
    assert set(ast.literal_eval(f"[{names}]")) == {*FOLLOWING, "sft"}


@pytest.mark.parametrize("alpha", [0.3, 1.0, 2.0])
def test_alpha_divergence_equals_trl(alpha):
    models = Bigram(1, torch.float32), Bigram(2, torch.float32)  # TRL's knows no float64
    options = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": alpha}
    assert_equals_trl(models, ["sigmoid"], rtol=1e-5, **options)  # fp32 on both sides


@pytest.mark.parametrize("ld_alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("name", ["sigmoid", "ipo", "aot"])
def test_length_desensitised_equals_trl(models, name, ld_alpha):
    """Sums of policy and reference both; lengths stay complete."""
    # our factors are fp32
    assert_equals_trl(models, [name], rtol=1e-7, ld_alpha=ld_alpha, **options_of(name))


@pytest.mark.parametrize("name", sorted(set(TRLS) - COUPLED - WPO_BROKEN))
def test_wpo_weights_equal_trl(models, name):
    assert_equals_trl(models, [name], use_weighting=True, **options_of(name))


@pytest.mark.parametrize(
    "names, weights",
    [
        (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]),  # MPO
        (["aot", "sft", "hinge"], [0.5, 2.0, 1.0]),
    ],
)
def test_several_at_once_equal_trl(models, names, weights):
    assert_equals_trl(models, names, weights, **OPTIONS)


def test_rpo_is_the_likelihood_next_to_the_loss(models):
    short, long = (
        our_loss(DPOOptions(**options), SIDES, *models)
        for options in ({"rpo_alpha": 0.7}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]})
    )
    assert short.item() == long.item() != our_loss(DPOOptions(), SIDES, *models).item()
