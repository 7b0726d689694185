"""The CPU implementation: PyTorch's flash attention on each document, and on each prompt for all its completions.

Completions after the first attend to their shared prompt in one call without a mask and each to itself in one causal
call; the log-sum-exps merge the two results, so that no key is copied. Without Triton.

Shapes: T tokens of a pack, Q queries, H query heads, G key/value heads, D head dim; in a call R queries and S keys, the
heads as ``[G, H / G]``, so that query heads share keys without a copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_align.kernels.packed_attention.layout import PackedLayout

# What torch.nn.functional.scaled_dot_product_attention calls on a CPU; it does not return the log-sum-exp.
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

_Tensors = tuple[Tensor, Tensor, Tensor]


class _Call(NamedTuple):
    """One call: these rows of queries attend to these keys."""

    rows: slice
    keys: slice
    causal: bool
    mask_RS: Tensor | None = None


class _Calls(NamedTuple):
    """The calls of a layout: each query in one of ``own``, some in one of ``prompts`` too, or one of the padding."""

    own: list[_Call]
    prompts: list[_Call]
    padding: slice  # rows, at these positions
    padding_P: Tensor


def attend_per_document(
    q_QHD: Tensor, k_TGD: Tensor, v_TGD: Tensor, layout: PackedLayout, scale: float
) -> Tensor:
    """Return the attention of all documents, any dtype. Arguments as :func:`packed_attention`."""
    out_QHD: Tensor = _AttendPerDocument.apply(q_QHD, k_TGD, v_TGD, layout, scale)
    return out_QHD


class _AttendPerDocument(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_QHD: Tensor, k_TGD: Tensor, v_TGD: Tensor, layout: PackedLayout, scale: float
    ) -> Tensor:
        calls = _calls(layout)
        queries, heads, _ = q_QHD.shape
        out_QHD = torch.empty_like(q_QHD, memory_format=torch.contiguous_format)
        lse_QH = q_QHD.new_empty(queries, heads, dtype=torch.promote_types(q_QHD.dtype, torch.float32))
        inputs = q_QHD, k_TGD, v_TGD
        for call in calls.own:
            out_QHD[call.rows], lse_QH[call.rows] = _attend(call, inputs, scale)
        for call in calls.prompts:
            part_RHD, part_RH = _attend(call, inputs, scale)
            _merge(out_QHD[call.rows], lse_QH[call.rows], part_RHD, part_RH)
        out_QHD[calls.padding] = v_TGD[calls.padding_P].repeat_interleave(heads // v_TGD.shape[1], 1)
        ctx.save_for_backward(q_QHD, k_TGD, v_TGD, out_QHD, lse_QH)
        ctx.calls, ctx.scale = calls, scale
        return out_QHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_QHD: Tensor) -> tuple[Tensor | None, ...]:
        q_QHD, k_TGD, v_TGD, out_QHD, lse_QH = ctx.saved_tensors
        calls = ctx.calls
        dout_QHD = dout_QHD.contiguous()
        dq_QHD, dk_TGD, dv_TGD = (
            torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q_QHD, k_TGD, v_TGD)
        )
        dv_TGD[calls.padding_P] = dout_QHD[calls.padding].unflatten(1, (v_TGD.shape[1], -1)).sum(2)
        inputs, results = (q_QHD, k_TGD, v_TGD), (dout_QHD, out_QHD, lse_QH)
        for call in (*calls.own, *calls.prompts):
            dq_RHD, dk_SGD, dv_SGD = _gradients(call, inputs, results, ctx.scale)
            dq_QHD[call.rows] += dq_RHD
            dk_TGD[call.keys] += dk_SGD
            dv_TGD[call.keys] += dv_SGD
        return dq_QHD, dk_TGD, dv_TGD, None, None


def _calls(layout: PackedLayout) -> _Calls:
    """Return the calls of a layout; with the queries of one context-parallel rank, of those it has."""
    positions_Q = layout.own_end_Q - 1
    documents = list(_documents(layout.groups))
    ends = torch.searchsorted(
        positions_Q, torch.tensor([own.stop for _, own in documents], dtype=torch.int32)
    )
    own_calls: list[_Call] = []
    prompt_calls: list[_Call] = []
    row = 0
    for (prompt, own), end in zip(documents, ends.tolist(), strict=True):
        if end > row:
            own = slice(own.start, int(positions_Q[end - 1]) + 1)  # no query here sees later keys
            own_calls.append(_own_call(slice(row, end), own, positions_Q))
            if prompt.stop > prompt.start:
                shared = prompt_calls and prompt_calls[-1].keys == prompt
                first = prompt_calls.pop().rows.start if shared else row
                prompt_calls.append(_Call(slice(first, end), prompt, causal=False))
        row = end
    return _Calls(own_calls, prompt_calls, slice(row, layout.queries), positions_Q[row:].long())


def _documents(groups: tuple[tuple[int, tuple[int, ...]], ...]) -> Iterator[tuple[slice, slice]]:
    """Yield each causal document as (prompt that it shares, its own tokens), in order of position."""
    start = 0
    for prompt, completions in groups:
        # The prompt and its first completion are one causal document.
        end = start + prompt + sum(completions[:1])
        yield slice(start, start), slice(start, end)
        for length in completions[1:]:
            yield slice(start, start + prompt), slice(end, end + length)
            end += length
        start = end


def _own_call(rows: slice, own: slice, positions_Q: Tensor) -> _Call:
    if own.stop - own.start == rows.stop - rows.start:
        return _Call(rows, own, causal=True)
    return _Call(
        rows, own, causal=False, mask_RS=torch.arange(own.start, own.stop) <= positions_Q[rows, None]
    )


def _attend(call: _Call, inputs: _Tensors, scale: float) -> tuple[Tensor, Tensor]:
    """Return the outputs ``[R, H, D]`` and log-sum-exps ``[R, H]`` of one call, given q, k and v."""
    q, k, v = _views(call, *inputs)
    out, lse = _FLASH(q, k, v, 0.0, call.causal, attn_mask=_bias(call, q), scale=scale)
    return _rows(out), lse.permute(2, 0, 1).flatten(1)


def _gradients(call: _Call, inputs: _Tensors, results: _Tensors, scale: float) -> _Tensors:
    """Return one call's part of the gradients: ``[R, H, D]`` and twice ``[S, G, D]``.

    Args:
        inputs: q, k and v.
        results: the output's gradient, and the merged output and log-sum-exps of all calls.
    """
    q, k, v = _views(call, *inputs)
    dout, out = (_queries(x, call, k.shape[0]) for x in results[:2])
    lse = results[2][call.rows].unflatten(1, (k.shape[0], -1)).permute(1, 2, 0)
    mask = _bias(call, q)
    dq, dk, dv = _FLASH_BACKWARD(dout, q, k, v, out, lse, 0.0, call.causal, attn_mask=mask, scale=scale)
    dk_SGD, dv_SGD = (x.sum(1).transpose(0, 1) for x in (dk, dv))
    return _rows(dq), dk_SGD, dv_SGD


def _views(call: _Call, q_QHD: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> _Tensors:
    """View a call's queries as ``[G, H / G, R, D]``, its keys and values as ``[G, H / G, S, D]``."""
    q = _queries(q_QHD, call, k_TGD.shape[1])
    k, v = (x[call.keys].transpose(0, 1)[:, None].expand(-1, q.shape[1], -1, -1) for x in (k_TGD, v_TGD))
    return q, k, v


def _queries(x_QHD: Tensor, call: _Call, groups: int) -> Tensor:
    """View a call's rows as ``[G, H / G, R, D]``."""
    return x_QHD[call.rows].unflatten(1, (groups, -1)).permute(1, 2, 0, 3)


def _rows(x: Tensor) -> Tensor:
    """View ``[G, H / G, R, D]`` as ``[R, H, D]``."""
    return x.permute(2, 0, 1, 3).flatten(1, 2)


def _bias(call: _Call, q: Tensor) -> Tensor | None:
    """Return a call's mask as numbers that are added to the scores; flash attention takes no other."""
    if call.mask_RS is None:
        return None
    return torch.zeros_like(call.mask_RS, dtype=q.dtype).masked_fill_(~call.mask_RS, float("-inf"))


def _merge(out_RHD: Tensor, lse_RH: Tensor, part_RHD: Tensor, part_RH: Tensor) -> None:
    """Merge in place the attention over further keys into that over the first ones."""
    merged_RH = torch.logaddexp(lse_RH, part_RH)
    weight_RH1, part_RH1 = ((x - merged_RH).exp_()[..., None] for x in (lse_RH, part_RH))
    out_RHD.copy_(out_RHD * weight_RH1 + part_RHD * part_RH1)
    lse_RH.copy_(merged_RH)
