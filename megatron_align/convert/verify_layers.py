"""Compare our model with transformers' module by module on one text, with one layer's weights of each in memory.

transformers' forward pass drives the comparison. Each module's weights are loaded when it is entered; when a layer is
left, our layer computes the same from our hidden states, and both outputs are compared and freed.

Shapes: L tokens of a text, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor, nn

from megatron_align.config import ParallelConfig
from megatron_align.convert.hf_model import HFModel
from megatron_align.convert.merged_state import RowReader
from megatron_align.kernels import PackedLayout
from megatron_align.model import cpu
from megatron_align.model.attention import PackParams
from megatron_align.model.families import ModelShape, rows, to_megatron
from megatron_align.model.layer import RMSNorm, layer_spec
from megatron_align.model.policy import transformer_config
from megatron_align.model.rope import rope_tables

# modules of a layer: transformers' name -> ours
MODULES = {
    "input_layernorm": "input_layernorm",
    "self_attn": "self_attention",
    "post_attention_layernorm": "pre_mlp_layernorm",
    "mlp": "mlp",
}


@dataclass(frozen=True, slots=True)
class ModuleDifference:
    """The largest absolute difference of a module's output from transformers'; ``scale`` is the largest of theirs."""

    module: str
    max_abs_difference: float
    scale: float

    def exceeds(self, tolerance: float) -> bool:
        """Return whether the difference exceeds ``tolerance * max(1, scale)``; NaN does."""
        return not self.max_abs_difference <= tolerance * max(1.0, self.scale)


class OurLayers:
    """Compute our modules one at a time, in fp32, with weights from a checkpoint."""

    def __init__(self, state: RowReader, shape: ModelShape, groups: ProcessGroupCollection) -> None:
        self.state, self.shape = state, shape
        self._rows = {row.megatron: row for row in rows(shape)}
        self.config = transformer_config(replace(shape, num_layers=1), ParallelConfig(), torch.float32)
        self._layer = build_module(
            layer_spec(shape, self.config.kernels), config=self.config, layer_number=1, pg_collection=groups
        )
        self._layer = self._layer.to(cpu.device()).eval()
        self._outputs: dict[str, Tensor] = {}
        for theirs, ours in MODULES.items():
            self._layer.get_submodule(ours).register_forward_hook(partial(_keep, self._outputs, theirs))

    def weight(self, megatron: str) -> Tensor:
        """Return a tensor of the checkpoint in fp32."""
        row = self._rows[megatron]
        return to_megatron(row, self.state.read(row), self.shape).float().to(cpu.device())

    def embed(self, tokens_L: Tensor) -> Tensor:
        """Return ``[L, H]``."""
        return self.weight("embedding.word_embeddings.weight")[tokens_L]

    def layer(self, number: int, hidden_LH: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a layer's output ``[L, H]`` and its modules' outputs, by transformers' names."""
        for name, parameter in self._layer.named_parameters():
            parameter.data = self.weight(f"decoder.layers.{number}.{name}")
        length = len(hidden_LH)
        positions_L = torch.arange(length, device=hidden_LH.device)
        cos_LD, sin_LD = rope_tables(positions_L, self.shape.rope_frequencies().to(hidden_LH.device))
        layout = PackedLayout.from_lengths([length]).to(hidden_LH.device)
        pack = PackParams(layout=layout, cos_QD=cos_LD, sin_QD=sin_LD)
        hidden, _ = self._layer(hidden_LH[:, None], attention_mask=None, packed_seq_params=pack)
        return hidden[:, 0], dict(self._outputs)

    def norm(self, hidden_LH: Tensor) -> Tensor:
        """Return the final norm ``[L, H]``."""
        norm = RMSNorm(self.config, self.shape.hidden_size, self.shape.norm_eps)
        norm.weight.data = self.weight("decoder.final_layernorm.weight")
        return norm(hidden_LH)

    def head(self, hidden_LH: Tensor) -> Tensor:
        """Return logits ``[L, V]``, or a reward model's scores ``[L, 1]``."""
        names = ("reward_head.weight", "output_layer.weight", "embedding.word_embeddings.weight")
        weight = self.weight(next(name for name in names if name in self._rows))
        return hidden_LH @ (F.normalize(weight) if self.shape.norm_head else weight).T


@torch.no_grad()
def compare_modules(hf_model: HFModel, ours: OurLayers, tokens_L: Tensor) -> list[ModuleDifference]:
    """Return the differences of all modules in order of computation; the head's is the last."""
    differences: list[ModuleDifference] = []
    outputs: dict[str, Tensor] = {}
    hidden = torch.empty(0)
    vocab = ours.shape.vocab_size

    def compare(name: str, ours_LH: Tensor, theirs_LH: Tensor) -> None:
        difference, scale = (ours_LH - theirs_LH).abs().max().item(), theirs_LH.abs().max().item()
        differences.append(ModuleDifference(name, difference, scale))

    def step(name: str, compute: Callable[[Tensor], Tensor], theirs: Tensor) -> None:
        nonlocal hidden
        hidden = compute(hidden)
        compare(name, hidden[:, :vocab] if name == "lm_head" else hidden, theirs)

    def layer(number: int, name: str, theirs: Tensor) -> None:
        nonlocal hidden
        hidden, modules = ours.layer(number, hidden)
        for module in MODULES:
            compare(f"{name}.{module}", modules[module], outputs[module])
        compare(name, hidden, theirs)

    model = hf_model.model
    head = "score" if ours.shape.is_reward else "lm_head"
    after: dict[str, Callable[[Tensor], None]] = {
        "model.embed_tokens": partial(step, "model.embed_tokens", lambda _: ours.embed(tokens_L)),
        "model.norm": partial(step, "model.norm", ours.norm),
        head: partial(step, head, ours.head),
    }
    for number, module in enumerate(model.model.layers):
        name = f"model.layers.{number}"
        after[name] = partial(layer, number, name)
        for part in MODULES:
            module.get_submodule(part).register_forward_hook(partial(_keep, outputs, part))
    for name, then in after.items():
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda *_, name=name: hf_model.fill(name))
        module.register_forward_hook(partial(_leave, hf_model, name, then))
    model(tokens_L[None], use_cache=False)
    return differences


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _keep(outputs: dict[str, Tensor], name: str, module: nn.Module, inputs: Any, output: Any) -> None:
    kept = _first(output).clone()  # megatron-core adds the residual in place
    outputs[name] = kept.squeeze(0 if kept.shape[0] == 1 else 1)


def _leave(
    hf_model: HFModel, name: str, then: Callable[[Tensor], None], module: nn.Module, inputs: Any, output: Any
) -> None:
    hf_model.empty(name)
    then(_first(output)[0])
