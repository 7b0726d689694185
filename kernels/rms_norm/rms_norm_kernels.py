"""Triton kernels of the norm: each element is read once and written once; computed in fp32.

Shapes: R rows, which lie at two strides (tokens, heads of a token), C columns. With ADD the rows are those of a sum,
which is computed, rounded and stored first. Rows for which registers do not suffice in backward are read twice there,
piece by piece, the second time from a cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_COLUMNS = 16384  # a row is one tile
_WIDE = 8192  # columns, above which backward takes a row in pieces
_PIECE = 4096
_TILE = 2048  # elements of a program at a time, where rows are shorter
_MOST_PARTS = 256  # of the weight's gradient
_LEAST_ROWS = 8  # of a part


@triton.jit
def _norm_forward_kernel(
    x_ptr,
    residual_ptr,
    sum_ptr,
    weight_ptr,
    out_ptr,
    R,
    heads,
    of_token,
    of_head,
    C,
    eps,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < R)[:, None] & (column < C)
    place = row[:, None] * C + column
    dtype = out_ptr.dtype.element_ty
    x = tl.load(
        x_ptr + (row // heads * of_token + row % heads * of_head)[:, None] + column, mask=inside, other=0.0
    ).to(tl.float32)
    if ADD:
        rounded = (x + tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)).to(dtype)
        tl.store(sum_ptr + place, rounded, mask=inside)
        x = rounded.to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < C, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(x * x, axis=1) / C + eps)[:, None]
    normalised = (x * factor).to(dtype).to(tl.float32)  # rounded before it is scaled, as HF Llama does
    tl.store(out_ptr + place, (weight * normalised).to(dtype), mask=inside)


@triton.jit
def _norm_backward_kernel(
    x_ptr,
    weight_ptr,
    dout_ptr,
    dsum_ptr,
    dx_ptr,
    part_ptr,
    R,
    heads,
    of_token,
    of_head,
    C,
    eps,
    rows_of_part,
    ADD: tl.constexpr,
    WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    part = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)[None, :]
    dtype = dx_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + column, mask=column < C, other=0.0).to(tl.float32)
    dweight = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for first in range(0, rows_of_part, ROWS):
        row = part * rows_of_part + first + tl.arange(0, ROWS)
        inside = (row < R)[:, None] & (column < C)
        place = row[:, None] * C + column
        source = (row // heads * of_token + row % heads * of_head)[:, None] + column
        x = tl.load(x_ptr + source, mask=inside, other=0.0).to(tl.float32)
        dout = tl.load(dout_ptr + place, mask=inside, other=0.0).to(tl.float32)
        factor = tl.rsqrt(tl.sum(x * x, axis=1) / C + eps)[:, None]
        normalised = x * factor
        dnormalised = dout * weight
        along = (tl.sum(dnormalised * normalised, axis=1) / C)[:, None]
        dx = factor * (dnormalised - normalised * along)
        if ADD:
            dx += tl.load(dsum_ptr + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + place, dx.to(dtype), mask=inside)
        if WEIGHT:
            # Rows after the last are NaN where eps is 0.
            dweight += tl.where(inside, dout * normalised.to(dtype).to(tl.float32), 0.0)
    if WEIGHT:
        one_row = tl.sum(dweight, axis=0)[None, :]
        tl.store(part_ptr + part * C + column, one_row, mask=column < C)


@triton.jit
def _wide_norm_backward_kernel(
    x_ptr,
    weight_ptr,
    dout_ptr,
    dsum_ptr,
    dx_ptr,
    part_ptr,
    R,
    heads,
    of_token,
    of_head,
    C,
    eps,
    rows_of_part,
    ADD: tl.constexpr,
    WEIGHT: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    part = tl.program_id(0).to(tl.int64)
    dtype = dx_ptr.dtype.element_ty
    first = part * rows_of_part
    for row in range(first, tl.minimum(first + rows_of_part, R)):
        x_row = x_ptr + row // heads * of_token + row % heads * of_head
        squares = tl.zeros([COLUMNS], dtype=tl.float32)
        products = tl.zeros([COLUMNS], dtype=tl.float32)
        for start in range(0, C, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            x = tl.load(x_row + column, mask=column < C, other=0.0).to(tl.float32)
            dout = tl.load(dout_ptr + row * C + column, mask=column < C, other=0.0).to(tl.float32)
            weight = tl.load(weight_ptr + column, mask=column < C, other=0.0).to(tl.float32)
            squares += x * x
            products += dout * weight * x
        factor = tl.rsqrt(tl.sum(squares, axis=0) / C + eps)
        along = factor * tl.sum(products, axis=0) / C
        for start in range(0, C, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            place = row * C + column
            x = tl.load(x_row + column, mask=column < C, other=0.0).to(tl.float32)
            dout = tl.load(dout_ptr + place, mask=column < C, other=0.0).to(tl.float32)
            weight = tl.load(weight_ptr + column, mask=column < C, other=0.0).to(tl.float32)
            normalised = x * factor
            dx = factor * (dout * weight - normalised * along)
            if ADD:
                dx += tl.load(dsum_ptr + place, mask=column < C, other=0.0).to(tl.float32)
            tl.store(dx_ptr + place, dx.to(dtype), mask=column < C)
            if WEIGHT:
                share = dout * normalised.to(dtype).to(tl.float32)
                if row > first:
                    share += tl.load(part_ptr + part * C + column, mask=column < C, other=0.0)
                tl.store(part_ptr + part * C + column, share, mask=column < C)


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows of a tensor as the kernels see them.

    Attributes:
        x: ``[tokens, heads, C]``, columns contiguous; a copy only where no such view exists.
    """

    x: Tensor

    @classmethod
    def of(cls, x: Tensor) -> _Rows:
        x = x if x.stride(-1) == 1 else x.contiguous()
        return cls(x.reshape(-1, x.shape[-2] if x.dim() > 2 else 1, x.shape[-1]))

    @property
    def count(self) -> int:
        return self.x.shape[0] * self.x.shape[1]

    @property
    def arguments(self) -> tuple[int, int, int, int, int]:
        """R, heads, of_token, of_head and C of a kernel."""
        return self.count, self.x.shape[1], self.x.stride(0), self.x.stride(1), self.x.shape[2]

    @property
    def tile(self) -> dict[str, int]:
        columns = triton.next_power_of_2(self.x.shape[2])
        rows = max(1, _TILE // columns)
        warps = min(16, max(4, rows * columns // 512))
        return {"ROWS": rows, "COLUMNS": columns, "num_warps": warps}


def forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor | None]:
    """Return the norm and, given a residual, the sum that it is of; both contiguous, in the shape of ``x``."""
    rows, out = _Rows.of(x), x.new_empty(x.shape)
    total = None if residual is None else x.new_empty(x.shape)
    if rows.count:
        given = residual if residual is None else residual.contiguous()
        tile = rows.tile
        with torch.cuda.device_of(x):  # Triton launches on the current device
            _norm_forward_kernel[(triton.cdiv(rows.count, tile["ROWS"]),)](
                *(rows.x, given, total, weight, out),
                *(*rows.arguments, eps),
                ADD=residual is not None,
                **tile,
            )
    return out, total


def backward(
    x: Tensor, weight: Tensor, dout: Tensor, dsum: Tensor | None, eps: float, *, trained: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of the rows and, of a trained weight, of the weight.

    Args:
        x: the rows that were normalised.
        weight: ``[C]``.
        dout: gradient of the norm, contiguous.
        dsum: gradient of ``x`` from elsewhere, contiguous, which is added.
        eps: as in forward.
        trained: whether the weight is. Its gradient is summed in fp32, in an order that the shape alone decides.
    """
    rows, dx = _Rows.of(x), x.new_empty(x.shape)
    kernel, tile = _norm_backward_kernel, rows.tile
    each = triton.cdiv(max(_LEAST_ROWS, triton.cdiv(rows.count, _MOST_PARTS)), tile["ROWS"]) * tile["ROWS"]
    count = triton.cdiv(rows.count, each)
    parts = x.new_empty(count, x.shape[-1], dtype=torch.float32) if trained else None
    if tile["COLUMNS"] > _WIDE:
        kernel, tile = _wide_norm_backward_kernel, {"COLUMNS": _PIECE, "num_warps": 8}
    if count:
        with torch.cuda.device_of(x):
            kernel[(count,)](
                *(rows.x, weight, dout, dsum, dx, parts),
                *(*rows.arguments, eps, each),
                ADD=dsum is not None,
                WEIGHT=trained,
                **tile,
            )
    return dx, None if parts is None else parts.sum(0).to(weight.dtype)
