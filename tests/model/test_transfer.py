"""A pack is copied to a GPU at once, from one block, and arrives with the same values; numbers are read as they are."""

from dataclasses import replace

import numpy as np
import torch

from megatron_align.data.batching.collate import PackValues, pack
from megatron_align.data.batching.context_parts import ContextRank, take_part
from megatron_align.model import transfer
from megatron_align.records import Columns, PackedBatch, Sample


def _tensors(batch: PackedBatch) -> list[torch.Tensor]:
    found = []
    batch.changed(lambda x: found.append(x) or x)
    return found


def _pack() -> PackedBatch:
    draw = np.random.default_rng(0)
    samples = []
    for prompt, lengths in ((5, (3, 4)), (2, (7, 1))):
        scored = np.arange(prompt + sum(lengths)) >= prompt
        tokens = draw.integers(0, 99, len(scored)).astype(np.int32)
        samples.append(Sample(tokens, scored, prompt_length=prompt, completion_lengths=lengths))
    likeliest = draw.integers(0, 99, (15, 6)).astype(np.int32)
    values = PackValues(np.ones(4), np.ones(4), {"reference_logprobs": draw.random(4)}, {"tokens": likeliest})
    return take_part(
        pack(samples, [0.5, 0.25], 24, values=values), ContextRank(ranks=2, rank=1, kind="allgather")
    )


def test_a_block_holds_a_pack_and_its_copy_the_same_values(monkeypatch):
    batch = _pack()
    monkeypatch.setattr(transfer, "LARGEST", batch.rows.columns["tokens"].nbytes - 1)
    laid = transfer.in_one_block(batch, pin=False)
    completions = replace(laid.rows.completions, columns=Columns(added=torch.rand(4)))  # by a pre-pass
    laid = replace(laid, rows=replace(laid.rows, completions=completions))
    moved, made = transfer.copied(laid, torch.clone)
    assert [x.shape for x in made[1:]] == [
        (15, 6),
        (4,),
    ]  # all but the large one and the later one are in the block
    assert laid.block is not None
    laid.block.fill_(0)  # the copy does not depend on it any more
    expected = replace(
        batch,
        rows=replace(batch.rows, completions=replace(batch.rows.completions, columns=completions.columns)),
    )
    for old, new in zip(_tensors(expected), _tensors(moved), strict=True):
        assert old.dtype == new.dtype
        assert torch.equal(old, new) or old.isnan().all()
    assert np.array_equal(moved.rows.rows_on_host(), batch.rows.row_N.numpy())


def test_numbers_are_read_as_they_are():
    values = torch.tensor([0.1, float("nan"), 1e300], dtype=torch.float64)
    assert str(transfer.HostRead(values).read()) == str(values.tolist())
