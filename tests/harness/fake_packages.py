"""Stand-ins for optional GPU packages: the signatures of the real ones, computed in plain PyTorch on any device.

Signatures are those of flash-attn 2.8.3, of ``hopper/flash_attn_interface.py`` of the same project, of flash-attn-4
4.0.0b36 and of Transformer Engine 2.20.2.
"""

from __future__ import annotations

import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

CALLS: Counter[str] = Counter()  # of the functions of the fakes that are installed now, by their names


def _documents(q, k, v, cu_q, cu_k, longest, scale, causal):
    """Attend within documents as PyTorch does; refuse what the real kernels refuse."""
    CALLS["attention"] += 1
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
        assert max_seqlen_q == max_seqlen_k
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
        assert max_seqlen_q == max_seqlen_k
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
        assert max_seqlen_q == max_seqlen_k
        out = _documents(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, softmax_scale, causal)
        return out, q.new_empty(q.shape[1], len(q), dtype=torch.float32)

    namespace, module = ModuleType("flash_attn"), ModuleType("flash_attn.cute")
    namespace.__path__ = []  # type: ignore[attr-defined]  # a namespace, as where flash-attn itself is absent
    module.__version__ = "4.0.0b36"  # type: ignore[attr-defined]
    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    return {"flash_attn": namespace, "flash_attn.cute": module}


FP8_MAX = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


def _rounded(x, dtype, block=None):
    """Round values to FP8 within the scale of the tensor, or of ``block`` values of a row; return them unscaled."""
    width = x.shape[-1]
    filled = x.float() if block is None else F.pad(x.float(), (0, -width % block))
    parts = filled if block is None else filled.unflatten(-1, (-1, block))
    largest = parts.abs().amax() if block is None else parts.abs().amax(-1, keepdim=True)
    scale = torch.where(largest > 0, FP8_MAX[dtype] / largest, 1.0)
    return ((parts * scale).to(dtype).float() / scale).view(filled.shape)[..., :width].to(x.dtype)


class _Fp8Product(torch.autograd.Function):
    """``x w^T`` of operands in FP8, and its gradients of operands in FP8."""

    @staticmethod
    def forward(ctx, x, weight, block, of_gradients):
        ctx.block, ctx.of_gradients = block, of_gradients
        x, weight = (_rounded(each, torch.float8_e4m3fn, block) for each in (x, weight))
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        gradient = _rounded(gradient, ctx.of_gradients, ctx.block)
        return gradient @ weight, gradient.flatten(0, -2).T @ x.flatten(0, -2), None, None


class _Accumulated(torch.autograd.Function):
    """A weight whose gradient is added to its ``main_grad``; autograd gets one that holds nothing."""

    @staticmethod
    def forward(ctx, weight):
        ctx.weight = weight
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, gradient):
        CALLS["fused gradient of te"] += 1
        ctx.weight.main_grad.add_(gradient)
        ctx.weight.grad_added_to_main_grad = True
        return torch.full_like(gradient, torch.nan)


def _te_recipes() -> ModuleType:
    """Recipes as (values that share a scale, dtype of gradients)."""
    module = ModuleType("transformer_engine.common.recipe")
    for name, block, of_gradients in (
        ("Float8CurrentScaling", None, torch.float8_e5m2),
        ("Float8BlockScaling", 128, torch.float8_e4m3fn),
        ("MXFP8BlockScaling", 32, torch.float8_e4m3fn),
    ):
        setattr(module, name, type(name, (), {"block": block, "of_gradients": of_gradients}))
    return module


def _te(version: str = "2.20.2", rounds: bool = True, lacks: str = "") -> dict[str, ModuleType]:
    from megatron.core import tensor_parallel as regions
    from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

    class autocast:  # noqa: N801  # the package's name
        recipe: Any = None  # of the innermost context; None: FP8 is off

        def __init__(
            self, enabled=True, calibrating=False, recipe=None, amax_reduction_group=None, _graph=False
        ):
            self.inner = recipe if enabled else None

        def __enter__(self):
            self.outer, autocast.recipe = autocast.recipe, self.inner

        def __exit__(self, *of_error):
            autocast.recipe = self.outer

    def require_multiples(x, weight):
        """As assert_dim_for_fp8_exec, and what the gradients' products need."""
        multiple = 32 if autocast.recipe.block == 32 else 16
        sizes = (math.prod(x.shape[:-1]), *weight.shape)
        assert not any(size % multiple for size in sizes), f"{sizes} are no multiples of {multiple}"

    def product(x, weight):
        recipe = autocast.recipe
        if recipe is None or not rounds:
            return F.linear(x, weight)
        return _Fp8Product.apply(x, weight, recipe.block, recipe.of_gradients)

    class Linear(torch.nn.Module):
        def __init__(
            self, in_features, out_features, sequence_parallel=False, fuse_wgrad_accumulation=False, tp_group=None,
            tp_size=1, get_rng_state_tracker=None, rng_tracker_name=None, init_method=None, bias=True,
            return_bias=False, params_dtype=None, parallel_mode=None, parameters_split=None, device="cuda",
            ub_overlap_ag=False, ub_overlap_rs=False, ub_overlap_rs_dgrad=False, ub_bulk_dgrad=False,
            ub_bulk_wgrad=False, ub_name=None, delay_wgrad_compute=False, symmetric_ar_type=None,
            save_original_input=False, name=None,
        ):  # fmt: skip
            super().__init__()
            self.tp_group, self.tp_size = tp_group, tp_group.size()
            self.parallel_mode = parallel_mode
            self.sequence_parallel = self.tp_size > 1 and sequence_parallel
            self.return_bias = return_bias
            self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
            size = {"column": (out_features // self.tp_size, in_features)}
            size["row"] = (out_features, in_features // self.tp_size)
            weight = torch.empty(size[parallel_mode], device=device, dtype=params_dtype)
            self.weight = torch.nn.Parameter(weight)
            init_method(self.weight)
            set_tensor_model_parallel_attributes(self.weight, True, int(parallel_mode == "row"), 1)
            if bias:
                self.bias = torch.nn.Parameter(
                    torch.zeros(size[parallel_mode][0], device=device, dtype=params_dtype)
                )
                set_tensor_model_parallel_attributes(self.bias, True, 0, 1)
            else:
                self.bias = torch.Tensor()

        def forward(self, inp, is_first_microbatch=None, fp8_output=False, fp8_grad=False):
            CALLS["te linear"] += 1
            column, group = self.parallel_mode == "column", self.tp_group
            if autocast.recipe is not None:
                require_multiples(inp, self.weight)
            if column and self.sequence_parallel:
                inp = regions.gather_from_sequence_parallel_region(inp, group=group)
            elif column:
                inp = regions.copy_to_tensor_model_parallel_region(inp, group=group)
            applied = self.bias if self.bias.numel() and not self.return_bias else None
            weight = _Accumulated.apply(self.weight) if self.fuse_wgrad_accumulation else self.weight
            out = product(inp, weight)
            if applied is not None:
                out = out + applied
            if not column and self.sequence_parallel:
                out = regions.reduce_scatter_to_sequence_parallel_region(out, group=group)
            elif not column:
                out = regions.reduce_from_tensor_model_parallel_region(out, group=group)
            return (out, self.bias) if self.return_bias else out

        def get_extra_state(self):
            return torch.empty(0, dtype=torch.uint8)

        def set_extra_state(self, state):
            assert state is None or state.numel() == 0

    class DotProductAttention(torch.nn.Module):
        def __init__(
            self, num_attention_heads, kv_channels, num_gqa_groups=None, attention_dropout=0.0, qkv_format="sbhd",
            attn_mask_type="causal", window_size=None, bottom_right_diagonal=None, softcap=0.0,
            sequence_parallel=False, tp_size=1, get_rng_state_tracker=None, tp_group=None, layer_number=None,
            attention_type="self", cp_group=None, cp_global_ranks=None, cp_stream=None, cp_comm_type="p2p",
            softmax_scale=None, softmax_type="vanilla", return_max_logit=False, name=None,
        ):  # fmt: skip
            super().__init__()
            assert attention_dropout == 0.0
            assert os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] == os.environ["NVTE_UNFUSED_ATTN"] == "0"
            self.shapes = (num_attention_heads, kv_channels), (num_gqa_groups, kv_channels)
            self.scale = softmax_scale

        def forward(
            self, query_layer=None, key_layer=None, value_layer=None, attention_mask=None, qkv_format=None,
            cu_seqlens_q=None, cu_seqlens_kv=None, cu_seqlens_q_padded=None, cu_seqlens_kv_padded=None,
            max_seqlen_q=None, max_seqlen_kv=None, attn_mask_type=None, **others,
        ):  # fmt: skip
            assert not others
            assert autocast.recipe is None, "attention computes in the precision of its inputs"
            assert (qkv_format, attn_mask_type) == ("thd", "padding_causal")
            assert (query_layer.shape[1:], key_layer.shape[1:]) == self.shapes
            CALLS["te attention"] += 1
            if lacks == "kernel":
                raise ValueError("No dot product attention backend is available for the provided inputs.")
            assert max_seqlen_q == max_seqlen_kv
            out = _documents(
                query_layer,
                key_layer,
                value_layer,
                cu_seqlens_q,
                cu_seqlens_kv,
                max_seqlen_q,
                self.scale,
                True,
            )
            return out.flatten(1)

    package, module = ModuleType("transformer_engine"), ModuleType("transformer_engine.pytorch")
    package.__version__, package.__path__ = version, []  # type: ignore[attr-defined]
    for offered in (Linear, autocast, DotProductAttention):
        setattr(module, offered.__name__, offered)
    for name in ("is_fp8_available", "is_fp8_block_scaling_available", "is_mxfp8_available"):
        reason = f"{name} is not supported." if name == lacks else ""
        answer = (not reason, reason)
        setattr(
            module, name, lambda return_reason=False, answer=answer: answer if return_reason else answer[0]
        )
    common = ModuleType("transformer_engine.common")
    return {
        "transformer_engine": package,
        "transformer_engine.pytorch": module,
        "transformer_engine.common": common,
        "transformer_engine.common.recipe": _te_recipes(),
    }


def _apex(lacks: str = "") -> dict[str, ModuleType]:
    def multi_tensor_adam_capturable(
        chunk_size, noop_flag, tensor_lists, lr, beta1, beta2, epsilon, step, mode, bias_correction, weight_decay,
        inv_scale,
    ):  # fmt: skip
        CALLS["apex update"] += 1
        assert noop_flag.dtype == step.dtype == torch.int32
        assert lr.dtype == inv_scale.dtype == torch.float32
        assert mode == bias_correction == 1
        if noop_flag.item():
            return
        for g, p, m, v in zip(*tensor_lists, strict=True):
            assert g.dtype == p.dtype == m.dtype == v.dtype
            g.mul_(inv_scale)
            m.mul_(beta1).add_(g, alpha=1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            m_hat, v_hat = m / (1 - beta1 ** step.item()), v / (1 - beta2 ** step.item())
            p.sub_(lr * (m_hat / (v_hat.sqrt() + epsilon) + weight_decay * p))

    def multi_tensor_applier(op, noop_flag_buffer, tensor_lists, *args):
        return op(2048 * 32, noop_flag_buffer, tensor_lists, *args)

    def wgrad_gemm_accum_fp32(input_2d, d_output_2d, d_weight):
        CALLS["fused gradient"] += 1
        assert d_weight.dtype == torch.float32
        d_weight.add_(d_output_2d.float().T @ input_2d.float())

    apex, applies = ModuleType("apex"), ModuleType("apex.multi_tensor_apply")
    kernels, product = ModuleType("amp_C"), ModuleType("fused_weight_gradient_mlp_cuda")
    applies.multi_tensor_applier = multi_tensor_applier  # type: ignore[attr-defined]
    kernels.multi_tensor_adam_capturable = multi_tensor_adam_capturable  # type: ignore[attr-defined]
    product.wgrad_gemm_accum_fp32 = wgrad_gemm_accum_fp32  # type: ignore[attr-defined]
    if lacks in vars(kernels):
        delattr(kernels, lacks)
    modules = {module.__name__: module for module in (apex, applies, kernels, product)}
    return {name: module for name, module in modules.items() if name != lacks}


FAKES: dict[str, Callable[..., dict[str, ModuleType]]] = {
    "flash2": _flash2,
    "flash3": _flash3,
    "flash4": _flash4,
    "apex": _apex,
    "te": _te,
    "te_exact": partial(_te, rounds=False),  # FP8 without rounding
}
REAL = (
    "apex",
    "apex.multi_tensor_apply",
    "amp_C",
    "fused_weight_gradient_mlp_cuda",
    "flash_attn",
    "flash_attn.cute",
    "flash_attn_interface",
    "transformer_engine",
    "transformer_engine.pytorch",
    "transformer_engine.common",
    "transformer_engine.common.recipe",
)


@contextmanager
def installed(*names: str, chip: tuple[int, int] | None = (9, 0), **options: Any) -> Iterator[None]:
    """Pretend that only these packages are installed, and that the GPU is of this capability; None: there is none.

    Args:
        names: keys of ``FAKES``.
        chip: compute capability.
        options: of the fakes.
    """
    CALLS.clear()
    modules: dict[str, Any] = dict.fromkeys(REAL)  # None: an import fails
    for name in names:
        modules |= FAKES[name](**options)
    product = modules["fused_weight_gradient_mlp_cuda"]  # megatron-core looks for it when it is imported
    layers = "megatron.core.tensor_parallel.layers"
    with (
        mock.patch(f"{layers}.fused_weight_gradient_mlp_cuda", product, create=True),
        mock.patch(f"{layers}._grad_accum_fusion_available", product is not None),
        mock.patch.dict(sys.modules, modules),
        mock.patch.dict(os.environ),
        mock.patch("megatron_align.model.optional_packages.capability", return_value=chip),
    ):
        yield
