"""Baichuan2 as the Llama that computes the same: transformers has no Baichuan, and its remote code is not run.

Query, key and value rows are separated, and the output head's rows are normalised to unit length.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig

from megatron_align.hf.load import HEAD
from megatron_align.model.families import read_json
from megatron_align.model.families.adapter import MAGNITUDE, PEFT, Adapter, adapter_tensors

_PACKED_MODULE = "self_attn.W_pack"
_PACKED = f"{_PACKED_MODULE}.weight"


def llama_config(folder: str | Path) -> LlamaConfig:
    """Return the configuration of the Llama from a Baichuan2 folder's."""
    config = read_json(Path(folder) / "config.json")
    for key in ("architectures", "auto_map", "model_type"):
        config.pop(key, None)
    return LlamaConfig(**config, architectures=["LlamaForCausalLM"])


def stored_name(name: str) -> str:
    """Return the Baichuan2 tensor that a tensor of the Llama comes from."""
    for letter in "qkv":
        name = name.replace(f"self_attn.{letter}_proj.weight", _PACKED)
    return name


def llama_tensors(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the Llama's tensors for Baichuan2's, one after the other."""
    for name, tensor in tensors:
        if name == HEAD:
            yield name, F.normalize(tensor)
        elif name.endswith(_PACKED):
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                yield name.replace(_PACKED, f"self_attn.{letter}_proj.weight"), part
        else:
            yield name, tensor


def llama_adapter(adapter: Adapter, tensors: Mapping[str, Tensor]) -> tuple[Adapter, dict[str, Tensor]]:
    """Return the options and tensors of the Llama's adapter for Baichuan2's; another adapter stays as it is.

    Query, key and value share A; the rows of B, and of DoRA's magnitude, are separated.

    Args:
        adapter: with the modules of Baichuan2.
        tensors: by PEFT's names.
    """
    modules, separated = set(adapter.modules), dict(tensors)
    for packed in (module for module in adapter.modules if module.endswith(_PACKED_MODULE)):
        modules.remove(packed)
        a, b = adapter_tensors(packed)
        magnitude = f"{PEFT}{packed}{MAGNITUDE}"
        shared = separated.pop(a)
        parts = {name: separated.pop(name).chunk(3) for name in (b, magnitude) if name in separated}
        for part, letter in enumerate("qkv"):
            module = packed.replace(_PACKED_MODULE, f"self_attn.{letter}_proj")
            modules.add(module)
            separated[a.replace(packed, module)] = shared
            separated |= {name.replace(packed, module): chunks[part] for name, chunks in parts.items()}
    return replace(adapter, modules=frozenset(modules)), separated
