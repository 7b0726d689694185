"""Layouts and memory in words and tables, for people."""

from __future__ import annotations

from dataclasses import fields

from megatron_align.cost.memory import GIB, StageMemory
from megatron_align.cost.placement import Placement
from megatron_align.cost.work import StepFlops, Work
from megatron_align.model.context_kind import kind_of

PARTS = tuple(f.name for f in fields(StageMemory))


def layout(placement: Placement) -> str:
    """Return a layout in words."""
    parallel = placement.parallel
    parts = [f"tensor {parallel.tensor}", f"pipeline {parallel.pipeline}"]
    if parallel.virtual_pipeline:
        parts.append(f"virtual pipeline {parallel.virtual_pipeline}")
    if parallel.context > 1:
        parts.append(f"context {parallel.context} ({kind_of(placement.shape, parallel)})")
    return " x ".join((*parts, f"data {placement.data}"))


def recomputation(placement: Placement) -> str:
    """Return what becomes of activations, in words."""
    k = placement.recompute_layers
    if placement.recompute_modules:
        return f"{', '.join(placement.recompute_modules)} made again"
    return f"one checkpoint per {k} layer{'s' * (k > 1)}" if k else "activations kept"


def memory_table(memory: tuple[StageMemory, ...]) -> str:
    """Return GiB of one rank of each pipeline stage; stages that are alike share a line."""
    rows = [("stage", *PARTS, "needed")]
    first = 0
    for stage, one in enumerate(memory):
        if stage + 1 < len(memory) and memory[stage + 1] == one:
            continue
        name = str(stage) if first == stage else f"{first}-{stage}"
        rows.append((name, *(f"{getattr(one, part) / GIB:.2f}" for part in PARTS), f"{one.total / GIB:.2f}"))
        first = stage + 1
    return "GiB per rank\n" + columns(rows)


def step_text(placement: Placement, work: Work, flops: StepFlops) -> str:
    """Return what a step computes, in two lines."""
    return (
        f"a step     {work.samples:,} samples, {work.tokens:,} tokens, {work.scored:,} scored, "
        f"{work.micro_batches} micro-batches of {work.pack_tokens:,} tokens on each of {placement.data} data ranks, "
        f"{1 - work.tokens / work.padded_tokens:.1%} padding\n"
        f"operations {flops.model:.4g} that the model needs, {flops.executed:.4g} that are run"
    )


def columns(rows: list[tuple[str, ...]], *, last_is_text: bool = False) -> str:
    """Lay rows out in columns, all to the right; the last one to the left if it is text."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        if last_is_text:
            cells[-1] = row[-1]
        lines.append("  " + "  ".join(cells))
    return "\n".join(lines)
