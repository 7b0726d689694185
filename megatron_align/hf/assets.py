"""A Hugging Face folder's files besides its weights: copied along, and config.json edited to match the weights."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_align.errors import InputError
from megatron_align.model.families import ModelShape, read_json

_CONFIG, _GENERATION = "config.json", "generation_config.json"
_TOKENIZER, _SPECIAL, _TEMPLATE = "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"
_ABSENT = object()  # in _edit: remove the key

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
    """Set a reward model's architecture in config.json, where that is still a language model's."""
    path = Path(folder) / _CONFIG
    config = read_json(path)
    if shape.is_reward and config.get("architectures") != [shape.architecture]:
        labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        _edit(path, architectures=[shape.architecture], num_labels=1, **labels)


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


@dataclass(frozen=True, slots=True)
class Padding:
    """The padding token of a reward model, and its id; both None: it has none, and transformers refuses batches."""

    token: str | None
    id: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AssetChanges:
    """Changes that training makes in the files of the folder that it starts from, besides the weights.

    Args:
        chat_template: text of the template that was trained with; None: the folder's own.
        stop_ids: tokens at which the trained model ends its turn; empty: generation_config.json is not changed.
        padding: of a reward model; None: not changed.
        config: content of config.json, of a model of another shape than the folder's; None: the folder's own.
    """

    chat_template: str | None = None
    stop_ids: tuple[int, ...] = ()
    padding: Padding | None = None
    config: dict[str, Any] | None = None


def write_assets(source: str | Path, target: str | Path, shape: ModelShape, changes: AssetChanges) -> None:
    """Copy an HF folder's files besides its weights, changed to match the model that was trained.

    Raises:
        InputError: a file that is changed is no JSON object, or there is no config.json.
    """
    target = Path(target)
    copy_assets(source, target)
    if changes.config is not None:
        text = json.dumps(changes.config, indent=2, ensure_ascii=False)
        (target / _CONFIG).write_text(text + "\n", encoding="utf-8")
    write_config_architecture(target, shape)
    if changes.chat_template is not None:
        _write_chat_template(target, changes.chat_template)
    elif (target / _TEMPLATE).is_file():
        _edit(
            target / _TOKENIZER, chat_template=_ABSENT
        )  # transformers reads the file: other programs then do too
    if changes.stop_ids:
        _write_stop_ids(target, changes.stop_ids)
    if changes.padding is not None:
        _write_padding(target, changes.padding)


def require_editable(folder: Path) -> None:
    """Check the files that :func:`write_assets` may change, before a run rather than at its end.

    Raises:
        InputError: one of them is no JSON object.
    """
    for name in (_CONFIG, _TOKENIZER, _GENERATION, _SPECIAL):
        if (folder / name).is_file():
            read_json(folder / name)


def stop_ids_of(folder: Path) -> list[int]:
    """Return the tokens at which transformers stops generation by default, from a folder's configuration files."""
    found: Any = None
    for name in (_GENERATION, _CONFIG):
        if found is None and (folder / name).is_file():
            found = read_json(folder / name).get("eos_token_id")
    return [token for token in (found if isinstance(found, list) else [found]) if type(token) is int]


def describe_assets(folder: Path) -> str:
    """Return what a folder's files say about talking to its model: chat template, stop tokens, padding."""
    config = read_json(folder / _CONFIG)
    if any(str(name).endswith("ForSequenceClassification") for name in config.get("architectures") or []):
        if (padding := config.get("pad_token_id")) is None:
            return "no padding token, one text at a time"
        return f"padding token {_token_names(folder, [padding])}"
    tokenizer = read_json(folder / _TOKENIZER) if (folder / _TOKENIZER).is_file() else {}
    place = (
        _TEMPLATE
        if (folder / _TEMPLATE).is_file()
        else _TOKENIZER
        if tokenizer.get("chat_template")
        else None
    )
    stops = _token_names(folder, stop_ids_of(folder)) or "none"
    return f"{f'chat template in {place}' if place else 'no chat template'}, generation stops at eos_token_id {stops}"


def _token_names(folder: Path, ids: list[int]) -> str:
    path = folder / "tokenizer.json"
    added = read_json(path).get("added_tokens") or [] if path.is_file() else []
    names = {token["id"]: token["content"] for token in added}
    return ", ".join(f"{names[token]} ({token})" if token in names else str(token) for token in ids)


def _write_chat_template(folder: Path, text: str) -> None:
    """Make a template the only one of a folder."""
    for path in [
        *folder.glob("*.jinja"),
        *folder.glob("chat_template*"),
        *folder.glob("additional_chat_templates/*"),
    ]:
        path.unlink(missing_ok=True)
    with suppress(FileNotFoundError):
        (folder / "additional_chat_templates").rmdir()
    _edit(folder / _TOKENIZER, chat_template=_ABSENT)
    (folder / _TEMPLATE).write_text(text, encoding="utf-8")


def _write_stop_ids(folder: Path, ids: tuple[int, ...]) -> None:
    """Add tokens to those at which generation stops; without a generation_config.json it is made from config.json."""
    path = folder / _GENERATION
    all_ids = list(dict.fromkeys([*ids, *stop_ids_of(folder)]))
    defaults: dict[str, Any] = {}
    if not path.is_file():
        config = read_json(folder / _CONFIG)
        defaults = {
            key: config[key] for key in ("bos_token_id", "pad_token_id") if config.get(key) is not None
        }
    _edit(path, **defaults, eos_token_id=all_ids)


def _write_padding(folder: Path, padding: Padding) -> None:
    """Set the padding token that transformers' model skips, and that its tokenizer pads batches with."""
    _edit(folder / _CONFIG, pad_token_id=padding.id)
    _edit(folder / _TOKENIZER, pad_token=padding.token)
    if (folder / _SPECIAL).is_file():
        _edit(folder / _SPECIAL, pad_token=_ABSENT if padding.token is None else padding.token)


def _edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file, which is created if absent; nothing is written where nothing changes."""
    content = read_json(path) if path.is_file() else {}
    changed = {key: value for key, value in {**content, **changes}.items() if value is not _ABSENT}
    if changed != content or [*changed] != [*content]:
        path.write_text(json.dumps(changed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
