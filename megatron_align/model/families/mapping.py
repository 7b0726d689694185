"""The mapping between a Megatron tensor and the Hugging Face tensors that it is made of, segment by segment.

Every reader and writer of weights walks :func:`copy_segments`; nothing else interprets the rows of the weight table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_align.model.families.shape import ModelShape
from megatron_align.model.families.table import Row, local_shape, rank_slices


class Segment(NamedTuple):
    """``size`` equal indices along ``dim``: from ``hf_start`` on in an HF tensor, from ``start`` on in Megatron's.

    ``name`` is the HF tensor's; None: padding of the vocabulary, zeros that no HF tensor holds.
    """

    name: str | None
    hf_start: int
    start: int
    size: int
    dim: int

    def of_hf(self, tensor: Tensor) -> Tensor:
        """Return the view of the complete HF tensor."""
        return tensor.narrow(self.dim, self.hf_start, self.size)

    def of_megatron(self, tensor: Tensor) -> Tensor:
        """Return the view of the rank's Megatron tensor."""
        return tensor.narrow(self.dim, self.start, self.size)


def copy_segments(
    row: Row,
    shape: ModelShape,
    tensor_rank: int = 0,
    tensor_ranks: int = 1,
    *,
    dim: int | None = None,
    within: tuple[int, int] | None = None,
) -> Iterator[Segment]:
    """Yield the segments that make up one tensor rank's Megatron tensor, in its order.

    Args:
        row: of the weight table.
        shape: of the model.
        tensor_rank: whose tensor.
        tensor_ranks: that share the tensor.
        dim: dimension to walk along; None: ``row.split``. 0 walks rows even where ranks cut columns, on one rank.
        within: ``(start, stop)`` of the Megatron tensor along ``dim`` to clip to; starts still count from 0.

    Raises:
        InputError: the tensor ranks do not divide a dimension that they share.
    """
    low, high = within or (0, local_shape(row, shape, tensor_ranks)[row.split or 0 if dim is None else dim])
    position = 0
    for segment in _all_segments(row, shape, tensor_rank, tensor_ranks, dim):
        start, stop = max(low, position), min(high, position + segment.size)
        if start < stop:
            hf_start = segment.hf_start + start - position
            yield segment._replace(hf_start=hf_start, start=start, size=stop - start)
        position += segment.size


def _all_segments(
    row: Row, shape: ModelShape, tensor_rank: int, tensor_ranks: int, dim: int | None
) -> Iterator[Segment]:
    """Yield the segments of the entire tensor; their ``start`` is not set."""
    if dim in (None, row.split or 0):
        for part, start, stop in rank_slices(row, shape, tensor_rank, tensor_ranks):
            name = None if part is None else row.hf[part]
            yield Segment(name, start, 0, stop - start, row.split or 0)
        return
    # Cut along another dimension than the one walked: only one HF tensor, uncut, has the same order along both.
    if len(row.hf) > 1 or tensor_ranks > 1:
        raise ValueError(f"{row.megatron} can only be walked along dimension {row.split}")
    yield Segment(row.hf[0], 0, 0, row.hf_shapes(shape)[0][dim], dim)


def views_of_hf(row: Row, shard: Tensor, shape: ModelShape) -> dict[str, Tensor] | None:
    """Return the HF tensors as views of the only tensor rank's tensor; None: there they are interleaved."""
    segments = [segment for segment in copy_segments(row, shape) if segment.name is not None]
    views = {segment.name: segment.of_megatron(shard) for segment in segments if segment.name is not None}
    return views if len(views) == len(segments) else None


def to_hf(
    row: Row, shards: Sequence[Tensor], shape: ModelShape, empty: Callable[..., Tensor] = torch.empty
) -> dict[str, Tensor]:
    """Join the tensors of all tensor ranks, in order, into new HF tensors; vocabulary padding is dropped.

    Args:
        row: of the weight table.
        shards: of each tensor rank.
        shape: of the model.
        empty: makes the new tensors, as ``torch.empty`` does.
    """
    like = shards[0]
    tensors = {
        name: empty(size, dtype=like.dtype, device=like.device)
        for name, size in zip(row.hf, row.hf_shapes(shape), strict=True)
    }
    for rank, shard in enumerate(shards if row.split is not None else shards[:1]):
        for segment in copy_segments(row, shape, rank, len(shards)):
            if segment.name is not None:
                segment.of_hf(tensors[segment.name]).copy_(segment.of_megatron(shard.detach()))
    return tensors


def to_megatron(row: Row, tensors: Mapping[str, Tensor], shape: ModelShape) -> Tensor:
    """Return the Megatron tensor of a single tensor rank: the inverse of :func:`to_hf`."""
    joined = tensors[row.hf[0]].new_empty(local_shape(row, shape, 1))
    for segment in copy_segments(row, shape):
        target = segment.of_megatron(joined)
        if segment.name is None:
            target.zero_()
        else:
            target.copy_(segment.of_hf(tensors[segment.name]))
    return joined
