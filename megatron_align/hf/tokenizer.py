"""Check that Hugging Face folders have the same tokenizer, by comparing its files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from megatron_align.errors import InputError
from megatron_align.model.families import read_json

FAST, SENTENCEPIECE, BPE = "tokenizer.json", "tokenizer.model", "vocab.json"
# Parts of tokenizer.json that decide what an id means; padding, truncation and post-processing do not.
_FAST_PARTS = ("normalizer", "pre_tokenizer", "decoder")


def require_same_tokenizer(folders: list[Path]) -> None:
    """Check that all folders have the same tokenizer, or that none has any.

    The first format that all folders have is compared: ``tokenizer.json`` (vocabulary, merges, added tokens,
    normalisation), SentencePiece's ``tokenizer.model``, or ``vocab.json`` with ``merges.txt``.

    Raises:
        InputError: with the first difference.
    """
    formats = (FAST, SENTENCEPIECE, BPE)
    files = {folder: [name for name in formats if (folder / name).is_file()] for folder in folders}
    if not any(files.values()):
        return
    common = [name for name in formats if all(name in names for names in files.values())]
    if not common:
        listed = ", ".join(f"{' and '.join(names) or 'none'} in {folder}" for folder, names in files.items())
        raise InputError(f"tokenizers must share a file format to be compared, found {listed}")
    read = {FAST: _fast, SENTENCEPIECE: _sentencepiece, BPE: _bpe}[common[0]]
    first = read(folders[0])
    for folder in folders[1:]:
        if difference := _difference(first, read(folder)):
            raise InputError(f"tokenizers differ: {difference} in {folder} and {folders[0]}")


def require_tokenizer_of_reference(reference: Path, model: Path) -> None:
    """Check that a reference reads token ids as the trained model does; a folder without a tokenizer is not checked.

    Raises:
        InputError: with the first difference.
    """
    has_one = any((reference / name).is_file() for name in (FAST, SENTENCEPIECE, BPE))
    if reference.resolve() == model.resolve() or not has_one:
        return
    try:
        require_same_tokenizer([model, reference])
    except InputError as error:
        raise InputError(
            f"reference.path must have model.path's tokenizer, as it scores the same token ids: {error}"
        ) from error


def _fast(folder: Path) -> dict[str, Any]:
    content = read_json(folder / FAST)
    model = content.get("model") or {}
    vocabulary = model.get("vocab") or {}
    if isinstance(vocabulary, list):  # Unigram: tokens and scores
        vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
    added = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model.get("merges") or []]
    parts = {part: content.get(part) for part in _FAST_PARTS}
    return {"vocabulary": {**vocabulary, **added}, "merges": merges, **parts}


def _sentencepiece(folder: Path) -> dict[str, Any]:
    added = folder / "added_tokens.json"
    vocabulary = read_json(added) if added.is_file() else {}
    return {
        "vocabulary": vocabulary,
        SENTENCEPIECE: hashlib.sha256((folder / SENTENCEPIECE).read_bytes()).hexdigest(),
    }


def _bpe(folder: Path) -> dict[str, Any]:
    merges = folder / "merges.txt"
    lines = merges.read_text(encoding="utf-8").split("\n") if merges.is_file() else []
    added = folder / "added_tokens.json"
    vocabulary = {**read_json(folder / BPE), **(read_json(added) if added.is_file() else {})}
    return {
        "vocabulary": vocabulary,
        "merges": [line for line in lines if line and not line.startswith("#version")],
    }


def _difference(first: dict[str, Any], other: dict[str, Any]) -> str | None:
    """Return a description of the first difference; None: there is none."""
    ours, theirs = first["vocabulary"], other["vocabulary"]
    if differing := {token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)}:
        token = min(differing, key=lambda token: theirs.get(token, ours.get(token)))
        ids = f"{theirs.get(token, 'absent')} and {ours.get(token, 'absent')}"
        return (
            f"{len(differing):,} tokens differ, for example {json.dumps(token, ensure_ascii=False)} ({ids})"
        )
    return next((f"{part} differs" for part in first if first[part] != other[part]), None)
