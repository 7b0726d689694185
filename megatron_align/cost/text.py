"""Format layouts, memory and steps as text and tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from megatron_align.cost.memory import GIB, StageMemory
from megatron_align.cost.placement import Placement
from megatron_align.cost.state import parameter_count, trained_count
from megatron_align.cost.work import StepFlops, Work, step_flops
from megatron_align.model.context_kind import context_kind_of
from megatron_align.model.families import ModelShape
from megatron_align.model.families.adapter import Adapter

PARTS = tuple(f.name for f in fields(StageMemory))


def layout(placement: Placement) -> str:
    """Describe a layout in one line."""
    parallel = placement.parallel
    parts = [f"tensor {parallel.tensor}", f"pipeline {parallel.pipeline}"]
    if parallel.virtual_pipeline:
        parts.append(f"virtual pipeline {parallel.virtual_pipeline}")
    if parallel.context > 1:
        parts.append(f"context {parallel.context} ({context_kind_of(placement.shape, parallel)})")
    return " x ".join((*parts, f"data {placement.data}"))


def recomputation(placement: Placement) -> str:
    """Describe the recomputation of activations in one line."""
    k = placement.recompute_layers
    if placement.recompute_modules:
        return f"{', '.join(placement.recompute_modules)} recomputed"
    return f"one checkpoint per {k} layer{'s' * (k > 1)}" if k else "activations saved"


def trained_text(shape: ModelShape, adapter: Adapter | None, frozen: frozenset[str]) -> str:
    """Describe how many parameters are trained, in one line; empty if all are."""
    if adapter is None and not frozen:
        return ""
    every, trained = parameter_count(shape), trained_count(shape, adapter, frozen)
    if adapter is None:
        return f"{trained:,} of {every:,} parameters ({trained / every:.2%}), the others are frozen"
    return f"{trained:,} parameters, {trained / every:.2%} of the model's {every:,}: {adapter}" + (
        ", and the reward head" if shape.is_reward else ""
    )


def memory_table(memory: tuple[StageMemory, ...]) -> str:
    """Return a table of the GiB per rank of each pipeline stage; equal neighbouring stages share a line."""
    optional = ("rewards", "engine", "critic")  # of some runs only
    parts = tuple(part for part in PARTS if part not in optional or any(getattr(one, part) for one in memory))
    rows = [("stage", *parts, "total")]
    first = 0
    for stage, one in enumerate(memory):
        if stage + 1 < len(memory) and memory[stage + 1] == one:
            continue
        name = str(stage) if first == stage else f"{first}-{stage}"
        rows.append((name, *(f"{getattr(one, part) / GIB:.2f}" for part in parts), f"{one.total / GIB:.2f}"))
        first = stage + 1
    return "GiB per rank\n" + columns(rows)


def shape_text(shape: ModelShape) -> str:
    """Describe a reference or a critic of another shape than the policy's, in one line."""
    return (
        f"{shape.architecture}, {parameter_count(shape) / 1e9:.3g} billion weights, {shape.num_layers} "
        f"layers, hidden {shape.hidden_size}, vocabulary {shape.vocab_size}"
    )


def before_text(memory: tuple[StageMemory, ...]) -> list[str]:
    """Describe the memory of a cached reference before training, on the stage that needs most; empty: there is none."""
    if not memory:
        return []
    most = max(memory, key=lambda one: one.total)
    return [
        f"before training the reference takes up to {most.total / GIB:.2f} GiB per rank, {most.parameters / GIB:.2f} "
        "of them its weights, which are then freed"
    ]


def step_text(placement: Placement, work: Work, flops: StepFlops) -> str:
    """Describe the work of a step in two lines, and how many times the operations of SFT it needs."""
    sft = step_flops(placement, work, 0).model
    ratio = f", {flops.model / sft:.2f} times those of SFT on the same tokens" if flops.model > sft else ""
    return (
        f"step       {work.samples:,} samples, {work.tokens:,} tokens, {work.scored:,} scored, "
        f"{work.micro_batches} micro-batches of {work.pack_tokens:,} tokens "
        f"on each of {placement.data} data-parallel ranks, {1 - work.tokens / work.padded_tokens:.1%} padding\n"
        f"FLOPs      {flops.model:.4g} required by the model{ratio}, {flops.executed:.4g} executed"
    )


def online_text(costs: dict[str, StepFlops]) -> list[str]:
    """Describe the further operations of a step on rollouts, a line for each cause."""
    return [
        f"{name.partition(' ')[0]:10} {of.executed:.4g} FLOPs executed besides these"
        + (f", forward of {name.partition(' ')[2]}" if " " in name else ", on supervised samples")
        for name, of in costs.items()
    ]


def columns(rows: Sequence[tuple[str, ...]], *, last_is_text: bool = False) -> str:
    """Format rows as right-aligned columns; the last column is left-aligned if it is text."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        if last_is_text:
            cells[-1] = row[-1]
        lines.append("  " + "  ".join(cells))
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Format an estimated duration with two or three digits."""
    for unit, length in (("s", 1.0), ("min", 60.0), ("h", 3600.0)):
        if seconds < 100 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds / 86400:,.3g} days"
