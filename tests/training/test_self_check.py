"""What would train silently wrong ends the run at its first step, with the rank and the tensor that differ.

Each check is shown a run with one thing broken on one rank. A sound run keeps its numbers, bit by bit.
"""

import math

import pytest
import torch

from megatron_align.errors import TrainingFault
from megatron_align.objectives.configuration import parse
from megatron_align.training import self_check
from tests.harness import training_ranks
from tests.harness.broken import train_broken
from tests.harness.marks import mark_slow
from tests.harness.tiny import metrics_of, run_arguments, write_pairs


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", samples=24)


@pytest.fixture
def fault(pool, tiny_models, chat_file, tmp_path):
    """Return what a run says in which one thing is broken on its last rank."""

    def run(what, world=2, data=chat_file, **options):
        arguments = run_arguments(tiny_models(), data, tmp_path, train__self_check=True, **options)
        faults = pool.run(world, train_broken, arguments, what)
        assert len(set(faults)) == 1, "every rank must find the same"
        return faults[0]

    return run


def test_another_plan(fault):
    line = fault("plan")
    assert "self-check: rank 1 must compute the same packs as rank 0; its step plan of step 1 is" in line


def test_another_parameter_on_a_data_parallel_replica(fault):
    name = "decoder.layers.1.self_attention.linear_proj.weight"
    line = fault("parameter")
    assert f"self-check: {name} must be the same on rank 1 and on rank 0, a data-parallel replica" in line


def test_another_norm_on_a_tensor_parallel_rank(fault):
    line = fault("norm", parallel__tensor=2)
    assert (
        "decoder.layers.0.input_layernorm.weight must be the same on rank 1 and on rank 0, a tensor-" in line
    )


def test_another_embedding_at_the_end_of_the_pipeline(fault):
    line = fault("tied", parallel__pipeline=2)
    assert (
        "the tied embedding must be the same on rank 1 and on rank 0, the other end of the pipeline" in line
    )


@pytest.mark.parametrize(
    "options", [{}, {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2}], ids=["dp2", "vpp2"]
)
def test_samples_that_see_each_other(fault, options):
    line = fault("leak", **options)
    assert "must be the same with and without packing within 0.0001 of its norm; it differs by" in line


def test_another_reference(fault, pairs):
    """The cached log-probs are not those of the policy: the column is of another model."""
    line = fault("reference", world=1, data=pairs, objective__name="dpo", train__global_batch_size=8)
    assert "the policy starts as its reference, so chosen_reward of step 1 must be 0 within" in line


CASES = {
    "dp2": (2, {}),
    "tp2_pp2_bf16": (4, {"parallel__tensor": 2, "parallel__pipeline": 2, "train__precision": "bf16"}),
    "dpo_vpp2": (2, {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2, "objective__name": "dpo"}),
    "reward_repeated": (1, {"objective__name": "reward", "data__share_prefix": False}),
}


@pytest.mark.parametrize("case", mark_slow(CASES, ["dp2", "reward_repeated"]))
def test_it_leaves_no_trace_in_the_numbers(case, pool, tiny_models, chat_file, pairs, tmp_path):
    world, options = CASES[case]
    data = pairs if "objective__name" in options else chat_file
    rows = []
    for on in (True, False):
        folder = tmp_path / str(on)
        arguments = run_arguments(
            tiny_models(),
            data,
            folder,
            train__self_check=on,
            train__global_batch_size=8,
            train__steps=3,
            **options,
        )
        pool.run(world, training_ranks.train, arguments)
        rows.append([(row["loss"], row["grad_norm"]) for row in metrics_of(folder)])
    assert len(rows[0]) == 3
    assert rows[0] == rows[1]


LIVE = ["--reference.mode", "live"]


@pytest.mark.parametrize(
    "options, checked",
    [
        ([], True),
        (["--reference.mode", "none"], False),
        (["--model.adapter", "{init: pissa}", *LIVE], True),
        (["--model.adapter", "{init: pissa, dropout: 0.1}", *LIVE], False),  # A and B are not 0 at first
        (["--model.adapter", "{init: pissa}"], False),
    ],
)
def test_identity_is_asked_of_policies_that_start_as_their_reference(options, checked):
    start = ["--model.path", "m", "--data.train", "t", "--checkpoint.dir", "d", "--train.steps", "1"]
    config = parse([*start, "--objective.name", "dpo", *options])
    metrics = {"loss": math.log(2) + 0.1, "chosen_logps": -50.0, "rejected_logps": -60.0}
    metrics |= {"chosen_reward": 0.0, "rejected_reward": 0.0}
    if not checked:
        self_check.after_first_step(config, metrics, torch.float32)
        return
    with pytest.raises(TrainingFault, match="the loss of step 1 must be 0.693147, got 0.793147"):
        self_check.after_first_step(config, metrics, torch.float32)
    self_check.after_first_step(config, {**metrics, "loss": math.log(2)}, torch.float32)


def test_the_hash_tells_a_bit_and_a_place():
    x = torch.randn(1000)
    flipped, swapped = x.clone(), x.clone()
    flipped[500] = torch.nextafter(x[500], torch.tensor(torch.inf))
    swapped[[3, 7]] = x[[7, 3]]
    same = self_check.hashed(x)
    assert same.equal(self_check.hashed(x.clone()))
    assert not same.equal(self_check.hashed(flipped))
    assert not same.equal(self_check.hashed(swapped))
    assert self_check.hashed(x.bfloat16()).shape == (2,)
