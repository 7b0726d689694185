"""Baichuan2 as the Llama that computes the same: transformers has no Baichuan, and its remote code is not run.

Query, key and value rows are separated, and the output head's rows are normalised to unit length.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig

from megatron_align.hf.load import HEAD
from megatron_align.model.families import read_json

_PACKED = "self_attn.W_pack.weight"


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
