"""Every tensor of a checkpoint, turned back to Hugging Face's, against the folder's: byte for byte, streaming."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_align.convert.state_reader import StateReader
from megatron_align.hf.load import largest_difference, same_bytes
from megatron_align.hf.safetensors import DTYPES, STRETCH, HFWeights
from megatron_align.model.families import rows
from megatron_align.storage.progress import Progress
from megatron_align.storage.tensor_digest import count_nonfinite


@dataclass(frozen=True, slots=True)
class TensorFinding:
    """One tensor on both sides; ``reason`` is empty if they are the same and finite."""

    name: str
    sha256: str  # of the checkpoint's bytes
    hf_sha256: str
    max_abs_difference: float
    reason: str


def compare_tensors(state: StateReader, weights: HFWeights) -> Iterator[TensorFinding]:
    """Yield what was found of every tensor. Memory: one row of the weight table, and one chunk."""
    table = list(rows(state.shape))
    size = sum(weights.numel(name) * DTYPES[weights.dtype(name)].itemsize for row in table for name in row.hf)
    with Progress("comparing tensors", size) as progress:
        for row in table:
            for name, ours in state.read(row).items():
                yield _compare(name, ours.reshape(-1), weights)
                progress.add(weights.numel(name) * DTYPES[weights.dtype(name)].itemsize)


def _compare(name: str, ours: Tensor, weights: HFWeights) -> TensorFinding:
    hashes = hashlib.sha256(), hashlib.sha256()
    apart, equal, spoilt = 0.0, True, [0, 0]
    for mine, theirs in zip(ours.split(STRETCH), weights.stretches(name), strict=True):
        for digest, part in zip(hashes, (mine, theirs), strict=True):
            digest.update(memoryview(part.view(torch.uint8).numpy()))
        if not same_bytes(mine, theirs):
            equal = False
            apart = torch.tensor([apart, largest_difference(mine, theirs)]).max().item()  # NaN wins
        spoilt = [sum(pair) for pair in zip(spoilt, count_nonfinite(mine), strict=True)]
    dtypes = [str(dtype).removeprefix("torch.") for dtype in (ours.dtype, DTYPES[weights.dtype(name)])]
    reason = ""
    if dtypes[0] != dtypes[1]:
        reason = "{} in the checkpoint, {} in the HF folder".format(*dtypes)
    elif not equal:
        reason = "differs"
    elif any(spoilt):
        reason = f"holds numbers that are not finite: {spoilt[0]:,} NaN, {spoilt[1]:,} infinite"
        apart = math.nan if spoilt[0] else apart
    return TensorFinding(name, *(digest.hexdigest() for digest in hashes), apart, reason)
