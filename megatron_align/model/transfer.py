"""Tensors to the GPU and numbers back without stalling it: pinned memory, a stream for copies, events not waits.

A copy from ordinary host memory, and every value that the host reads, holds the host until the GPU has done all that
was launched before: nothing is launched meanwhile, and the GPU runs dry. So a pack's tensors are laid into one pinned
block when it is made, in the prefetch thread, and copied one micro-batch ahead of their use on a stream of their own;
and a step's numbers are read once, together. On a CPU all of this is nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from megatron_align.model import cpu
from megatron_align.records import PackedBatch

ALIGNED = 16  # bytes: where tensors start in a block
# Bytes of a tensor in the block: a larger one (of a reference's top k) is freed when it is read.
LARGEST = 2**20


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on a device; the host does not wait for the copy."""
    if device.type == "cpu" or tensor.device.type != "cpu":
        return tensor.to(device)
    pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
    return pinned.to(device, non_blocking=True)


def pinned(batch: PackedBatch) -> PackedBatch:
    """Return a pack of the host with its tensors in pinned memory, side by side; without a GPU the pack itself."""
    return in_one_block(batch, pin=True) if torch.cuda.is_available() else batch


def in_one_block(batch: PackedBatch, *, pin: bool) -> PackedBatch:
    """Return a pack with its tensors of up to ``LARGEST`` in ``block``; ``pin``: in pinned memory, larger ones too."""
    tensors: list[Tensor] = []

    def note(x: Tensor) -> Tensor:
        tensors.append(x)
        return x

    batch.changed(note)
    starts, end = [], 0
    for x in tensors:
        starts.append(end)
        end += -(-_size(x) // ALIGNED) * ALIGNED if _size(x) <= LARGEST else 0
    block, at = torch.empty(end, dtype=torch.uint8, pin_memory=pin), iter(starts)

    def lay(x: Tensor) -> Tensor:
        start = next(at)
        if _size(x) > LARGEST:
            return x.pin_memory() if pin else x
        laid = _piece(block, start, x)
        laid.copy_(x)
        return laid

    return replace(batch.changed(lay), block=block)


def packs_on_device(batches: Sequence[PackedBatch]) -> Iterator[PackedBatch]:
    """Yield packs of the host on this rank's device, the copy of the next one under way."""
    if not torch.cuda.is_available():
        yield from batches
        return
    following = _start_copy(batches[0]) if batches else None
    for i in range(len(batches)):
        assert following is not None, "there is a pack"
        batch, made, end = following
        following = _start_copy(batches[i + 1]) if i + 1 < len(batches) else None
        use = torch.cuda.current_stream()
        use.wait_event(end)
        for x in made:
            x.record_stream(use)  # their memory is the other stream's: it is not given away before it is read
        yield batch


def _start_copy(batch: PackedBatch) -> tuple[PackedBatch, list[Tensor], torch.cuda.Event]:
    """Launch the copy of a pack; return it on the device, the tensors that own its memory, and the end of the copy."""
    device, stream = cpu.device(), _copies()
    with torch.cuda.stream(stream):
        return *copied(batch, lambda x: to_device(x, device)), stream.record_event()


def copied(batch: PackedBatch, copy: Callable[[Tensor], Tensor]) -> tuple[PackedBatch, list[Tensor]]:
    """Copy a pack: its block at once, other tensors of the host one by one; return it and the copies.

    Columns that a pre-pass has added are not in the block, and may be on the device already.
    """
    made: list[Tensor] = []

    def kept(x: Tensor) -> Tensor:
        made.append(copy(x))
        return made[-1]

    block = None if batch.block is None else kept(batch.block)

    def moved(x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return x
        if block is not None and _is_within(x, batch.block):
            return _piece(block, int(x.storage_offset()) * x.element_size(), x)
        return kept(x)

    return batch.changed(moved), made


def _size(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _piece(block: Tensor, start: int, like: Tensor) -> Tensor:
    """Return the bytes from ``start`` on as a tensor of the dtype and shape of another."""
    return block[start : start + _size(like)].view(like.dtype).view(like.shape)


def _is_within(x: Tensor, block: Tensor | None) -> bool:
    return block is not None and x.untyped_storage().data_ptr() == block.untyped_storage().data_ptr()


@cache
def _copies() -> torch.cuda.Stream:
    """Return the stream of copies to the GPU."""
    return torch.cuda.Stream()


class HostRead:
    """Numbers of the device on their way to the host, which waits for them only when they are read.

    Args:
        values: one dimension.
    """

    def __init__(self, values: Tensor):
        self._values, self._copied = values, None
        if values.device.type != "cpu":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._copied = torch.cuda.current_stream().record_event()

    def read(self) -> list[float]:
        """Return the numbers; waits for what was launched before the object was made, and for nothing later."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.tolist()
