"""Law 13: every option of every objective changes the loss of a step, or is refused in that combination.

The options come from the declared dataclasses: one that is added fails here until it has a value off its default. A
step is 8 samples of one pack with drawn log-probs, scores, margins and labels. Options of policy gradients:
``test_policy_gradient_objective.py``.
"""

from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_align.data.batching.collate import PackValues, pack
from megatron_align.data.batching.normalization import row_weights
from megatron_align.errors import InputError
from megatron_align.losses.responses import Responses
from megatron_align.objectives.base import StepSums, completion_sums
from megatron_align.objectives.distill import Distill
from megatron_align.objectives.policy_gradient_options import PolicyGradientOptions
from megatron_align.objectives.registry import OBJECTIVES
from megatron_align.records import Sample

ROLLOUTS = {name for name, kind in OBJECTIVES.items() if issubclass(kind.Options, PolicyGradientOptions)}
LENGTHS = {"pair": (4, 3), "triple": (4, 3, 5), "ranked": (4, 3, 2), "unpaired": (4,), "chat": (6,)}
PROMPT, SAMPLES = 3, 8

# A value off the default of each option, and further options that it needs to apply.
OFF = {
    "sft": {"normalization": ("sample", {})},
    "dpo": {
        "loss_type": ("ipo", {}),
        "loss_weights": ([0.7], {}),
        "beta": (0.4, {}),
        "label_smoothing": (0.2, {}),
        "f_divergence_type": ("js_divergence", {}),
        "f_alpha_divergence_coef": (0.3, {"f_divergence_type": "alpha_divergence"}),
        "discopop_tau": (0.3, {"loss_type": "discopop"}),
        "ld_alpha": (0.5, {}),
        "use_weighting": (True, {}),
        "rpo_alpha": (0.5, {}),
        "margin_scale": (2.0, {"loss_type": "margin"}),
    },
    "kto": {
        "loss_type": ("apo_zero_unpaired", {}),
        "beta": (0.4, {}),
        "desirable_weight": (1.5, {}),
        "undesirable_weight": (0.5, {}),
    },
    "bco": {"beta": (0.4, {})},
    "cpo": {
        "loss_type": ("hinge", {}),
        "beta": (0.4, {}),
        "label_smoothing": (0.2, {}),
        "cpo_alpha": (0.5, {}),
        "simpo_gamma": (0.9, {"loss_type": "simpo"}),
        "alpha": (0.3, {}),
    },
    "simpo": {"beta": (0.4, {}), "simpo_gamma": (0.9, {}), "label_smoothing": (0.2, {})},
    "tpo": {
        "loss_type": ("hinge", {}),
        "beta": (0.4, {}),
        "label_smoothing": (0.2, {}),
        "tpo_alpha": (0.5, {}),
        "tpo_l_gamma": (0.9, {"loss_type": "tpo-l"}),
    },
    "orpo": {"beta": (0.4, {}), "nll_over": ("chosen", {})},
    "reward": {
        "alpha": (0.3, {}),
        "score_normalization": ("standard", {"alpha": 0.3}),
        "center_rewards_coefficient": (0.2, {}),
        "ranked_loss": ("all_pairs", {"data": "ranked"}),
    },
    "distill": {
        "divergence": ("forward", {}),
        "top_k": (3, {}),
        "js_beta": (0.2, {"divergence": "js"}),
        "temperature": (2.0, {}),
    },
}
CASES = [(name, option, *entry) for name, options in OFF.items() for option, entry in options.items()]


def draw(*size, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=size))


def rows_of(kind, score_prompt=False, normalization="token"):
    """Return the scored rows of 8 samples, with what each kind of data holds; those of chats have various lengths."""
    samples = []
    for i in range(SAMPLES):
        lengths = (LENGTHS[kind][0] + i,) if kind == "chat" else LENGTHS[kind]
        scored = [False] * PROMPT + [True] * sum(lengths)
        more = {"completion_lengths": lengths, "scores": tuple(draw(len(lengths), seed=50 + i).tolist())}
        more |= {"margin": 0.3 + 0.1 * i, "label": i % 3 > 0}
        samples.append(Sample(np.arange(PROMPT + sum(lengths)), np.array(scored), PROMPT, **more))
    count = SAMPLES * len(lengths)
    values = PackValues(np.full(count, 1 / SAMPLES), np.full(count, 0.02))
    tokens = sum(len(sample.tokens_L) for sample in samples)
    weights = row_weights(np.array([sample.scored_L.sum() for sample in samples]), normalization)
    return pack(samples, weights, tokens, values=values, score_prompt=score_prompt).rows


def step(name, data=None, **options):
    """Return loss and gradient of a step, as numbers."""
    kind = OBJECTIVES[name]
    data = data or kind.data[0]
    scores = np.concatenate([draw(len(LENGTHS[data]), seed=50 + i).numpy() for i in range(SAMPLES)])
    objective = kind(kind.Options(**options), SimpleNamespace(kind=data, scores=scores))
    rows = rows_of(data, objective.score_prompt, objective.normalization)
    if isinstance(objective, Distill):  # K of 5 teacher's tokens in descending order
        teacher = draw(len(rows.row_N), 5).sort(descending=True).values[:, : objective.top_k]
        given = draw(len(rows.row_N), 5, seed=1)[:, : objective.top_k].requires_grad_()
        scored = objective.row_values(given, teacher)
    else:
        count = len(rows.completions.length_C) if objective.trains_reward_model else len(rows.row_N)
        given = scored = (-draw(count, seed=2).abs() - 0.1).float().requires_grad_()
    prepare(objective, rows, given.detach())
    loss, _ = objective.loss(scored, rows, {"log_sum_square": draw(len(rows.row_N), seed=3) - 1})
    return [loss.item(), *torch.autograd.grad(loss, given)[0].flatten().tolist()]


def prepare(objective, rows, logprobs_N):
    """Fill in what a pre-pass computes: the reference's sums, and the step's statistics."""
    completions = rows.completions
    count = len(completions.length_C)
    if objective.needs & {"reference_logprobs"}:
        reference_N = draw(len(rows.row_N), seed=4)
        completions.columns["reference_logprobs"] = completion_sums(
            objective.weighted(reference_N, rows), rows
        )
    if seen := objective.needs & {"batch_statistics", "mismatched_logprobs"}:
        sums = StepSums(draw(count, seed=5) + 2, draw(count, seed=6), completions.length_C)
        statistics = objective.observe_batch(dict.fromkeys(seen, sums), training=True)
        object.__setattr__(rows, "step_statistics", statistics.values)
        completions.columns.update(statistics.columns)


def test_every_option_of_every_objective_has_a_value_off_its_default():
    declared = {
        name: {field.name for field in fields(kind.Options)} - {"name"}
        for name, kind in OBJECTIVES.items()
        if name not in ROLLOUTS
    }
    assert declared == {name: set(options) for name, options in OFF.items()}


@pytest.mark.parametrize(
    "name, option, value, needs", CASES, ids=[f"{name}-{option}" for name, option, *_ in CASES]
)
def test_a_value_off_the_default_changes_the_loss(name, option, value, needs):
    plain, changed = step(name, **needs), step(name, **needs, **{option: value})
    assert plain == step(name, **needs)
    assert changed != plain


@pytest.mark.parametrize(
    "name, option, value, needs",
    [case for case in CASES if case[3]],
    ids=[f"{c[0]}-{c[1]}" for c in CASES if c[3]],
)
def test_without_what_it_needs_it_is_refused(name, option, value, needs):
    kind, store = OBJECTIVES[name], SimpleNamespace(kind="pair", scores=np.ones(2))
    with pytest.raises(InputError, match=option):
        kind(kind.Options(**{option: value})).require_data(store, "train")


@pytest.mark.parametrize("loss_type", ["margin", "reward_aware"])
@pytest.mark.parametrize("given", [True, False], ids=["margins", "scores"])
def test_the_margin_is_what_the_chosen_answer_is_better_by(loss_type, given):
    """The loss is that of the margin's own sign, and without margins that of the scores' difference."""
    objective = OBJECTIVES["dpo"](OBJECTIVES["dpo"].Options(loss_type=loss_type, margin_scale=2.0))
    rows = rows_of("pair")
    completions = rows.completions
    if not given:
        completions.margin_C.fill_(torch.nan)
    better_P = completions.margin_C[::2] if given else completions.score_C[::2] - completions.score_C[1::2]
    logprobs_N = draw(len(rows.row_N), seed=2)
    policy_C = completion_sums(logprobs_N, rows)
    reference_C = completions.columns["reference_logprobs"] = policy_C + draw(2 * SAMPLES, seed=3)
    loss, _ = objective.loss(logprobs_N, rows, {})
    chosen, rejected = (
        Responses(policy_C[k::2], completions.length_C[k::2], reference_C[k::2]) for k in (0, 1)
    )
    expected, opposite = (
        objective.losses(chosen, rejected, sign * 2.0 * better_P).mean() for sign in (1, -1)
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert abs(opposite - expected) > 1e-3


@pytest.mark.parametrize("normalization", [None, "standard", "range"])
@pytest.mark.parametrize("counts", [(2, 2), (3, 2)], ids=["lists_of_2", "lists_of_3_and_2"])
def test_the_score_term_of_a_list_is_a_sum_and_its_metrics_are_best_and_worst(counts, normalization):
    """Against the formula by hand: Plackett-Luce, and alpha times the squared errors of all of a list's rewards."""
    drawn = [draw(count, seed=70 + i).tolist() for i, count in enumerate(counts)]
    flat = np.array([score for scores in drawn for score in scores], dtype=np.float32)
    kind, store = OBJECTIVES["reward"], SimpleNamespace(kind="ranked", scores=flat)
    objective = kind(kind.Options(alpha=0.3, score_normalization=normalization), store)
    samples = [
        Sample(np.arange(3 + 2 * n), np.array([False] * 3 + [True] * 2 * n), 3, (2,) * n, tuple(scores))
        for n, scores in zip(counts, drawn, strict=True)
    ]
    total = sum(counts)
    values = PackValues(np.full(total, 0.5), np.full(total, 0.1))
    rows = pack(samples, [0.1] * len(counts), sum(len(s.tokens_L) for s in samples), values=values).rows
    rewards_C = draw(total, seed=80).float()
    loss, sums = objective.loss(rewards_C, rows, {})

    shift, scale = 0.0, 1.0
    if normalization == "standard":
        shift, scale = flat.mean(), flat.std()
    if normalization == "range":
        shift, scale = (flat.max() + flat.min()) / 2, (flat.max() - flat.min()) / 2
    expected = best = worst = 0.0
    for scores, rewards in zip(drawn, rewards_C.split(list(counts)), strict=True):
        order = np.argsort(scores)[::-1].copy()
        ranked = rewards[order]
        expected -= sum((ranked[i] - ranked[i:].logsumexp(0)).item() for i in range(len(ranked) - 1)) / 2
        error = rewards - (torch.tensor(scores) - shift) / scale
        expected += 0.3 * error.square().sum().item() / 2
        best, worst = best + ranked[0].item() / 2, worst + ranked[-1].item() / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert sums["chosen_reward"].item() == pytest.approx(best, rel=1e-6)
    assert sums["rejected_reward"].item() == pytest.approx(worst, rel=1e-6)


def test_bcos_delta_is_the_mean_reward_of_all_steps_so_far_and_validation_moves_nothing():
    objective = OBJECTIVES["bco"](OBJECTIVES["bco"].Options(beta=0.4))
    seen = []
    for step_number in range(3):
        sums = StepSums(draw(4, seed=step_number), draw(4, seed=10 + step_number), torch.ones(4))
        seen += (0.4 * (sums.policy_S - sums.reference_S)).tolist()
        statistics = objective.observe_batch({"batch_statistics": sums}, training=True)
        assert statistics.values["delta"] == pytest.approx(np.mean(seen))
        held = objective.state()
        far = StepSums(draw(4) + 9, draw(4), torch.ones(4))
        objective.observe_batch({"batch_statistics": far}, training=False)
        assert objective.state() == held
