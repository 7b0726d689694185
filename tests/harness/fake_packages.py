"""Stand-ins for optional GPU packages: the signatures of the real ones, computed in plain PyTorch on any device.

Signatures are those of flash-attn 2.8.3, of ``hopper/flash_attn_interface.py`` of the same project, and of flash-attn-4
4.0.0b36.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F


def _documents(q, k, v, cu_q, cu_k, longest, scale, causal):
    """Attend within documents as PyTorch does; refuse what the real kernels refuse."""
    assert causal, "a causal mask is expected"
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert torch.equal(cu_q, cu_k)
    bounds = cu_q.tolist()
    assert bounds[0] == 0
    assert bounds[-1] == len(q) == len(k) == len(v), "rows after the last document would hold no numbers"
    assert longest == max(b - a for a, b in zip(bounds, bounds[1:], strict=False))
    copies = q.shape[1] // k.shape[1]
    outputs = []
    for start, end in zip(bounds, bounds[1:], strict=False):
        of_heads = (
            q[start:end],
            *(x[start:end].repeat_interleave(copies, dim=1) for x in (k, v)),
        )
        q_, k_, v_ = (x.transpose(0, 1)[None] for x in of_heads)
        out = F.scaled_dot_product_attention(q_, k_, v_, is_causal=True, scale=scale)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def _flash2(version: str = "2.8.3") -> dict[str, ModuleType]:
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        return _documents(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, softmax_scale, causal)

    module = ModuleType("flash_attn")
    module.__version__ = version  # type: ignore[attr-defined]
    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    return {"flash_attn": module}


def _flash3() -> dict[str, ModuleType]:
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        return _documents(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, softmax_scale, causal)

    module = ModuleType("flash_attn_interface")
    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    return {"flash_attn_interface": module}


def _flash4() -> dict[str, ModuleType]:
    def flash_attn_varlen_func(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None,
        softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1,
        pack_gqa=None, deterministic=False, score_mod=None, return_lse=False,
    ):  # fmt: skip
        out = _documents(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, softmax_scale, causal)
        return out, q.new_empty(q.shape[1], len(q), dtype=torch.float32)

    namespace, module = ModuleType("flash_attn"), ModuleType("flash_attn.cute")
    namespace.__path__ = []  # type: ignore[attr-defined]  # a namespace, as where flash-attn itself is absent
    module.__version__ = "4.0.0b36"  # type: ignore[attr-defined]
    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    return {"flash_attn": namespace, "flash_attn.cute": module}


FAKES: dict[str, Callable[..., dict[str, ModuleType]]] = {
    "flash2": _flash2,
    "flash3": _flash3,
    "flash4": _flash4,
}
REAL = ("flash_attn", "flash_attn.cute", "flash_attn_interface")


@contextmanager
def installed(*names: str, chip: tuple[int, int] | None = (9, 0), **options: Any) -> Iterator[None]:
    """Pretend that only these packages are installed, and that the GPU is of this capability; None: there is none.

    Args:
        names: keys of ``FAKES``.
        chip: compute capability.
        options: of the fakes.
    """
    modules: dict[str, Any] = dict.fromkeys(REAL)  # None: an import fails
    for name in names:
        modules |= FAKES[name](**options)
    with (
        mock.patch.dict(sys.modules, modules),
        mock.patch("megatron_align.model.optional_packages.capability", return_value=chip),
    ):
        yield
