"""config.json of the models in the examples, as published by their authors; no weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import LlamaConfig, PretrainedConfig, Qwen2Config


def _qwen2(hidden: int, ffn: int, layers: int, heads: int, groups: int, **more: object) -> Callable:
    return lambda: Qwen2Config(
        architectures=["Qwen2ForCausalLM"],
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=131072,
        use_sliding_window=False,
        **{"vocab_size": 152064, "tie_word_embeddings": False, **more},
    )


def _llama3(hidden: int, ffn: int, layers: int, heads: int) -> Callable:
    return lambda: LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )


CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "qwen2_0_5b": _qwen2(896, 4864, 24, 14, 2, vocab_size=151936, tie_word_embeddings=True),
    "qwen2_7b": _qwen2(3584, 18944, 28, 28, 4),
    "qwen2_72b": _qwen2(8192, 29568, 80, 64, 8),
    "llama3_8b": _llama3(4096, 14336, 32, 32),
    "llama3_70b": _llama3(8192, 28672, 80, 64),
}


def write_config(folder: Path, size: str) -> Path:
    """Write the config.json of a model; return the folder."""
    CONFIGS[size]().save_pretrained(folder)
    return folder
