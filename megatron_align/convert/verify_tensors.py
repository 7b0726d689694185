"""Compare every tensor of a checkpoint with the Hugging Face folder's, byte for byte, streaming."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_align.convert.merged_state import MergedState
from megatron_align.convert.state_reader import StateReader
from megatron_align.hf.load import largest_difference, same_bytes
from megatron_align.hf.safetensors import BLOCK_ELEMENTS, DTYPES, HFWeights
from megatron_align.model.families import rows
from megatron_align.storage.progress import Progress
from megatron_align.storage.tensor_digest import count_nonfinite

DIFFERS = "differs"


@dataclass(frozen=True, slots=True)
class TensorFinding:
    """The comparison of one tensor; ``reason`` is empty if both sides are equal and finite."""

    name: str
    sha256: str  # of the checkpoint's bytes
    hf_sha256: str
    max_abs_difference: float
    reason: str


def compare_tensors(state: StateReader | MergedState, weights: HFWeights) -> Iterator[TensorFinding]:
    """Yield the comparison of every tensor. Memory: one row of the weight table, and one shard.

    Tensors that an adapter is merged into may differ by the rounding of their sums.
    """
    table = list(rows(state.shape))
    size = sum(weights.numel(name) * DTYPES[weights.dtype(name)].itemsize for row in table for name in row.hf)
    with Progress("comparing tensors", size) as progress:
        for row in table:
            for name, ours in state.read(row).items():
                finding = _compare(name, ours.reshape(-1), weights)
                if finding.reason == DIFFERS and isinstance(state, MergedState) and state.adapts(name):
                    finding = _within_rounding(finding, ours, state, weights)
                yield finding
                progress.add(weights.numel(name) * DTYPES[weights.dtype(name)].itemsize)


def _compare(name: str, ours: Tensor, weights: HFWeights) -> TensorFinding:
    hashes = hashlib.sha256(), hashlib.sha256()
    largest, equal, nonfinite = 0.0, True, [0, 0]
    for mine, theirs in zip(ours.split(BLOCK_ELEMENTS), weights.blocks(name), strict=True):
        for digest, part in zip(hashes, (mine, theirs), strict=True):
            digest.update(memoryview(part.view(torch.uint8).numpy()))
        if not same_bytes(mine, theirs):
            equal = False
            largest = torch.tensor([largest, largest_difference(mine, theirs)]).max().item()  # NaN wins
        nonfinite = [sum(pair) for pair in zip(nonfinite, count_nonfinite(mine), strict=True)]
    dtypes = [str(dtype).removeprefix("torch.") for dtype in (ours.dtype, DTYPES[weights.dtype(name)])]
    reason = ""
    if dtypes[0] != dtypes[1]:
        reason = "{} in the checkpoint, {} in the HF folder".format(*dtypes)
    elif not equal:
        reason = DIFFERS
    elif any(nonfinite):
        reason = f"not finite: {nonfinite[0]:,} NaN, {nonfinite[1]:,} infinite"
        largest = math.nan if nonfinite[0] else largest
    sha256, hf_sha256 = (digest.hexdigest() for digest in hashes)
    return TensorFinding(name, sha256, hf_sha256, largest, reason)


def _within_rounding(
    finding: TensorFinding, ours: Tensor, state: MergedState, weights: HFWeights
) -> TensorFinding:
    """Return the finding without its reason if every element is a correctly rounded sum."""
    theirs = torch.cat(list(weights.blocks(finding.name))).view(ours.shape)
    if ((ours.double() - theirs.double()).abs() <= state.rounding(finding.name, ours)).all():
        return replace(finding, reason="")
    return replace(finding, reason="differs by more than the rounding of W + scale B A")
