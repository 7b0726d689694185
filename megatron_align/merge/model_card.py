"""The model card of a merged model: inputs, method, options, and hashes that identify the inputs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_align.merge.methods import METHODS, Method
from megatron_align.storage.tensor_digest import TensorDigest, model_sha256
from megatron_align.version import __version__

CARD, RECORD = "README.md", "merge.json"


@dataclass(frozen=True, slots=True)
class Input:
    """A folder that was merged, and the digest of each of its tensors."""

    role: str
    folder: Path
    tensors: dict[str, TensorDigest]


def write_card(folder: Path, method: Method, inputs: list[Input], assets: str = "model 1") -> None:
    """Write README.md, and merge.json with a hash of every input tensor; ``assets``: whose tokenizer it has."""
    name = next(name for name, method_class in METHODS.items() if method_class is type(method))
    record: dict[str, Any] = {
        "method": name,
        "options": asdict(method),
        "megatron_align": __version__,
        "inputs": [
            {
                "role": each.role,
                "folder": str(each.folder),
                "sha256": model_sha256(each.tensors),
                "tensors": {tensor: digest.sha256 for tensor, digest in each.tensors.items()},
            }
            for each in inputs
        ],
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    options = ", ".join(f"{key} = {value}" for key, value in record["options"].items()) or "none"
    table = [f"| {each['role']} | `{each['folder']}` | `{each['sha256']}` |" for each in record["inputs"]]
    summary = " ".join((type(method).__doc__ or "").partition("\n")[0].split())
    lines = [
        "---",
        "tags: [merge, megatron-align]",
        "---",
        f"# Merged with {name}",
        "",
        summary,
        "",
        f"Options: {options}. Made by megatron_align {record['megatron_align']}.",
        f"Configuration and tokenizer are those of {assets}.",
        "",
        "| role | folder | sha256 of the weights |",
        "|---|---|---|",
        *table,
        "",
        f"The hash is over the lines `name sha256` of all tensors, sorted by name; {RECORD} has those of each tensor.",
    ]
    (folder / CARD).write_text("\n".join(lines) + "\n", encoding="utf-8")
