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
from megatron_align.losses.dpo import DPO_LOSSES, sft
from megatron_align.losses.reference_free import CPO_LOSSES, TPO_LOSSES, orpo
from megatron_align.losses.responses import Responses
from megatron_align.losses.reward import Rewards, reward_loss
from megatron_align.losses.unpaired import UNPAIRED_LOSSES, apo_zero_unpaired, kto, kto_baseline
from tests.losses.trl_judge import PAIRS, Bigram, bare, scored, sequences


def assert_equal(ours, theirs, parameter, rtol=1e-12):
    grads = [torch.autograd.grad(loss, parameter)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol)
    torch.testing.assert_close(*grads, rtol=rtol, atol=rtol)


def summed(model, batch, reference=None):
    tokens, mask = scored(model, batch)
    reference_N = None if reference is None else scored(reference, batch)[0].sum(1).detach()
    return Responses(tokens.sum(1), mask.sum(1), reference_N)


def likelihood(model, batch, prompt=False):
    """Return the loss of one or more responses, averaged over their tokens, by our per-response term."""
    tokens, mask = scored(model, batch, prompt)
    responses = Responses(tokens.sum(1), mask.sum(1))
    return sft(responses, responses, mean_length=mask.sum().item() / len(mask)).mean()


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
    batch, mismatched = sequences(PAIRS, 3), sequences(PAIRS, 4)
    desirable = torch.tensor(labels, dtype=torch.bool)
    options = {"beta": 0.4, "desirable_weight": 1.5, "undesirable_weight": 0.7}
    want = kto_judged(policy, reference, batch | {"label": desirable}, mismatched, loss_type=name, **options)
    responses = summed(policy, batch, reference)
    if name == "kto":
        baseline = kto_baseline(summed(policy, mismatched, reference))
        got = kto(responses, desirable, baseline=baseline, **options)
    else:
        got = apo_zero_unpaired(responses, desirable, **options)
    assert_equal(got.mean(), want, policy.table_VV)


def test_both_signs_of_the_baseline_are_met_above():
    models, mismatched = [Bigram(1), Bigram(2)], sequences(PAIRS, 4)
    baselines = [kto_baseline(summed(p, mismatched, r)).item() for p, r in (models, models[::-1])]
    assert min(baselines) == 0 < max(baselines)


def cat(chosen, rejected):
    return {key: torch.cat([chosen[key], rejected[key]]) for key in chosen}


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
    policy, chosen, rejected = Bigram(1), sequences(PAIRS, 3), sequences(PAIRS, 4)
    options = {"beta": 0.4, "alpha": alpha} | CPO_OPTIONS[name]
    settings = {"label_smoothing": 0.0, "simpo_gamma": 0.5} | options
    trainer = bare(CPOTrainer, loss_type=name, cpo_alpha=cpo_alpha, pad_token_id=0, **settings)
    want, _ = trainer.get_batch_loss_metrics(policy, old_style(chosen, rejected))
    got = CPO_LOSSES[name](summed(policy, chosen), summed(policy, rejected), **options).mean()
    assert_equal(got + cpo_alpha * likelihood(policy, chosen), want, policy.table_VV)


def test_we_have_every_loss_type_of_trls_cpo_and_tpo():
    assert set(CPO_LOSSES) == set(CPOConfig.__dataclass_fields__["loss_type"].metadata["choices"])
    with pytest.raises(ValueError, match="Unknown loss type") as caught:
        tpo_judged("nonsense", 0.0)
    assert set(TPO_LOSSES) == set(str(caught.value).split("'")[1::2])


def test_alphapo_is_simpo_as_in_trl(tmp_path):
    config = CPOConfig(output_dir=str(tmp_path), loss_type="alphapo", bf16=False, use_cpu=True)
    assert (config.loss_type, config.cpo_alpha) == ("simpo", 0.0)
    assert CPO_LOSSES["alphapo"] is CPO_LOSSES["simpo"]


def test_orpo_equals_trl():
    policy, chosen, rejected = Bigram(1), sequences(PAIRS, 3), sequences(PAIRS, 4)
    trainer = bare(ORPOTrainer, beta=0.4, padding_value=0)
    want, _ = trainer.get_batch_loss_metrics(policy, old_style(chosen, rejected))
    got = orpo(summed(policy, chosen), summed(policy, rejected), beta=0.4).mean()
    # TRL takes the log-odds in fp32, and the likelihood of the prompt too
    assert_equal(got + likelihood(policy, chosen, prompt=True), want, policy.table_VV, rtol=1e-6)


def tpo_judged(name, tpo_alpha, policy=None, **options):
    settings = {"beta": 0.4, "label_smoothing": 0.0, "tpo_l_gamma": 0.5} | options
    policy = policy or Bigram(1)
    trainer = bare(TPOTrainer, model=policy, loss_type=name, tpo_alpha=tpo_alpha, **settings)
    sides = [sequences(PAIRS, seed) for seed in (3, 4, 5)[: 3 if tpo_alpha else 2]]
    whole = {key: torch.cat([side[key] for side in sides]) for key in sides[0]}
    return trainer._compute_loss(policy, whole, return_outputs=False)


@pytest.mark.parametrize("tpo_alpha", [0.0, 0.7])
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
    policy, (chosen, rejected, gold) = Bigram(1), (sequences(PAIRS, seed) for seed in (3, 4, 5))
    got = TPO_LOSSES[name](summed(policy, chosen), summed(policy, rejected), beta=0.4, **options).mean()
    want = tpo_judged(name, tpo_alpha, policy, **options)
    assert_equal(got + tpo_alpha * likelihood(policy, gold), want, policy.table_VV)


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
    "losses, config",
    [
        (DPO_LOSSES, trl.DPOConfig),
        (UNPAIRED_LOSSES, trl.KTOConfig),
        (CPO_LOSSES, CPOConfig),
        (TPO_LOSSES, TPOConfig),
        ({"orpo": orpo}, ORPOConfig),
    ],
    ids=["dpo", "kto", "cpo", "tpo", "orpo"],
)
def test_defaults_are_trls(losses, config):
    compared = 0
    for name, loss in losses.items():
        for option in inspect.signature(loss).parameters.values():
            field = config.__dataclass_fields__.get(option.name)
            if field is None or (name, option.name) == ("exo_pair", "label_smoothing"):  # TRL refuses its own
                continue
            assert option.default == field.default, (name, option.name)
            compared += 1
    assert compared >= len(losses) - 1  # sft has no option


def test_default_of_the_alpha_divergence_is_trls():
    ours = inspect.signature(alpha_divergence).parameters["alpha"].default
    assert ours == trl.DPOConfig.__dataclass_fields__["f_alpha_divergence_coef"].default
