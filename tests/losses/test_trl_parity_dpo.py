"""Law 3, the DPO family: value and gradient equal TRL's own ``DPOTrainer`` code for every loss type it has."""

import ast
import inspect
from functools import partial
from types import SimpleNamespace

import pytest
import torch

trl = pytest.importorskip("trl")

from megatron_align.losses.combine import parameters
from megatron_align.losses.divergences import DIVERGENCES
from megatron_align.losses.dpo import BATCH_COUPLED, DPO_LOSSES, dpo_losses
from megatron_align.losses.responses import Responses, length_desensitised, wpo_weights
from tests.losses.trl_judge import PAIRS, Bigram, bare, scored, sequences

OURS_ONLY = {"margin", "reward_aware"}
FOLLOWING = sorted(n for n in set(DPO_LOSSES) - OURS_ONLY if "divergence" in parameters(DPO_LOSSES[n]))
OPTIONS = {"beta": 0.4}  # so that some margins pass the hinge
OPTIONS_OF = {
    "exo_pair": {"label_smoothing": 0.01},
    "robust": {"label_smoothing": 0.2},
    "aot": {"label_smoothing": 0.1},
    "aot_unpaired": {"label_smoothing": 0.1},
    "discopop": {"discopop_tau": 0.3},
}
# TRL multiplies the loss by the weights in place, which autograd refuses for an expanded tensor and for a relu's.
WPO_BROKEN = {"sft", "hinge"}


def judged(policy, reference, batch, loss_types, weights=None, **options):
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
        return trainer._compute_loss(policy, batch, return_outputs=False)
    finally:
        torch.set_default_dtype(torch.float32)


def halves(policy, reference, batch, ld_alpha=None):
    """Return what our engine would hand to the losses: chosen and rejected responses."""
    (policy_tokens, mask), (reference_tokens, _) = scored(policy, batch), scored(reference, batch)
    length = mask.sum(1)
    shared = torch.minimum(*length.chunk(2)).repeat(2)[:, None]
    early = mask.cumsum(1) <= shared

    def total(tokens):
        if ld_alpha is None:
            return tokens.sum(1)
        return length_desensitised((tokens * early).sum(1), (tokens * ~early).sum(1), ld_alpha=ld_alpha)

    columns = [total(policy_tokens), length, total(reference_tokens).detach()]
    return [Responses(*side) for side in zip(*(c.chunk(2) for c in columns), strict=True)]


def assert_equal(ours, theirs, policy, rtol=1e-12):
    grads = [torch.autograd.grad(loss, policy.table_VV)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol)
    torch.testing.assert_close(*grads, rtol=rtol, atol=rtol)


@pytest.fixture
def models():
    return Bigram(1), Bigram(2)


BATCH = sequences(2 * PAIRS, seed=3)
CHOSEN_TOKENS = BATCH["completion_mask"][:PAIRS].sum().item()


def ours(models, loss_types, weights=None, options=None, ld_alpha=None):
    loss = dpo_losses(loss_types, weights, options)
    statistics = {"mean_length": CHOSEN_TOKENS / PAIRS} if "sft" in loss_types else {}
    return loss(*halves(*models, BATCH, ld_alpha), **statistics)


def options_of(name):
    common = OPTIONS if "beta" in parameters(DPO_LOSSES[name]) else {}
    return common | OPTIONS_OF.get(name, {})


def test_we_have_every_loss_type_of_trl(models):
    with pytest.raises(ValueError, match="Unknown loss type") as caught:
        judged(*models, BATCH, ["nonsense"])
    names = ast.literal_eval("[" + str(caught.value).split("[")[1])
    assert set(names) == set(DPO_LOSSES) - OURS_ONLY


@pytest.mark.parametrize("name", sorted(set(DPO_LOSSES) - OURS_ONLY))
def test_equals_trl(models, name):
    options = options_of(name)
    assert_equal(
        ours(models, [name], options=options).mean(), judged(*models, BATCH, [name], **options), models[0]
    )


@pytest.mark.parametrize("divergence", sorted(set(DIVERGENCES) - {"alpha_divergence"}))
@pytest.mark.parametrize("name", FOLLOWING)
def test_f_divergences_equal_trl(models, name, divergence):
    options = options_of(name)
    got = ours(models, [name], options=options | {"divergence": DIVERGENCES[divergence]})
    assert_equal(
        got.mean(), judged(*models, BATCH, [name], f_divergence_type=divergence, **options), models[0]
    )


def test_trl_and_we_follow_a_divergence_with_the_same_losses():
    source = inspect.getsource(trl.DPOTrainer.__init__)
    names = source.split("f_divergence_loss_types = {")[1].split("}")[0]
    assert set(ast.literal_eval(f"[{names}]")) == {*FOLLOWING, "sft"}


@pytest.mark.parametrize("alpha", [0.3, 1.0, 2.0])
def test_alpha_divergence_equals_trl(alpha):
    models = Bigram(1, torch.float32), Bigram(2, torch.float32)  # TRL's knows no float64
    got = ours(
        models, ["sigmoid"], options={"divergence": partial(DIVERGENCES["alpha_divergence"], alpha=alpha)}
    )
    want = judged(
        *models, BATCH, ["sigmoid"], f_divergence_type="alpha_divergence", f_alpha_divergence_coef=alpha
    )
    assert_equal(got.mean(), want, models[0], rtol=1e-5)  # fp32 on both sides


@pytest.mark.parametrize("ld_alpha", [0.0, 0.4, 1.0])
def test_length_desensitised_equals_trl(models, ld_alpha):
    got = ours(models, ["sigmoid"], options=OPTIONS, ld_alpha=ld_alpha)
    assert_equal(got.mean(), judged(*models, BATCH, ["sigmoid"], ld_alpha=ld_alpha, **OPTIONS), models[0])


@pytest.mark.parametrize("name", sorted(set(DPO_LOSSES) - OURS_ONLY - BATCH_COUPLED - WPO_BROKEN))
def test_wpo_weights_equal_trl(models, name):
    policy_tokens, mask = scored(models[0], BATCH)
    squares = models[0].table_VV[BATCH["input_ids"][:, :-1]].log_softmax(-1).mul(2).logsumexp(-1)
    weights = wpo_weights(policy_tokens.sum(1), (squares * mask).sum(1), mask.sum(1))
    assert not weights.requires_grad
    chosen, rejected = weights.chunk(2)
    options = options_of(name)
    got = (ours(models, [name], options=options) * chosen * rejected).mean()
    assert_equal(got, judged(*models, BATCH, [name], use_weighting=True, **options), models[0])


def test_several_at_once_equal_trl(models):
    names, weights = ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]  # MPO
    got = ours(models, names, weights, OPTIONS)
    assert_equal(got.mean(), judged(*models, BATCH, names, weights, **OPTIONS), models[0])
