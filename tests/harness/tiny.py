"""Tiny Hugging Face folders with random weights and a byte-level ChatML tokenizer, and data for the tests."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from examples.quickstart.tiny_model import build_tokenizer

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_QWEN2 = (Qwen2Config, Qwen2ForCausalLM)
_LLAMA = (LlamaConfig, LlamaForCausalLM)
# The byte tokenizer has 259 tokens: no vocabulary here divides by 128, so every layout pads.
VARIANTS = {
    "qwen2_tied": (*_QWEN2, {"tie_word_embeddings": True}),
    "qwen2_untied": (*_QWEN2, {"tie_word_embeddings": False, "vocab_size": 301}),
    "qwen2_mha": (*_QWEN2, {"num_key_value_heads": 8, "tie_word_embeddings": False}),
    "llama3": (*_LLAMA, {"rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": False}),
    "llama32_tied": (*_LLAMA, {"rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": True, "head_dim": 16}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16, "tie_word_embeddings": False}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None, "tie_word_embeddings": False}),
}
SIZES = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
_REWARD = {"num_labels": 1, "pad_token_id": 0}
REWARDS = {
    "qwen2_reward": (Qwen2Config, Qwen2ForSequenceClassification, _REWARD),
    "llama_reward": (LlamaConfig, LlamaForSequenceClassification, _REWARD),
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return the quickstart's tokenizer without its tokens for roles: the 256 bytes and 3 special tokens."""
    return build_tokenizer(words=())


def make_model(
    folder: Path,
    variant: str = "qwen2_tied",
    dtype: torch.dtype = torch.float32,
    *,
    max_shard_size: str = "5GB",
    **changes: object,
) -> Path:
    """Save a tiny model of ``SIZES`` and its tokenizer; ``changes`` go to its configuration. Return the folder."""
    config_class, model_class, options = (VARIANTS | REWARDS)[variant]
    torch.manual_seed(0)
    model = model_class(config_class(**{**SIZES, **options, **changes})).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                # transformers initialises biases to 0, which would hide a lost one
                parameter.normal_(std=0.1)
            elif "norm" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    byte_tokenizer().save_pretrained(folder)
    return folder


def make_adapter(
    folder: Path,
    model: Path,
    *,
    rank: int = 3,
    alpha: float = 6.0,
    b: float = 0.1,
    targets: object = "all-linear",
    dora: bool = False,
    saved: Sequence[str] = (),
    weights_hash: str | None = None,
) -> Path:
    """Save a PEFT adapter of a model with drawn A, B (standard deviation ``b``) and magnitudes; return the folder.

    Copies of the modules ``saved`` differ a little from the base's; those of tied weights are tied.
    """
    from megatron_align.hf.adapter import write_adapter
    from megatron_align.model.families import read_shape
    from megatron_align.model.families.adapter import Adapter, all_adapter_rows, select_modules
    from megatron_align.model.families.saved_modules import select_saved

    shape, draw = read_shape(model), torch.Generator().manual_seed(6)
    modules = select_modules(shape, targets)
    copied = select_saved(shape, saved, tied=True, option="saved")
    adapter = Adapter(rank=rank, alpha=alpha, rslora=False, modules=modules, dora=dora, saved=copied)
    tensors = {}
    for row in all_adapter_rows(shape, adapter, 1):
        drawn = torch.randn(row.hf_shapes(shape)[0], generator=draw)
        tensors[row.hf[0]] = drawn * (b if "lora_B" in row.hf[0] else shape.hidden_size**-0.5)
        if drawn.ndim == 1:
            tensors[row.hf[0]] = 0.2 + 0.05 * drawn.abs()  # about the lengths of the rows
    weights = load_file(model / "model.safetensors") if copied else {}
    for module in sorted(copied):
        weight = weights[f"{module}.weight"].float()
        drawn = torch.randn(weight.shape, generator=draw) * weight.std()
        tensors[f"base_model.model.{module}.weight"] = weight + 0.3 * drawn
    if shape.is_reward:
        tensors["base_model.model.score.weight"] = torch.randn(1, shape.hidden_size, generator=draw) * 0.1
    write_adapter(folder, tensors, adapter, shape, str(model), weights_hash)
    return folder


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Apply ``change`` to the tensors of a folder's single safetensors file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def make_baichuan(folder: Path) -> Path:
    """Save a tiny Baichuan2-7B, which transformers lacks: a Llama with W_pack, read as a model with NormHead."""
    make_model(
        folder, "llama3", num_key_value_heads=8, rope_parameters={"rope_type": "default", "rope_theta": 1e4}
    )

    def pack(tensors: dict[str, torch.Tensor]) -> None:
        for i in range(4):
            parts = [tensors.pop(f"model.layers.{i}.self_attn.{x}_proj.weight") for x in "qkv"]
            tensors[f"model.layers.{i}.self_attn.W_pack.weight"] = torch.cat(parts)
        tensors["lm_head.weight"] *= torch.arange(1, 260)[:, None]  # row norms that NormHead removes

    change_tensors(folder, pack)
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    old = json.loads((folder / "config.json").read_text())
    config = {
        "architectures": ["BaichuanForCausalLM"],
        "model_type": "baichuan",
        "auto_map": {"AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM"},
        **{key: old[key] for key in (*sizes, "max_position_embeddings", "rms_norm_eps", "hidden_act")},
        "model_max_length": 2048,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "modeling_baichuan.py").write_text("raise RuntimeError('remote code was run')\n")
    return folder


def make_reward(folder: Path, family: str) -> Path:
    """Save a tiny reward model of the family ``qwen2`` or ``llama``."""
    return make_model(folder, f"{family}_reward", num_hidden_layers=2)


def write_chat(file: Path, samples: int = 64, seed: int = 0) -> Path:
    """Write sums as chats of one or two turns and various lengths; return the file."""
    draw = random.Random(seed)
    lines = []
    for _ in range(samples):
        messages = []
        for _ in range(draw.choice((1, 1, 2))):
            numbers = [draw.randrange(10 ** draw.randrange(1, 9)) for _ in range(draw.randrange(2, 5))]
            messages.append({"role": "user", "content": " + ".join(map(str, numbers))})
            messages.append({"role": "assistant", "content": str(sum(numbers))})
        lines.append(json.dumps({"messages": messages}) + "\n")
    file.write_text("".join(lines), encoding="utf-8")
    return file


def write_pairs(
    file: Path,
    samples: int = 48,
    seed: int = 1,
    text: bool = False,
    **extra: Callable[[random.Random], object],
) -> Path:
    """Write correct and wrong sums as preference pairs, prompts longer than answers; return the file.

    ``text``: as plain strings instead of messages. ``extra``: further fields, drawn for each pair.
    """
    draw = random.Random(seed)
    lines = []
    for _ in range(samples):
        numbers = [draw.randrange(10 ** draw.randrange(1, 7)) for _ in range(draw.randrange(2, 5))]
        right, wrong = sum(numbers), sum(numbers) + draw.randrange(1, 10 ** draw.randrange(1, 5))
        messages = {
            "prompt": ("user", " + ".join(map(str, numbers))),
            "chosen": ("assistant", f"{right}" + "!" * draw.randrange(3)),
            "rejected": ("assistant", f"{wrong}, I think" * draw.randrange(1, 3)),
        }
        record = {
            name: content if text else [{"role": role, "content": content}]
            for name, (role, content) in messages.items()
        }
        lines.append(json.dumps({**record, **{name: value(draw) for name, value in extra.items()}}) + "\n")
    file.write_text("".join(lines), encoding="utf-8")
    return file


def write_labelled(file: Path, samples: int = 48, seed: int = 2) -> Path:
    """Write correct and wrong sums as single answers with a label; return the file."""
    draw = random.Random(seed)
    lines = []
    for _ in range(samples):
        numbers = [draw.randrange(10 ** draw.randrange(1, 7)) for _ in range(draw.randrange(2, 5))]
        label = draw.random() < 0.6
        answer = sum(numbers) + (0 if label else draw.randrange(1, 1000))
        record = {
            "prompt": [{"role": "user", "content": " + ".join(map(str, numbers))}],
            "completion": [{"role": "assistant", "content": str(answer)}],
            "label": label,
        }
        lines.append(json.dumps(record) + "\n")
    file.write_text("".join(lines), encoding="utf-8")
    return file


def run_arguments(model: Path, data: Path, folder: Path, **options: object) -> list[str]:
    """Return command-line arguments of a short fp32 run; ``options`` have ``__`` for the dot.

    The self-check is off: it has tests of its own, and costs as much as two steps.
    """
    settings = {
        "model.path": model,
        "data.train": data,
        "data.sequence_length": 256,
        "train.steps": 5,
        "train.global_batch_size": 12,
        "train.precision": "fp32",
        "train.self_check": False,
        "optimizer.lr": 1e-3,
        "optimizer.schedule": "constant",
        "checkpoint.dir": folder,
        "checkpoint.export_hf": False,
        "logging.tensorboard": False,
        **{key.replace("__", "."): value for key, value in options.items()},
    }
    texts = {key: str(v).lower() if isinstance(v, bool) else str(v) for key, v in settings.items()}
    return [part for key, text in texts.items() for part in (f"--{key}", text)]


def metrics_of(folder: Path, split: str | None = None) -> list[dict]:
    """Return the rows of metrics.jsonl that are of this split; None: training."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row.get("split") == split]


def numbers(folder: Path) -> list[dict]:
    """Return the training rows without those numbers that depend on a clock."""
    times = ("tokens_per_second", "step_seconds")
    return [{name: value for name, value in row.items() if name not in times} for row in metrics_of(folder)]
