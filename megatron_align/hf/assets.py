"""A Hugging Face folder's files besides its weights: copied along, and config.json edited to match the weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from megatron_align.data.tokenize.tokenizer import load_tokenizer
from megatron_align.errors import InputError
from megatron_align.model.families import ModelShape, read_json

# Files that a model trained from the folder keeps, besides its weights.
_ASSETS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.py",  # of architectures that transformers does not know; never executed here
    "*.tiktoken",
    "*.jinja",
    "chat_template*",
    "additional_chat_templates/*",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


def copy_assets(source: str | Path, target: str | Path) -> None:
    """Copy configuration, tokenizer, chat templates and licence of an HF folder, following links.

    Raises:
        InputError: ``source`` has no config.json.
    """
    source, target = Path(source), Path(target)
    if not (source / "config.json").is_file():
        raise InputError(f"Hugging Face folder is incomplete: no file {source / 'config.json'}")
    for path in sorted({path for pattern in _ASSETS for path in source.glob(pattern)}):
        if path.is_file():
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def write_config_architecture(folder: str | Path, shape: ModelShape) -> None:
    """Set a reward model's architecture in config.json, where that is still a language model's.

    transformers takes the reward at the last token that is not padding, so ``pad_token_id`` must be set.
    """
    path = Path(folder) / "config.json"
    config = read_json(path)
    if not shape.is_reward or config.get("architectures") == [shape.architecture]:
        return
    config["architectures"] = [shape.architecture]
    config["num_labels"], config["id2label"], config["label2id"] = 1, {"0": "LABEL_0"}, {"LABEL_0": 0}
    if config.get("pad_token_id") is None:
        tokenizer = load_tokenizer(str(folder))
        padding = tokenizer.pad_token_id
        config["pad_token_id"] = tokenizer.eos_token_id if padding is None else padding
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_config_dtype(folder: str | Path, dtype: torch.dtype) -> None:
    """Set the dtype of the weights in config.json, under the keys that it already uses.

    transformers 5 writes ``dtype``, transformers 4 ``torch_dtype``; all versions read the latter, which is therefore
    added where there is neither.
    """
    path = Path(folder) / "config.json"
    config = read_json(path)
    for key in [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]:
        config[key] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
