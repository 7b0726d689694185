"""A transformer layer of megatron-core's modules and our norm, and the recomputation of its activations.

Shapes: T tokens of the pack (T / TP on each rank between layers under sequence parallel), H hidden.

Saved for backward, by ``train.recompute_layers`` (k) and ``train.recompute_modules``:

- k layers: only the input of every k-th layer; the k layers run again, all of their activations in memory at once.
- attention: query, key and value before their rotation, not the intermediate results of attention.
- mlp: the input of the feed-forward network.
- norms: the input of each layer's two norms; their output is freed and recomputed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from megatron_align.kernels import add_rms_norm, rms_norm
from megatron_align.kernels.dispatch import takes_triton
from megatron_align.model import cpu
from megatron_align.model.adapted_linear import ColumnLinear, RowLinear
from megatron_align.model.attention import PackedCoreAttention
from megatron_align.model.dropout import current_keys, dropout_keys
from megatron_align.model.families import ModelShape
from megatron_align.model.feed_forward import SwiGLU
from megatron_align.model.freed_output import FreedOutput
from megatron_align.model.kernel_choice import KernelChoice
from megatron_align.model.te_linear import te_linears
from megatron_align.model.trained_copy import weight_in_use

RECOMPUTE_MODULES = {
    "attention": "core_attn",
    "mlp": "mlp",
    "norms": "layernorm",
}  # our names -> megatron-core's


class RMSNorm(nn.Module):
    """Root-mean-square norm in fp32, scaled in the input dtype as HF Llama does. Zhang and Sennrich 2019."""

    recomputed = False  # whether the output is freed until backward, see ``free_output``
    _ahead: tuple[Tensor, Tensor] | None = None  # a sum and its norm, until the norm is taken

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: object):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=cpu.device()))
        # Each rank normalises its tokens only: megatron-core then sums this gradient over tensor-parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.register_module("adapter", None)  # a trained copy

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalise the last dimension; keeps shape and dtype.

        Given a residual, return the sum instead. Its norm is computed in the same pass and kept for the next call,
        which returns it if it is for that sum.
        """
        if residual is not None:
            total, normalised = add_rms_norm(x, residual, weight_in_use(self), self.eps)
            self._ahead = total, normalised
            return total
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] is x:
            return ahead[1]
        if not self._frees_output():
            return self._normalise(x)
        self._freed = FreedOutput(self._normalise)
        return self._freed.run(x)

    def follows_sum(self, x: Tensor) -> bool:
        """Return whether a sum with ``x`` should be computed by this norm: by its kernels, if its output is kept."""
        return takes_triton(x, "add_rms_norm") and not self._frees_output()

    def _frees_output(self) -> bool:
        return self.recomputed and torch.is_grad_enabled()

    def free_output(self, user: Tensor) -> None:
        """Free the last output; backward recomputes it once the gradient of ``user`` is computed.

        ``user`` must depend on the output, and every operation that saved the output must run in backward after it.
        """
        if self._frees_output():
            self._freed.free(user)
            del self._freed

    def _normalise(self, x: Tensor) -> Tensor:
        return rms_norm(x, weight_in_use(self), self.eps)


class Layer(TransformerLayer):
    """megatron-core's layer; norms are recomputed here, as megatron-core's implementation needs Transformer Engine.

    The keys of a pack's dropout are set for the adapters inside, also when parts of the layer are computed again.
    """

    recompute_input_layernorm: bool
    recompute_pre_mlp_layernorm: bool

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.input_layernorm.recomputed = self.recompute_input_layernorm
        self.pre_mlp_layernorm.recomputed = self.recompute_pre_mlp_layernorm
        self.recompute_input_layernorm = self.recompute_pre_mlp_layernorm = False
        self.self_attn_bda = add_before(self.pre_mlp_layernorm)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Return the layer's output, as megatron-core's layer does."""
        with dropout_keys(kwargs["packed_seq_params"].dropout_Q):
            return super().forward(*args, **kwargs)

    def _forward_mlp(self, *args: Any, **kwargs: Any) -> Tensor:
        if not self.recompute_mlp or current_keys() is None:
            return super()._forward_mlp(*args, **kwargs)
        # In backward the network is computed again outside of ``forward``, perhaps after another pack's: what
        # megatron-core's checkpoint calls then brings the keys of its own pack.
        self.__dict__["mlp"] = _WithKeys(self.mlp, current_keys())
        try:
            return super()._forward_mlp(*args, **kwargs)
        finally:
            del self.__dict__["mlp"]

    def _forward_attention(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        hidden, context = super()._forward_attention(*args, **kwargs)
        self.input_layernorm.free_output(hidden)
        return hidden, context

    def _forward_post_mlp(self, mlp_output_with_bias: tuple[Tensor, None], residual: Tensor) -> Tensor:
        self.pre_mlp_layernorm.free_output(mlp_output_with_bias[0])
        return super()._forward_post_mlp(mlp_output_with_bias, residual)


def add_before(norm: RMSNorm) -> Callable[[bool, bool], Callable[..., Tensor]]:
    """Return megatron-core's residual add, for a sum that ``norm`` normalises next: with the kernels in one pass."""

    def of_mode(training: bool, fused: bool) -> Callable[..., Tensor]:
        plain = get_bias_dropout_add(training, fused)

        def add(x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            x, bias = x_with_bias
            if bias is None and not dropout and norm.follows_sum(x):
                return norm(x, residual)
            return plain(x_with_bias, residual, dropout)

        return add

    return of_mode


def join_layers(decoder: TransformerBlock) -> None:
    """Compute each layer's last sum with the norm after it: that of the next layer, or the one at the model's end.

    Where k layers are recomputed together, the last sum of the k stays a tensor of its own.
    """
    layers, config = decoder.layers, decoder.config
    norms = [*(layer.input_layernorm for layer in layers[1:]), decoder.final_layernorm]
    k = config.recompute_num_layers if config.recompute_granularity == "full" else None
    for i, (layer, norm) in enumerate(zip(layers, norms, strict=False), start=1):
        if norm is not None and not (k and i % k == 0):
            layer.mlp_bda = add_before(norm)


class _WithKeys(nn.Module):
    """Call a module with the dropout keys of one pack; it is not this one's child, whose parameters it would be."""

    def __init__(self, module: nn.Module, keys_Q: Tensor | None):
        super().__init__()
        self._module, self._keys_Q = (module,), keys_Q  # a tuple: no child

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with dropout_keys(self._keys_Q):
            return self._module[0](*args, **kwargs)


def layer_spec(shape: ModelShape, kernels: KernelChoice) -> ModuleSpec:
    """Return the spec of a transformer layer: megatron-core's modules, our norm, core attention and SwiGLU.

    Raises:
        InputError: a package that ``kernels`` chooses is missing.
    """
    column, row = te_linears(kernels.fp8) if kernels.linear == "te" else (ColumnLinear, RowLinear)
    head_norm = RMSNorm if shape.qk_norm else None
    return ModuleSpec(
        module=Layer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=column,
                    core_attention=PackedCoreAttention,
                    linear_proj=row,
                    q_layernorm=head_norm,
                    k_layernorm=head_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row, activation_func=SwiGLU),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )
