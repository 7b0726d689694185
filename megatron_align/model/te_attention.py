"""Transformer Engine's attention in the place of ours, for packs of separate documents (``model.attention: te``).

``DotProductAttention`` with packed (THD) queries, keys and values takes cuDNN's or flash-attn's kernels, by chip and
shape. It would fall back to a dense computation in PyTorch without a word; that is switched off, as is a backward pass
that does not repeat its numbers, by the environment variables of Transformer Engine, unless the user has set them. Its
modules are made for the heads that arrive, as context-parallel ranks exchange heads before; they hold no parameters.

Semantics follow ``transformer_engine/pytorch/attention/dot_product_attention`` of 2.20.2.

Shapes: T tokens of a pack, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

from megatron_align.errors import InputError, require
from megatron_align.model.flash import Documents, attend_documents
from megatron_align.model.te_linear import require_te

OPTION = "model.attention: te"
SETTINGS = {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0", "NVTE_UNFUSED_ATTN": "0"}
_NO_KERNEL = "No dot product attention backend"  # how its ValueError begins


def require_te_attention(head_dim: int) -> Any:
    """Return ``transformer_engine.pytorch``, whose attention takes this head dimension.

    Raises:
        InputError: as :func:`.te_linear.require_te`, or the head dimension is none of cuDNN's and flash-attn's.
    """
    te = require_te(OPTION, "model.attention: auto")
    require(
        head_dim % 8 == 0 and head_dim <= 256,
        f"{OPTION}: head dimensions are multiples of 8 up to 256, got {head_dim}: use model.attention: auto",
    )
    return te


class TeAttention:
    """Causal attention within the documents of a pack.

    Args:
        head_dim: of the model.

    Raises:
        InputError: as :func:`require_te_attention`.
    """

    def __init__(self, head_dim: int):
        self._te = require_te_attention(head_dim)
        self._modules: dict[tuple[int, int, float | None], Any] = {}

    def __call__(
        self, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, documents: Documents, scale: float | None
    ) -> Tensor:
        """Return causal attention ``[T, H, D]`` within each document; padding sees only itself.

        Raises:
            InputError: Transformer Engine has no kernel for this chip, shape and precision.
        """
        module = self._module(q_THD.shape[1], k_TGD.shape[1], q_THD.shape[2], scale)

        def kernel(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> Tensor:
            try:
                out = module(
                    q_THD,
                    k_TGD,
                    v_TGD,
                    qkv_format="thd",
                    cu_seqlens_q=documents.starts,
                    cu_seqlens_kv=documents.starts,
                    max_seqlen_q=documents.longest,
                    max_seqlen_kv=documents.longest,
                    attn_mask_type="padding_causal",
                )
            except ValueError as error:
                if not str(error).startswith(_NO_KERNEL):
                    raise
                raise InputError(
                    f"{OPTION}: transformer-engine has no kernel for {q_THD.shape[1]} heads of dimension "
                    f"{q_THD.shape[2]} over {k_TGD.shape[1]}, {q_THD.dtype}: start with NVTE_DEBUG=1 "
                    "NVTE_DEBUG_LEVEL=2 to see why, install flash-attn, or use model.attention: auto"
                ) from error
            return out.view(q_THD.shape)

        return attend_documents(q_THD, k_TGD, v_TGD, documents, kernel)

    def _module(self, heads: int, groups: int, head_dim: int, scale: float | None) -> Any:
        """Return the module for so many heads of this rank."""
        key = (heads, groups, scale)
        if key not in self._modules:
            for name, value in SETTINGS.items():  # read when modules are made, and when they choose a kernel
                os.environ.setdefault(name, value)
            self._modules[key] = self._te.DotProductAttention(
                heads,
                head_dim,
                num_gqa_groups=groups,
                attention_dropout=0.0,
                qkv_format="thd",
                attn_mask_type="padding_causal",
                softmax_scale=scale,
            )
        return self._modules[key]
