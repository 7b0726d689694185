"""The identity of a run, for a report: model, data, objective, layout, batch and versions, as its folder says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from megatron_align.checkpoint.card import CARD
from megatron_align.checkpoint.folder import list_steps
from megatron_align.errors import listed
from megatron_align.tools.report_runs import Run


def about(run: Run) -> list[tuple[str, str]]:
    """Return the identity of a run as ``(name, text)``, the same names for every run; "–": its folder does not say."""
    card = _newest_card(run.folder)
    return [(name, text or "–") for name, text in (
        ("model", _model(run, card)),
        ("data", _data(run, card)),
        ("objective", _objective(run)),
        ("layout", _layout(run, card)),
        ("batch", _batch(run)),
        ("optimizer", _optimizer(run)),
        ("versions", ", ".join(f"{name} {version}" for name, version in card.get("versions", {}).items())),
        ("folder", str(run.folder.resolve())),
    )]  # fmt: skip


def _newest_card(folder: Path) -> Mapping[str, Any]:
    """Return the metadata of the newest checkpoint that has readable ones; empty without any."""
    for _, checkpoint in reversed(list_steps(folder)):
        try:
            card = json.loads((checkpoint / CARD).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # being written, deleted or corrupt: an older one says the same
            continue
        if isinstance(card, dict):
            return card
    return {}


def _model(run: Run, card: Mapping[str, Any]) -> str:
    shape, path = card.get("shape", {}), run.config.get("model.path")
    parts = [str(path)] if path else []
    if shape:
        parts.append(
            f"{shape.get('architecture')}, {shape.get('num_layers')} layers, hidden {shape.get('hidden_size')}, "
            f"vocabulary {shape.get('vocab_size')}"
        )
    precision = run.config.get("train.precision")
    return ": ".join(parts) + (f", {precision}" if parts and precision else "")


def _data(run: Run, card: Mapping[str, Any]) -> str:
    train, validation = (run.config.get(f"data.{split}") for split in ("train", "validation"))
    text = _sources(train)
    counts = card.get("data", {})
    if "samples" in counts:
        text += (
            f": {listed(counts.get('shapes', []))}, {counts['samples']:,} samples, {counts.get('tokens', 0):,} tokens, "
            f"{counts.get('scored_tokens', 0):,} trained"
        )
        lost = {name: counts.get(name, 0) for name in ("dropped", "truncated", "skipped")}
        text += "".join(f", {count:,} {name}" for name, count in lost.items() if count)
    return text + (f"; validation {_sources(validation)}" if validation else "")


def _sources(value: Any) -> str:
    sources = value if isinstance(value, list) else [value] if value else []
    return listed(
        f"{source['path']} x {source.get('weight', 1):g}" if isinstance(source, dict) else source
        for source in sources
    )


def _objective(run: Run) -> str:
    options = {
        key.partition(".")[2]: value for key, value in run.config.items() if key.startswith("objective.")
    }
    name = options.pop("name", None)
    if name is None:
        return ""
    given = [f"{key} {_plain(value)}" for key, value in options.items() if value not in (None, False, [])]
    mode, path = run.config.get("reference.mode"), run.config.get("reference.path")
    reference = f"; reference {mode or 'cached'}" if mode or path else ""
    return ", ".join([str(name), *given]) + reference + (f", {path}" if path else "")


def _layout(run: Run, card: Mapping[str, Any]) -> str:
    given = {name: run.config.get(f"parallel.{name}") for name in ("tensor", "pipeline", "context")}
    sizes = {name: size for name, size in given.items() if isinstance(size, int) and size > 0}
    if len(sizes) < len(given):
        return ""
    text = " x ".join(f"{name} {size}" for name, size in sizes.items())
    ranks, model = card.get("world_size"), prod(sizes.values())
    if isinstance(ranks, int) and ranks % model == 0:
        text = f"{ranks} rank{'s' * (ranks != 1)} = {text} x data {ranks // model}"
    chunks = run.config.get("parallel.virtual_pipeline")
    layers, modules = run.config.get("train.recompute_layers"), run.config.get("train.recompute_modules")
    text += f", {chunks} chunks a stage" if chunks else ""
    text += f", every {layers} layers recomputed" if layers else ""
    return text + (f", {listed(modules)} recomputed" if modules else "")


def _batch(run: Run) -> str:
    size, tokens = run.config.get("train.global_batch_size"), run.config.get("train.global_batch_tokens")
    length, packed = run.config.get("data.sequence_length"), run.config.get("data.packing")
    parts = [f"{size:,} samples a step" if isinstance(size, int) else ""]
    parts.append(f"up to {tokens:,} tokens a step" if isinstance(tokens, int) else "")
    parts.append(
        f"{'packs' if packed else 'samples'} of up to {length:,} tokens" if isinstance(length, int) else ""
    )
    steps, epochs = run.config.get("train.steps"), run.config.get("train.epochs")
    parts.append(f"{steps:,} steps" if isinstance(steps, int) else f"{epochs} epochs" if epochs else "")
    return ", ".join(filter(None, parts))


def _optimizer(run: Run) -> str:
    lr, schedule = run.config.get("optimizer.lr"), run.config.get("optimizer.schedule")
    if lr is None:
        return ""
    others = {"weight decay": "weight_decay", "betas": "betas", "clipped at": "clip_grad", "seed": None}
    text = f"AdamW, lr {_plain(lr)}" + (f" {schedule}" if schedule else "")
    text += (
        f", {run.config['optimizer.warmup_steps']} warm-up steps"
        if run.config.get("optimizer.warmup_steps")
        else ""
    )
    for name, key in others.items():
        value = run.config.get(f"optimizer.{key}" if key else "train.seed")
        text += f", {name} {_plain(value)}" if value is not None else ""
    return text


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return f"[{listed(map(_plain, value))}]" if isinstance(value, list) else str(value)
