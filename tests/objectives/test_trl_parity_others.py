"""Law 3, losses outside the DPO family: value and gradient equal TRL's own KTO, CPO, ORPO, TPO and reward code."""

import inspect
import os
from types import SimpleNamespace

import pytest
import torch

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
trl = pytest.importorskip("trl")

from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.tpo import TPOConfig, TPOTrainer

from megatron_align.losses.divergences import alpha_divergence
from megatron_align.losses.dpo import DPO_LOSSES
from megatron_align.losses.kto_bco import UNPAIRED_LOSSES
from megatron_align.losses.pair_loss import PairLoss
from megatron_align.losses.reference_free import CPO_LOSSES, TPO_LOSSES, orpo
from megatron_align.losses.reward import Rewards, reward_loss
from megatron_align.objectives.dpo import DPOOptions
from megatron_align.objectives.kto_bco import KTOOptions
from megatron_align.objectives.reference_free import CPOOptions, ORPOOptions, TPOOptions
from tests.objectives.trl_judge import PAIRS, Bigram, bare, cat, our_loss, same_prompts


def assert_equal(ours, theirs, parameter, rtol=1e-12):
    grads = [torch.autograd.grad(loss, parameter)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol)
    torch.testing.assert_close(*grads, rtol=rtol, atol=rtol)


def kto_judged(policy, reference, batch, mismatched, **options):
    trainer = bare(
        trl.KTOTrainer,
        model=policy,
        ref_model=reference,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        calculate_KL=options["loss_type"] == "kto",
        **options,
    )
    inputs = batch | {f"KL_{key}": value for key, value in mismatched.items()}
    return trainer._compute_loss(policy, inputs, return_outputs=False)


@pytest.mark.parametrize(
    "labels", [[1, 0, 0, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], ids=["mixed", "good", "bad"]
)
@pytest.mark.parametrize("seeds", [(1, 2), (2, 1)], ids=["baseline positive or not", "the other way round"])
@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_kto_equals_trl(name, seeds, labels):
    policy, reference = (Bigram(seed) for seed in seeds)
    batch, mismatched = same_prompts(3, 4)
    desirable = torch.tensor(labels, dtype=torch.bool)
    options = {"loss_type": name, "beta": 0.4, "desirable_weight": 1.5, "undesirable_weight": 0.7}
    want = kto_judged(policy, reference, batch | {"label": desirable}, mismatched, **options)
    got = our_loss(KTOOptions(**options), [batch], policy, reference, mismatched, labels)
    assert_equal(got, want, policy.table_VV)


def test_both_signs_of_the_baseline_are_met_above():
    """With the models exchanged the baseline is 0 in one case and not in the other: else nothing above proves it."""
    batch, mismatched = same_prompts(3, 4)
    differ = []
    for seeds in ((1, 2), (2, 1)):
        models, labels = [Bigram(seed) for seed in seeds], [1, 0, 0, 1, 0]
        kto, without = (
            our_loss(KTOOptions(loss_type=name), [batch], *models, mismatched, labels).item()
            for name in ("kto", "apo_zero_unpaired")
        )
        differ.append(kto != without)
    assert sorted(differ) == [False, True]


def old_style(chosen, rejected):
    """Return a batch as TRL's older trainers (CPO, ORPO) want it."""
    made = {}
    for side, batch in (("chosen", chosen), ("rejected", rejected)):
        made[f"{side}_input_ids"], made[f"{side}_attention_mask"] = (
            batch["input_ids"],
            batch["attention_mask"],
        )
        made[f"{side}_labels"] = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    return made


CPO_OPTIONS = {
    "sigmoid": {"label_smoothing": 0.1},
    "hinge": {},
    "ipo": {},
    "simpo": {"label_smoothing": 0.1, "simpo_gamma": 0.3},
}


@pytest.mark.parametrize("alpha", [0.0, 0.2, -0.1])
@pytest.mark.parametrize("cpo_alpha", [0.0, 0.7])
@pytest.mark.parametrize("name", sorted(CPO_OPTIONS))
def test_cpo_equals_trl(name, cpo_alpha, alpha):
    policy, (chosen, rejected) = Bigram(1), same_prompts(3, 4)
    options = {"beta": 0.4, "alpha": alpha} | CPO_OPTIONS[name]
    settings = {"label_smoothing": 0.0, "simpo_gamma": 0.5} | options
    trainer = bare(CPOTrainer, loss_type=name, cpo_alpha=cpo_alpha, pad_token_id=0, **settings)
    want, _ = trainer.get_batch_loss_metrics(policy, old_style(chosen, rejected))
    given = CPOOptions(loss_type=name, cpo_alpha=cpo_alpha, **options)
    assert_equal(our_loss(given, [chosen, rejected], policy), want, policy.table_VV)


def test_we_have_every_loss_type_of_trls_cpo_and_tpo():
    assert set(CPO_LOSSES) == set(CPOConfig.__dataclass_fields__["loss_type"].metadata["choices"])
    with pytest.raises(ValueError, match="Unknown loss type") as caught:
        tpo_judged("nonsense", 1.0)
    assert set(TPO_LOSSES) == set(str(caught.value).split("'")[1::2])


def test_alphapo_is_simpo_as_in_trl(tmp_path):
    config = CPOConfig(output_dir=str(tmp_path), loss_type="alphapo", bf16=False, use_cpu=True)
    assert (config.loss_type, config.cpo_alpha) == ("simpo", 0.0)
    sides, policy = same_prompts(3, 4), Bigram(1)
    alphapo, simpo = CPOOptions(loss_type="alphapo"), CPOOptions(loss_type="simpo", cpo_alpha=0.0)
    assert our_loss(alphapo, sides, policy).item() == our_loss(simpo, sides, policy).item()


def test_orpo_equals_trl():
    policy, (chosen, rejected) = Bigram(1), same_prompts(3, 4)
    trainer = bare(ORPOTrainer, beta=0.4, padding_value=0)
    want, _ = trainer.get_batch_loss_metrics(policy, old_style(chosen, rejected))
    got = our_loss(ORPOOptions(beta=0.4), [chosen, rejected], policy)
    # TRL takes the log-odds in fp32, and the likelihood of the prompt too
    assert_equal(got, want, policy.table_VV, rtol=1e-6)


def tpo_judged(name, tpo_alpha, policy=None, **options):
    settings = {"beta": 0.4, "label_smoothing": 0.0, "tpo_l_gamma": 0.5} | options
    policy = policy or Bigram(1)
    trainer = bare(TPOTrainer, model=policy, loss_type=name, tpo_alpha=tpo_alpha, **settings)
    return trainer._compute_loss(policy, cat(*same_prompts(3, 4, 5)), return_outputs=False)


@pytest.mark.parametrize("tpo_alpha", [0.2, 0.7])
@pytest.mark.parametrize(
    "name, options",
    [
        ("sigmoid", {"label_smoothing": 0.1}),
        ("hinge", {}),
        ("ipo", {}),
        ("tpo-l", {"tpo_l_gamma": 0.3, "label_smoothing": 0.1}),
    ],
)
def test_tpo_equals_trl(name, options, tpo_alpha):
    policy = Bigram(1)
    given = TPOOptions(loss_type=name, beta=0.4, tpo_alpha=tpo_alpha, **options)
    want = tpo_judged(name, tpo_alpha, policy, **options)
    assert_equal(our_loss(given, same_prompts(3, 4, 5), policy), want, policy.table_VV)


@pytest.mark.parametrize("center", [None, 0.01])
@pytest.mark.parametrize("with_margin", [False, True])
def test_reward_equals_trl(with_margin, center):
    reward = torch.randn(
        2 * PAIRS, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    margin = (
        torch.rand(PAIRS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        if with_margin
        else None
    )
    model = lambda **_: SimpleNamespace(logits=reward[:, None])  # noqa: E731
    trainer = bare(
        trl.RewardTrainer,
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(center_rewards_coefficient=center),
    )
    inputs = {"attention_mask": torch.ones(2 * PAIRS, 1)} | ({"margin": margin} if with_margin else {})
    want = trainer.compute_loss(model, inputs)
    chosen, rejected = (Rewards(r, torch.full_like(r, torch.nan)) for r in reward.chunk(2))
    got = reward_loss(chosen, rejected, margin_N=margin, alpha=0.3, center_rewards_coefficient=center or 0.0)
    assert_equal(got.mean(), want, reward)


@pytest.mark.parametrize(
    "losses, options, config",
    [
        (DPO_LOSSES, DPOOptions, trl.DPOConfig),
        (UNPAIRED_LOSSES, KTOOptions, trl.KTOConfig),
        (CPO_LOSSES, CPOOptions, CPOConfig),
        (TPO_LOSSES, TPOOptions, TPOConfig),
        ({"orpo": orpo}, ORPOOptions, ORPOConfig),
    ],
    ids=["dpo", "kto", "cpo", "tpo", "orpo"],
)
def test_defaults_are_trls(losses, options, config):
    """Of the options, and where an option is null by default of the losses."""
    theirs = {name: field.default for name, field in config.__dataclass_fields__.items()}
    ours = {
        name: field.default
        for name, field in options.__dataclass_fields__.items()
        if field.default is not None and name in theirs and name != "loss_type"  # TRL: a list of it
    }
    assert ours == {name: theirs[name] for name in ours}
    assert "beta" in ours
    for name, loss in losses.items():
        function = loss.function if isinstance(loss, PairLoss) else loss
        for option in inspect.signature(function).parameters.values():
            # beta is always given; TRL refuses its own default of exo_pair's smoothing
            if option.name == "beta" or (name, option.name) == ("exo_pair", "label_smoothing"):
                continue
            assert option.name not in theirs or option.default == theirs[option.name], (name, option.name)


def test_default_of_the_alpha_divergence_is_trls():
    ours = inspect.signature(alpha_divergence).parameters["alpha"].default
    assert ours == trl.DPOConfig.__dataclass_fields__["f_alpha_divergence_coef"].default
