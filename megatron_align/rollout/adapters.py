"""Low-rank adapters of a transformers model in this process: several by name, one of them, or none, in use.

The base's weights stay as they are, so that switching is free and exact: an adapter's share is added to the output of
each adapted module, as in training and in PEFT. Modules of which an adapter has a complete copy compute with that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from megatron_align.hf.baichuan import llama_adapter
from megatron_align.model.dora import row_norms, scaled
from megatron_align.model.families.adapter import (
    EMBED_TOKENS,
    LM_HEAD,
    MAGNITUDE,
    PEFT,
    Adapter,
    adapter_tensors,
)

Factors = tuple[Tensor, Tensor, float, Tensor | None]  # A, B, scale, and of DoRA the factor of each row


class EngineAdapters:
    """The adapters of a model; none is in use at first.

    Args:
        model: of transformers. Its parameters are left unchanged.
        adapters: options and tensors (by PEFT's names) of each adapter, by name; Baichuan2's are given to its Llama.
    """

    def __init__(
        self, model: PreTrainedModel, adapters: Mapping[str, tuple[Adapter, Mapping[str, Tensor]]]
    ) -> None:
        self.names = tuple(adapters)
        self._factors: dict[str, dict[str, Factors]] = {}
        self._model, self._hooked, self._with_copies = model, set[str](), set[str]()
        self._active: Mapping[str, Factors] = {}
        self._copies: dict[str, dict[str, nn.Parameter]] = {}
        self._active_copies: Mapping[str, nn.Parameter] = {}
        for name, (adapter, tensors) in adapters.items():
            self.replace(name, adapter, tensors)

    def replace(self, name: str, adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
        """Replace an adapter, or add one; it is used after the next :meth:`use`."""
        adapter, tensors = llama_adapter(adapter, tensors)
        self._factors[name] = {
            module: _factors(self._model, tensors, module, adapter) for module in adapter.modules
        }
        for module in adapter.modules - self._hooked:
            self._model.get_submodule(module).register_forward_hook(self._hook(module))
            self._hooked.add(module)
        self._copies[name] = {
            module: _copy(self._model, tensors, module) for module in _copied(self._model, adapter)
        }
        for module in self._copies[name].keys() - self._with_copies:
            self._replace_weight(module)
            self._with_copies.add(module)

    def use(self, name: str | None) -> None:
        """Compute with an adapter from now on; None: with the base."""
        self._active = {} if name is None else self._factors[name]
        self._active_copies = {} if name is None else self._copies[name]

    def _replace_weight(self, name: str) -> None:
        """Let a module compute with the copy in use; outside of its forward it always has the base's weight."""
        own = self._model.get_submodule(name).get_parameter("weight")

        def give_copy(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            module.weight = self._active_copies.get(name, own)

        def give_own(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            module.weight = own

        module = self._model.get_submodule(name)
        module.register_forward_pre_hook(give_copy)
        module.register_forward_hook(give_own, always_call=True)

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if name not in self._active:
                return output
            a_RI, b_OR, scale, factor_O = self._active[name]
            is_embedding = isinstance(module, nn.Embedding)
            projected = F.embedding(inputs[0], a_RI.T) if is_embedding else F.linear(inputs[0], a_RI)
            share = F.linear(projected, b_OR) * scale
            if factor_O is None:
                return output + share
            return scaled(output, getattr(module, "bias", None), share, factor_O)

        return add


def _copied(model: PreTrainedModel, adapter: Adapter) -> frozenset[str]:
    """Return the modules of which an adapter has a copy: that of a tied embedding is the output head's too."""
    is_tied = EMBED_TOKENS in adapter.saved and model.config.tie_word_embeddings
    return adapter.saved | (frozenset([LM_HEAD]) if is_tied else frozenset())


def _copy(model: PreTrainedModel, tensors: Mapping[str, Tensor], module: str) -> nn.Parameter:
    """Return the copy of a module's weight on the model's device and in its dtype."""
    weight = model.get_submodule(module).get_parameter("weight")
    return nn.Parameter(tensors[f"{PEFT}{module}.weight"].to(weight), requires_grad=False)


def _factors(model: PreTrainedModel, tensors: Mapping[str, Tensor], module: str, adapter: Adapter) -> Factors:
    """Return A, B, the scale and DoRA's factors of a module, tensors on the model's device and in its dtype."""
    weight = model.get_submodule(module).get_parameter("weight")
    a, b = (tensors[factor].to(weight) for factor in adapter_tensors(module))
    factor_O = None
    if adapter.dora:
        magnitude_O = tensors[f"{PEFT}{module}{MAGNITUDE}"].to(weight)
        factor_O = magnitude_O / row_norms(weight, a, b, adapter.scale, None)
    return a, b, adapter.scale, factor_O
