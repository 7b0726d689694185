"""Whether Hugging Face folders have the same tokenizer, by their files: text must mean the same token ids."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from megatron_align.errors import InputError
from megatron_align.model.families import read_json

FAST, PIECES, BPE = "tokenizer.json", "tokenizer.model", "vocab.json"
# Of tokenizer.json; the rest (padding, truncation, what is put around a text) does not give ids their meaning.
_FAST_PARTS = ("normalizer", "pre_tokenizer", "decoder")


def require_same_tokenizer(folders: list[Path]) -> None:
    """Check that all folders have one tokenizer, or none has any.

    They are compared by the first kind of file that all of them have: ``tokenizer.json`` (vocabulary, merges,
    added tokens, normalisation), SentencePiece's ``tokenizer.model``, or ``vocab.json`` with ``merges.txt``.

    Raises:
        InputError: saying where two differ.
    """
    kinds = {
        folder: [kind for kind in (FAST, PIECES, BPE) if (folder / kind).is_file()] for folder in folders
    }
    if not any(kinds.values()):
        return
    common = [kind for kind in (FAST, PIECES, BPE) if all(kind in found for found in kinds.values())]
    if not common:
        facts = ", ".join(f"{' and '.join(found) or 'none'} in {folder}" for folder, found in kinds.items())
        raise InputError(f"the tokenizers must be files of one kind to be compared, found {facts}")
    read = {FAST: _fast, PIECES: _pieces, BPE: _bpe}[common[0]]
    first = read(folders[0])
    for folder in folders[1:]:
        if apart := _difference(first, read(folder)):
            raise InputError(f"the tokenizers must be the same, {apart} in {folder} and {folders[0]}")


def _fast(folder: Path) -> dict[str, Any]:
    content = read_json(folder / FAST)
    model = content.get("model") or {}
    vocabulary = model.get("vocab") or {}
    if isinstance(vocabulary, list):  # Unigram: pieces and scores
        vocabulary = {piece: number for number, (piece, _) in enumerate(vocabulary)}
    added = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model.get("merges") or []]
    parts = {part: content.get(part) for part in _FAST_PARTS}
    return {"vocabulary": {**vocabulary, **added}, "merges": merges, **parts}


def _pieces(folder: Path) -> dict[str, Any]:
    added = folder / "added_tokens.json"
    vocabulary = read_json(added) if added.is_file() else {}
    return {"vocabulary": vocabulary, PIECES: hashlib.sha256((folder / PIECES).read_bytes()).hexdigest()}


def _bpe(folder: Path) -> dict[str, Any]:
    merges = folder / "merges.txt"
    lines = merges.read_text(encoding="utf-8").splitlines() if merges.is_file() else []
    added = folder / "added_tokens.json"
    vocabulary = {**read_json(folder / BPE), **(read_json(added) if added.is_file() else {})}
    return {"vocabulary": vocabulary, "merges": [line for line in lines if not line.startswith("#version")]}


def _difference(first: dict[str, Any], other: dict[str, Any]) -> str | None:
    """Return in words what differs; None if nothing does."""
    ours, theirs = first["vocabulary"], other["vocabulary"]
    if apart := {token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)}:
        token = min(apart, key=lambda token: theirs.get(token, ours.get(token)))
        ids = f"{theirs.get(token, 'absent')} and {ours.get(token, 'absent')}"
        return f"{len(apart):,} tokens differ, such as {json.dumps(token, ensure_ascii=False)} ({ids})"
    return next((f"{part} differs" for part in first if first[part] != other[part]), None)
