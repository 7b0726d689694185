"""The model card of a trained model, README.md: base, objective, data, layout, versions and the last metrics.

Its front matter is YAML as the Hugging Face hub reads it. Of files and folders only the names are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import yaml

from megatron_align.errors import listed

CARD = "README.md"
_NOT_SHOWN = ("step", "split", "lr", "grad_norm", "tokens_per_second", "step_seconds")
_OPTIMIZER = ("lr", "schedule", "warmup_steps", "weight_decay", "betas", "clip_grad")


def model_card(
    metadata: Mapping[str, Any],
    rows: Mapping[str, Mapping[str, Any]],
) -> str:
    """Return the text of a model card.

    Args:
        metadata: of the checkpoint that holds the model: step, shape, dtype, versions, configuration, data.
        rows: the last rows of metrics.jsonl, by split (``train``, ``validation``); absent where there is none.
    """
    config, shape = metadata["config"], metadata["shape"]
    objective, base = config["objective"]["name"], config["model"]["path"]
    reward = shape["architecture"].endswith("ForSequenceClassification")
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-classification" if reward else "text-generation",
        "tags": ["megatron-align", PurePath(objective).name],
    }
    if base in metadata.get("hub_models", ()):
        front["base_model"] = base.partition("@")[0]
    kind = "Reward model" if reward else "Model"
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        f"# {kind} trained from {_model_name(base, metadata)} by {PurePath(objective).name}",
        "",
        f"{shape['architecture']}, {metadata['dtype']}, after step {metadata['step']:,}. Made by megatron_align.",
        "",
        "## Training",
        "",
        *_table({**_training(config, metadata), **_objective(config)}),
        "",
        "## Data",
        "",
        *_table(_data(metadata.get("data") or {})),
    ]
    for split, title in (
        ("train", "Metrics of the last step"),
        ("validation", "Metrics on the validation data"),
    ):
        metrics = {
            key: _number(value)
            for key, value in (rows.get(split) or {}).items()
            if key not in _NOT_SHOWN and isinstance(value, int | float) and not isinstance(value, bool)
        }
        if metrics:
            lines += ["", f"## {title}", "", *_table(metrics)]
    versions = {name.replace("_", "-"): version for name, version in metadata["versions"].items()}
    lines += ["", "## Versions", "", *_table(versions)]
    return "\n".join(lines) + "\n"


def _training(config: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, str]:
    train, layout = config["train"], config["parallel"]
    batch = train.get("global_batch_tokens")
    sizes = ", ".join(f"{name} {layout.get(name, 1)}" for name in ("tensor", "pipeline", "context"))
    template = config["data"].get("chat_template")
    return {
        "base": _model_name(config["model"]["path"], metadata),
        "reference": _model_name(config["reference"].get("path") or "", metadata) or "-",
        "chat template": PurePath(template).name if template else "of the base",
        "precision": train["precision"],
        "batch": f"{batch:,} tokens" if batch else f"{train['global_batch_size']:,} samples",
        "sequence length": f"{config['data']['sequence_length']:,}",
        "seed": str(train["seed"]),
        "ranks": f"{metadata.get('world_size', 1)} ({sizes})",
        **{f"optimizer.{key}": str(config["optimizer"].get(key)) for key in _OPTIMIZER},
    }


def _objective(config: Mapping[str, Any]) -> dict[str, str]:
    options = config["objective"]
    return {f"objective.{key}": str(value) for key, value in options.items() if value is not None}


def _data(manifest: Mapping[str, Any]) -> dict[str, str]:
    files = [PurePath(str(source["path"])).name for source in manifest.get("sources", [])]
    counts = {key: manifest.get(key) for key in ("samples", "tokens", "scored_tokens", "dropped", "skipped")}
    return {
        "files": listed(files),
        "shapes": ", ".join(manifest.get("shapes", [])),
        **{key.replace("_", " "): f"{count:,}" for key, count in counts.items() if count is not None},
    }


def _model_name(path: str, metadata: Mapping[str, Any]) -> str:
    """Return a name on the hub as it is, and of a path its last part; of a run's export or checkpoint the last two."""
    if path in metadata.get("hub_models", ()):
        return path
    parts = [part for part in PurePath(path).parts if part not in ("/", "..")]
    return "/".join(
        parts[-2:] if parts and (parts[-1] == "hf" or parts[-1].startswith("step_")) else parts[-1:]
    )


def _table(entries: Mapping[str, str]) -> list[str]:
    cells = [f"| {_cell(key)} | {_cell(value)} |" for key, value in entries.items()]
    return ["| | |", "|---|---|", *cells]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
