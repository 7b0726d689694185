"""The public function: validates its arguments and picks the Triton kernels or the CPU implementation."""

from __future__ import annotations

from torch import Tensor

from megatron_align.kernels.dispatch import is_interpreted, takes_triton
from megatron_align.kernels.packed_attention.cpu_per_document import attend_per_document
from megatron_align.kernels.packed_attention.layout import PackedLayout
from megatron_align.kernels.packed_attention.tiles import INTERPRETER, LARGEST_HEAD_DIM, chip_of, choose_tiles


def packed_attention(
    q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, layout: PackedLayout, *, scale: float | None = None
) -> Tensor:
    """Attend within each packed document, and from completions to their shared prompt.

    Args:
        q_THD: queries ``[T, H, D]``, or ``[Q, H, D]`` where the layout is for Q of them; last dimension contiguous.
        k_TGD: ``[T, G, D]`` keys; query head h reads key head ``h // (H // G)``.
        v_TGD: ``[T, G, D]`` values.
        layout: the intervals of exactly these queries over T tokens, on the same device.
        scale: factor on the scores, > 0. Default: ``D ** -0.5``.

    Returns:
        ``[Q, H, D]`` in the input dtype. Differentiable once in q, k and v, with the same bits each time.
        On GPU: bf16, fp16 and fp32, D up to 256 (64 and 128 are fast); on CPU any float and D.

    Raises:
        ValueError: on shapes, dtypes or devices that do not fit each other or the layout, or that the kernels do not
            support.
    """
    _check(q_THD, k_TGD, v_TGD, layout)
    scale = q_THD.shape[-1] ** -0.5 if scale is None else scale
    if not scale > 0:
        raise ValueError(f"packed_attention needs scale > 0; got {scale}")
    if not takes_triton(q_THD, "packed_attention"):
        return attend_per_document(q_THD, k_TGD, v_TGD, layout, scale)
    if q_THD.shape[-1] > LARGEST_HEAD_DIM:
        raise ValueError(f"packed_attention needs D <= {LARGEST_HEAD_DIM} on GPU; got D {q_THD.shape[-1]}")
    # Imported here: the CPU path must work without Triton.
    from megatron_align.kernels.packed_attention.autograd import attend

    dim, dtype = q_THD.shape[-1], q_THD.dtype
    tiles = INTERPRETER if is_interpreted() else choose_tiles(chip_of(q_THD.device), dim, dtype)
    return attend(q_THD, k_TGD, v_TGD, layout, scale, tiles)


def _check(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, layout: PackedLayout) -> None:
    tensors = (q_THD, k_TGD, v_TGD)
    shapes = [tuple(x.shape) for x in tensors]
    if [len(s) for s in shapes] != [3, 3, 3] or shapes[1] != shapes[2] or shapes[0][2] != shapes[1][2]:
        raise ValueError(f"packed_attention needs q [Q, H, D] and k, v [T, G, D]; got q, k, v {shapes}")
    if shapes[1][1] == 0 or shapes[0][1] % shapes[1][1]:
        raise ValueError(f"packed_attention needs H a multiple of G; got H {shapes[0][1]}, G {shapes[1][1]}")
    types = {(x.dtype, x.device) for x in tensors}
    if len(types) > 1:
        raise ValueError(
            f"packed_attention needs q, k, v of one dtype on one device; got {sorted(map(str, types))}"
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
