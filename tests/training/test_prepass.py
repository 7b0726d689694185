"""The pre-pass computes what an objective needs, no more, and its operations are counted as many as it runs.

Every registered objective is walked, with every mode of the reference: a new one that needs a pre-pass, or a new need,
cannot be counted wrongly.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_align.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    ReferenceConfig,
    RunConfig,
    TrainConfig,
)
from megatron_align.cost.work import scoring_passes
from megatron_align.data.batching.collate import PackValues, pack
from megatron_align.data.batching.step_batches import Packs, Step
from megatron_align.objectives.base import Objective, StepStatistics
from megatron_align.objectives.distill import DistillOptions
from megatron_align.objectives.dpo import DPOOptions
from megatron_align.objectives.kto_bco import KTOOptions
from megatron_align.objectives.policy_gradient import GRPOOptions
from megatron_align.objectives.registry import OBJECTIVES, build_objective, reference_mode
from megatron_align.records import Sample
from megatron_align.training import scoring
from megatron_align.training.prepass import PrePass
from megatron_align.training.reference.logprobs import CachedReference, LiveReference, ZeroReference

EVERY = [
    # Passes over rollouts are the online loop's, and a teacher's rows are always computed before training.
    *(kind.Options() for name, kind in OBJECTIVES.items() if name not in ("grpo", "rloo", "ppo", "distill")),
    DPOOptions(loss_type="aot"),
    DPOOptions(loss_type=["sigmoid", "aot_unpaired", "sft"]),
    KTOOptions(loss_type="apo_zero_unpaired"),
]
COMPLETIONS = {"chat": 1, "unpaired": 1, "pair": 2, "triple": 3}


class CountingScorer:
    """Stands in for a model's scorer: scores are -1 per completion, and calls are counted."""

    def __init__(self):
        self.passes = 0

    def sums(self, batches, *, training=False):
        assert not training, "nothing is dropped here"
        self.passes += 1
        return [torch.full((len(batch.rows.completions.length_C),), -1.0) for batch in batches]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """One rank, which needs no process group."""
    monkeypatch.setattr(scoring.dist, "all_reduce", lambda values: None)
    monkeypatch.setattr(scoring, "is_metric_rank", lambda groups: True)


def step_of(objective, cached):
    """Return a step of two samples in one pack."""
    width = COMPLETIONS[objective.data[0]]
    tokens = np.arange(2 + 3 * width, dtype=np.int32)
    sample = Sample(tokens, tokens >= 2, prompt_length=2, completion_lengths=(3,) * width)
    values = PackValues(np.full(2 * width, 0.5), np.full(2 * width, 0.1))
    if cached:
        values = replace(
            values, completion_columns={"reference_logprobs": np.full(2 * width, -2.0, np.float32)}
        )
    packs = Packs(
        [pack([sample, sample], [1.0, 1.0], 2 * len(tokens), values=values)], [np.arange(2 * width)]
    )
    return Step(0, packs, None, np.arange(2 * width), packs if width == 1 else None)


def prepared(objective, mode):
    """Return the pre-pass's batches, and how many forward passes it ran."""
    policy, live = CountingScorer(), CountingScorer()
    reference = {
        None: None,
        "live": LiveReference(live, None),
        "cached": CachedReference(np.zeros(1)),
        "none": ZeroReference(),
    }[mode]
    step = step_of(objective, cached=mode == "cached")
    batches = PrePass(policy, objective, None, reference).batches(step, training=True)
    return batches, policy.passes + live.passes


def run_of(options, mode):
    """Return a run; ``mode``: of the reference, None: as its objective has it."""
    return RunConfig(
        model=ModelConfig(path="m"),
        data=DataConfig(train="d"),
        objective=options,
        reference=ReferenceConfig(mode=mode),
        train=TrainConfig(steps=1),
        checkpoint=CheckpointConfig(dir="c"),
    )


@pytest.mark.parametrize("mode", ["cached", "live", "none"])
@pytest.mark.parametrize("options", EVERY, ids=lambda o: f"{o.name}-{getattr(o, 'loss_type', '')}")
def test_as_many_passes_are_counted_as_are_run(options, mode):
    config, objective = run_of(options, mode), build_objective(options)
    batches, passes = prepared(objective, reference_mode(config))
    assert scoring_passes(config) == passes
    columns = batches[0].rows.completions.columns
    assert ("reference_logprobs" in columns) == objective.compares
    if objective.needs & {"batch_statistics", "mismatched_logprobs"}:
        assert batches[0].rows.step_statistics


@pytest.mark.parametrize(
    "options, cached, live",
    [(DPOOptions(), 0, 1), (DPOOptions(loss_type="aot"), 1, 2), (KTOOptions(), 1, 3)],
    ids=["dpo", "aot", "kto"],
)
def test_some_objectives_need_several_passes(options, cached, live):
    """Else the test above compares zeros. KTO's live reference scores the step's completions and the mismatched."""
    assert scoring_passes(run_of(options, "cached")) == cached
    assert scoring_passes(run_of(options, "live")) == live


@pytest.mark.parametrize(
    "options, mode, passes",
    [
        (GRPOOptions(), None, 0),
        (GRPOOptions(beta=0.1, kl_in="token_reward"), "live", 1),
        (GRPOOptions(beta=0.1, kl_in="sequence_reward"), "live", 2),
        (GRPOOptions(iterations=2), None, 1),
        (DistillOptions(), "cached", 0),
    ],
)
def test_passes_over_rollouts_are_counted(options, mode, passes):
    """One over the reference, and one over the policy only where the loss cannot take its log-probs from itself."""
    assert scoring_passes(run_of(options, mode)) == passes


@pytest.mark.parametrize("need", ["batch_statistics", "mismatched_logprobs"])
def test_a_need_without_a_reference_is_met(need):
    """An objective of one's own may need statistics of the policy alone."""

    class Alone(Objective):
        data, needs = ("unpaired",), frozenset({need})

        def observe_batch(self, seen, *, training):
            assert seen.keys() == {need}
            assert seen[need].policy_S.tolist() == [-1.0, -1.0]
            assert seen[need].reference_S.tolist() == [0.0, 0.0]
            return StepStatistics({"mean": -1.0}, {"centred": seen[need].policy_S + 1})

    batches, passes = prepared(Alone(DPOOptions()), None)
    assert passes == 1
    assert batches[0].rows.step_statistics == {"mean": -1.0}
    centred = batches[0].rows.completions.columns["centred"]
    assert (centred.dtype, centred.tolist()) == (torch.float32, [0.0, 0.0])
