"""KTO compares a prompt with another sample's completion: a step of one sample has none, which is refused or named."""

import numpy as np
import pytest

from megatron_align.data.batching.sampler import EpochOrder, SampleSteps, TokenSteps
from megatron_align.errors import InputError
from megatron_align.objectives.configuration import parse
from megatron_align.training.lone_samples import require_other_samples
from tests.harness.tiny import run_arguments


def config(**options):
    return parse(run_arguments("model", "data.jsonl", "run", **{"objective__name": "kto", **options}))


def order_of(samples):
    return EpochOrder(np.zeros(samples, np.int64), (1.0,))


@pytest.mark.parametrize(
    "steps", [SampleSteps(order_of(9), 1, steps=4), TokenSteps(order_of(9), np.full(9, 8), 10, steps=4)]
)
def test_no_step_has_a_second_sample(steps):
    assert {len(steps.samples(step)) for step in range(4)} == {steps.size(step) for step in range(4)} == {1}
    with pytest.raises(
        InputError, match="compares each prompt with the completion of another sample of the step"
    ):
        require_other_samples(config(train__global_batch_size=1), "train", steps)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_single_steps_of_one_sample_are_named_once(split, capsys):
    steps = SampleSteps(order_of(9), 4, epochs=1)
    for _ in range(2):
        require_other_samples(config(), split, steps)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"warning: 1 of the 3 steps of data.{split} have one sample only, the first is step 3: objective kto"
    )


def test_long_samples_alone_in_their_steps_are_named(capsys):
    lengths = np.array([2, 2, 9, 2, 2, 2])
    steps = TokenSteps(EpochOrder(np.zeros(6, np.int64), (1.0,), shuffle=False), lengths, 9, epochs=1)
    sizes = [steps.size(step) for step in range(steps.steps)]
    assert sizes == [len(steps.samples(step)) for step in range(steps.steps)]
    assert sizes == [2, 1, 3]
    require_other_samples(config(), "train", steps)
    assert (
        "1 of the 3 steps of data.train have one sample only, the first is step 2" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "options, samples",
    [
        ({}, 8),
        ({"objective__name": "bco"}, 9),
        ({"objective__loss_type": "apo_zero_unpaired"}, 9),
        ({"objective__name": "sft"}, 9),
    ],
)
def test_other_losses_and_full_steps_are_silent(options, samples, capsys):
    require_other_samples(config(**options), "train", SampleSteps(order_of(samples), 4, epochs=1))
    assert capsys.readouterr().err == ""
