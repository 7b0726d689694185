"""Attention over packed documents and shared prompts: each token sees two intervals, no mask exists.

Token ``t`` attends to ``[prefix_start_t, prefix_end_t)`` and ``[own_start_t, t]``: packed documents (empty prefix),
preference pairs and groups of completions of one prompt. The layout says the same from the key's side, and may be for
some of the queries only, over the keys of the whole pack: what a context-parallel rank computes.

Shapes: T tokens of a pack, Q queries (T of them, or a rank's share), H query heads, G key/value heads, D head dim.
Precision: scores and softmax in fp32 at least, result in the input dtype. fp32 is exact fp32, never TF32.
Where: Triton kernels on GPU (``forward.py``, ``backward.py``), PyTorch per document on CPU (``per_document.py``);
``TRITON_INTERPRET=1`` runs the kernels on CPU tensors.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from megatron_align.kernels.packed_attention.configs import INTERPRETER, LARGEST_HEAD_DIM, chip_of, choose
from megatron_align.kernels.packed_attention.layout import PackedLayout
from megatron_align.kernels.packed_attention.per_document import per_document
from megatron_align.kernels.packed_attention.reference import packed_attention_reference

__all__ = ["PackedLayout", "packed_attention", "packed_attention_reference"]


def packed_attention(
    q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, layout: PackedLayout, *, scale: float | None = None
) -> Tensor:
    """Attend within each packed document, and from completions to their shared prompt.

    Args:
        q_THD: queries ``[T, H, D]``, or ``[Q, H, D]`` where the layout is for Q of them; last dimension contiguous.
        k_TGD: ``[T, G, D]`` keys; query head h reads key head ``h // (H // G)``.
        v_TGD: ``[T, G, D]`` values.
        layout: who attends to whom: exactly these queries over T tokens, on the same device.
        scale: factor on the scores, > 0. Default: ``D ** -0.5``.

    Returns:
        Of the queries' shape, in the input dtype. Differentiable in q, k and v (once), with the same bits each time.
        On GPU: bf16, fp16 and fp32, D up to 256 (64 and 128 are fast); on CPU any float and D.

    Raises:
        ValueError: on shapes, dtypes or devices that do not fit each other or the layout, or that the
            kernels do not know.
    """
    _check(q_THD, k_TGD, v_TGD, layout)
    scale = q_THD.shape[-1] ** -0.5 if scale is None else scale
    if not scale > 0:
        raise ValueError(f"packed_attention needs scale > 0; got {scale}")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if q_THD.device.type == "cpu" and not interpreted:
        return per_document(q_THD, k_TGD, v_TGD, layout, scale)
    _check_kernels_know(q_THD, interpreted)
    # Here, not above: a laptop without Triton trains on CPU too.
    from megatron_align.kernels.packed_attention.autograd import attend

    tiles = INTERPRETER if interpreted else choose(chip_of(q_THD.device), q_THD.shape[-1], q_THD.dtype)
    return attend(q_THD, k_TGD, v_TGD, layout, scale, tiles)


def _check(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, layout: PackedLayout) -> None:
    tensors = (q_THD, k_TGD, v_TGD)
    shapes = [tuple(x.shape) for x in tensors]
    if [len(s) for s in shapes] != [3, 3, 3] or shapes[1] != shapes[2] or shapes[0][2] != shapes[1][2]:
        raise ValueError(f"packed_attention needs q [Q, H, D] and k, v [T, G, D]; got q, k, v {shapes}")
    if shapes[1][1] == 0 or shapes[0][1] % shapes[1][1]:
        raise ValueError(f"packed_attention needs H a multiple of G; got H {shapes[0][1]}, G {shapes[1][1]}")
    kinds = {(x.dtype, x.device) for x in tensors}
    if len(kinds) > 1:
        raise ValueError(
            f"packed_attention needs q, k, v of one dtype on one device; got {sorted(map(str, kinds))}"
        )
    if (layout.queries, layout.tokens) != (shapes[0][0], shapes[1][0]):
        raise ValueError(
            f"packed_attention needs a layout of Q = {shapes[0][0]} queries over T = {shapes[1][0]} tokens; it has "
            f"{layout.queries} over {layout.tokens}"
        )
    if layout.own_start_Q.device != q_THD.device:
        raise ValueError(
            f"packed_attention needs the layout on the tensors' device {q_THD.device}; it is on "
            f"{layout.own_start_Q.device}: use layout.to(device)"
        )
    if any(x.stride(-1) != 1 for x in tensors if x.numel() > 1):
        strides = [x.stride() for x in tensors]
        raise ValueError(f"packed_attention needs the last dimension contiguous; got strides {strides}")


def _check_kernels_know(q_THD: Tensor, interpreted: bool) -> None:
    if interpreted and q_THD.dtype == torch.bfloat16:
        raise ValueError(
            "packed_attention needs fp32 or fp16 under TRITON_INTERPRET=1; got bf16, whose bit patterns Triton's "
            "interpreter multiplies as integers"
        )
    if q_THD.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"packed_attention needs bf16, fp16 or fp32 on {q_THD.device}; got {q_THD.dtype}")
    if q_THD.shape[-1] > LARGEST_HEAD_DIM:
        raise ValueError(f"packed_attention needs D <= {LARGEST_HEAD_DIM} on GPU; got D {q_THD.shape[-1]}")
