"""flash-attn's kernels in the place of ours, for packs of separate documents (``model.attention: flash``).

Three packages offer ``flash_attn_varlen_func``: flash-attn 2.8 (FlashAttention-2; Dao 2023, arXiv:2307.08691),
``flash_attn_interface``, built from that project's ``hopper`` folder (FlashAttention-3; Shah et al. 2024,
arXiv:2407.08608), and flash-attn-4 (``flash_attn.cute``, compiled when it is first used). The order of their arguments
differs, so all are passed by name; the third returns the log-sum-exp as well. Their deterministic backward is used, as
a resumed run has to repeat its numbers. None of them knows prompts that several completions share.

Shapes: T tokens of a pack, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from megatron_align.errors import InputError, require
from megatron_align.kernels import PackedLayout
from megatron_align.model.optional_packages import (
    at_least,
    chip_name,
    import_or_reason,
    require_gpu,
    version_of,
)

OPTION = "model.attention: flash"
_ARGUMENTS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale", "causal")


@dataclass(frozen=True, slots=True)
class Documents:
    """The boundaries of a pack's documents, as variable-length kernels take them.

    Args:
        starts: int32, the first token of each document and the end of the last, on the device.
        longest: tokens of the longest document.
        tokens: of all documents; those after them are padding.
    """

    starts: Tensor
    longest: int
    tokens: int

    @classmethod
    def of_layout(cls, layout: PackedLayout) -> Documents:
        """Return the documents of a layout, in the order of the pack, without a wait for the device.

        Raises:
            ValueError: prompts are shared, or the layout is a context-parallel rank's share.
        """
        if not layout.covers_all_queries or any(len(completions) > 1 for _, completions in layout.groups):
            raise ValueError("attention by documents needs complete packs without shared prompts")
        lengths = [prompt + sum(completions) for prompt, completions in layout.groups]
        lengths = [length for length in lengths if length]
        device = layout.own_start_Q.device
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, pin_memory=device.type == "cuda")
        return cls(ends.to(device, non_blocking=True), max(lengths, default=0), sum(lengths))


def attend_documents(
    q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, documents: Documents, kernel: Callable[..., Tensor]
) -> Tensor:
    """Return attention ``[T, H, D]`` of a kernel that takes documents only; padding sees only itself.

    Args:
        q_THD: queries.
        k_TGD: keys.
        v_TGD: values.
        documents: of the pack.
        kernel: from the rows of documents in queries, keys and values to those of the output.
    """
    used = documents.tokens
    padding = v_TGD[used:].repeat_interleave(q_THD.shape[1] // k_TGD.shape[1], dim=1)
    if not used:
        return padding
    out = kernel(*(x[:used] for x in (q_THD, k_TGD, v_TGD)))
    return torch.cat([out, padding]) if len(padding) else out


@dataclass(frozen=True, slots=True)
class FlashKernels:
    """One of the packages.

    Args:
        name: with its version, for messages.
        function: ``flash_attn_varlen_func``.
    """

    name: str
    function: Callable[..., Any]

    def __call__(
        self, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, documents: Documents, scale: float | None
    ) -> Tensor:
        """Return causal attention ``[T, H, D]`` within each document; padding sees only itself."""

        def kernel(*qkv: Tensor) -> Tensor:
            result = self.function(
                *qkv,
                cu_seqlens_q=documents.starts,
                cu_seqlens_k=documents.starts,
                max_seqlen_q=documents.longest,
                max_seqlen_k=documents.longest,
                softmax_scale=scale,
                causal=True,
                deterministic=True,
            )
            return result[0] if isinstance(result, tuple) else result

        return attend_documents(q_THD, k_TGD, v_TGD, documents, kernel)


def find_flash(head_dim: int) -> FlashKernels:
    """Return the package that suits this process's GPU best.

    Args:
        head_dim: of the model.

    Raises:
        InputError: no GPU, no package that it can use, only one that is too old, or none with this head dimension.
    """
    chip = require_gpu(OPTION)
    finders = {8: [_flash2], 9: [_flash3, _flash4, _flash2], 10: [_flash4, _flash2], 12: [_flash2]}.get(
        chip[0]
    )
    require(
        finders is not None,
        f"{OPTION} needs a GPU of sm_80 or newer, got {chip_name(chip)}: use model.attention: auto",
    )
    assert finders is not None, "just checked"
    reasons = []
    for find in finders:
        found = find(head_dim, chip)
        if isinstance(found, FlashKernels):
            return found
        reasons.append(found)
    raise InputError(
        f"{OPTION} needs flash-attn for {chip_name(chip)} and head dimension {head_dim}: {'; '.join(reasons)} "
        "(pip install flash-attn>=2.8 --no-build-isolation, or use model.attention: auto)"
    )


def _flash2(head_dim: int, chip: tuple[int, int]) -> FlashKernels | str:
    module = import_or_reason("flash_attn")
    if isinstance(module, str):
        return f"flash-attn: {module}"
    version = version_of(module, "flash-attn")
    if not hasattr(module, "flash_attn_varlen_func"):  # a namespace of flash-attn-4
        return "flash-attn: not installed"
    if not at_least(version, "2.8"):
        return f"flash-attn: {version} is installed, 2.8 or newer is needed"
    if head_dim > 256 or head_dim % 8:
        return f"flash-attn {version}: head dimensions are multiples of 8 up to 256"
    return _checked(f"flash-attn {version}", module.flash_attn_varlen_func)


def _flash3(head_dim: int, chip: tuple[int, int]) -> FlashKernels | str:
    module = import_or_reason("flash_attn_interface")
    if isinstance(module, str):
        return f"flash_attn_interface (FlashAttention-3): {module}"
    if head_dim > 256 or head_dim % 8:
        return "flash_attn_interface (FlashAttention-3): head dimensions are multiples of 8 up to 256"
    return _checked("FlashAttention-3", module.flash_attn_varlen_func)


def _flash4(head_dim: int, chip: tuple[int, int]) -> FlashKernels | str:
    module = import_or_reason("flash_attn.cute")
    if isinstance(module, str):
        return f"flash-attn-4: {module}"
    version = version_of(module, "flash-attn-4")
    fits = head_dim <= 256 if chip[0] == 9 else head_dim <= 128 or head_dim == 256
    if head_dim % 8 or not fits:
        most = "up to 256" if chip[0] == 9 else "up to 128, or 256"
        return f"flash-attn-4 {version}: head dimensions on {chip_name(chip)} are multiples of 8 {most}"
    return _checked(f"flash-attn-4 {version}", module.flash_attn_varlen_func)


def _checked(name: str, function: Callable[..., Any]) -> FlashKernels | str:
    """Return the kernels, or what their function lacks: interfaces of builds from source have no version."""
    lacking = [x for x in (*_ARGUMENTS, "deterministic") if x not in inspect.signature(function).parameters]
    return (
        f"{name}: flash_attn_varlen_func has no {', '.join(lacking)}"
        if lacking
        else FlashKernels(name, function)
    )
