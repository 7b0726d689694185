"""Batching depends on what a table holds, not on where: a store on disk and the same samples in memory make the same
packs, and columns by name reach the rows and completions they belong to."""

import dataclasses

import numpy as np
import pytest
import torch

from megatron_align.config import DataConfig, TrainConfig
from megatron_align.data.batching.context_parts import ContextRank
from megatron_align.data.batching.packing import PackOptions
from megatron_align.data.batching.sampler import step_order
from megatron_align.data.batching.step_batches import DataRank, StepBatches
from megatron_align.data.sample_table import MemoryTable
from megatron_align.data.store import TokenStore
from megatron_align.data.tokenize.prepare import prepare
from megatron_align.records import Sample

WORDS = ("the cat", "sat on the mat", "hello", "hello world the cat sat")
RECORDS = {
    "chat": [
        {
            "messages": [
                {"role": "user", "content": WORDS[i % 4]},
                {"role": "assistant", "content": WORDS[i % 3] * (1 + i % 5)},
            ],
            "weight": 1 + i % 2,
        }
        for i in range(20)
    ],
    "pair": [
        {
            "prompt": "Q: " + WORDS[i % 4] + " A:",
            "chosen": WORDS[i % 3] * (1 + i % 5),
            "rejected": "no",
            "margin": 0.5,
        }
        for i in range(20)
    ],
    "unpaired": [
        {"prompt": "Q: " + WORDS[i % 4], "completion": WORDS[i % 3], "label": bool(i % 2)} for i in range(20)
    ],
}


def steps_of(table, rank, *, share_prefix, score_prompt=False, mismatched=False):
    data = DataConfig(train="x", sequence_length=200, share_prefix=share_prefix)
    order = step_order(table, data, TrainConfig(global_batch_size=6, epochs=2), "x")
    options = PackOptions.of_data(data, score_prompt=score_prompt, multiple=4)
    batches = StepBatches(table, order, options, rank, "sample", mismatched=mismatched)
    return [batches.step(i) for i in range(batches.steps)]


def leaves(value):
    """Every tensor, array and number of a step, with its path."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return [value.tobytes() if isinstance(value, np.ndarray) else value.numpy().tobytes()]
    if dataclasses.is_dataclass(value):
        return [leaf for f in dataclasses.fields(value) for leaf in leaves(getattr(value, f.name))]
    if isinstance(value, dict):
        return [leaf for name in sorted(value) for leaf in [name, *leaves(value[name])]]
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in leaves(item)]
    return [repr(value)]


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("kind", RECORDS)
def test_a_store_and_the_same_samples_in_memory_make_the_same_packs(make, kind, share_prefix):
    """Bit by bit, on every data-parallel rank, with a context split and a column of the reference."""
    store = TokenStore(prepare(make(RECORDS[kind])))
    columns = {"reference_logprobs": -np.arange(len(store.completion_scored), dtype=np.float64)}
    memory = MemoryTable([store.sample(i) for i in range(len(store))], completion_columns=columns)
    for rank in range(2):
        own = DataRank(ranks=2, rank=rank, context=ContextRank(ranks=2, rank=rank, kind="allgather"))
        options = {
            "share_prefix": share_prefix,
            "score_prompt": kind == "pair",
            "mismatched": kind == "unpaired",
        }
        disk, held = (
            leaves(steps_of(table, own, **options))
            for table in (store.with_completion_columns(columns), memory)
        )
        assert len(disk) > 100
        assert disk == held


@pytest.mark.parametrize("score_prompt", [True, False])
def test_row_columns_follow_their_targets_into_packs(score_prompt):
    """A target's value stands on its row in whichever pack it lands; rows of scored prompts have none."""
    rng = np.random.default_rng(0)
    samples = []
    for i in range(17):
        prompt, own = int(rng.integers(1, 6)), tuple(rng.integers(1, 8, size=2).tolist())
        length = prompt + sum(own)
        scored = (np.arange(length) >= prompt) & (rng.random(length) < 0.7)
        scored[[prompt, -1]] = True
        samples.append(Sample(np.arange(length, dtype=np.int32) + 100 * i, scored, prompt, own))
    targets = np.concatenate([s.tokens_L[s.scored_L] for s in samples]).astype(np.float32)
    table = MemoryTable(samples, row_columns={"old_logprobs": -targets})
    seen = 0
    for step in steps_of(table, DataRank(), share_prefix=True, score_prompt=score_prompt):
        for rows in (batch.rows for batch in step.batches):
            column_N = rows.columns["old_logprobs"]
            assert column_N.dtype == torch.float32
            assert torch.equal(column_N.isnan(), rows.prompt_N)
            assert torch.equal(column_N[~rows.prompt_N], -rows.target_N[~rows.prompt_N].float())
            seen += int((~rows.prompt_N).sum())
    assert seen == 2 * len(targets)


def test_a_pack_of_padding_has_the_columns_too():
    """A loss reads its columns on every rank, also on one whose pack holds no sample."""
    sample = Sample(np.arange(4, dtype=np.int32), np.arange(4) > 1, 1, (3,))
    table = MemoryTable([sample], completion_columns={"a": np.ones(1)}, row_columns={"b": np.ones(2)})
    empty = [
        batch.rows
        for rank in range(8)  # the run has 2 samples
        for batch in steps_of(table, DataRank(ranks=8, rank=rank), share_prefix=True)[0].batches
        if not len(batch.rows.row_N)
    ]
    assert len(empty) == 6
    assert all(len(rows.columns["b"]) == len(rows.completions.columns["a"]) == 0 for rows in empty)


def test_a_column_of_another_length_is_refused():
    sample = Sample(np.arange(4, dtype=np.int32), np.arange(4) > 1, 1, (3,))
    with pytest.raises(ValueError, match="row column 'b' must have 2 values, got 3"):
        MemoryTable([sample], row_columns={"b": np.ones(3)})
    with pytest.raises(ValueError, match="completion column 'a' must have 1 values, got 2"):
        MemoryTable([sample], completion_columns={"a": np.ones(2)})
