"""Proof that a checkpoint and a Hugging Face folder hold the same model: shape, bytes, logits.

Shapes: T tokens of a pack, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_align.checkpoint.folder import require_intact, shape_differences
from megatron_align.convert.convert import one_process, open_checkpoint, open_state
from megatron_align.convert.verify_logits import (
    LogitsFinding,
    Sides,
    compare_layers,
    compare_logits,
    differing_modules,
    first_apart,
)
from megatron_align.convert.verify_tensors import TensorFinding, compare_tensors
from megatron_align.convert.verify_texts import choose_texts
from megatron_align.hf.load import HEAD, open_hf, untied_head
from megatron_align.model.families import ModelShape, rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What was compared and what differs. ``tensors`` None: the two have different tensors, see ``shape``."""

    hf: str
    checkpoint: str
    shape: dict[str, tuple[Any, Any]]  # key: (checkpoint's, HF folder's)
    tensors: int | None
    tensor_findings: list[TensorFinding]
    logits: list[LogitsFinding]
    first_apart: str | None  # module, where something differs
    notes: list[str]

    @property
    def tensor_differences(self) -> list[TensorFinding]:
        """The tensors that are not the same on both sides, or not finite."""
        return [tensor for tensor in self.tensor_findings if tensor.reason]

    @property
    def failed(self) -> list[str]:
        """The checks that found a difference."""
        found = {
            "shape": self.shape,
            "tensors": self.tensor_differences,
            "logits": self.tensors is None
            or self.first_apart is not None
            or not all(finding.equal for finding in self.logits),
        }
        return [check for check, differs in found.items() if differs]

    @property
    def equal(self) -> bool:
        """Whether both hold the same model."""
        return not self.failed

    def lines(self) -> list[str]:
        """Return the findings for people."""
        shape = [
            f"{key} is {ours!r} in the checkpoint, {theirs!r} in the HF folder"
            for key, (ours, theirs) in self.shape.items()
        ]
        lines = [f"shape    DIFFERS: {line}" for line in shape] or ["shape    equal"]
        if self.tensors is None:
            lines.append("tensors  not compared, nor logits: the two have different tensors")
        elif self.tensor_differences:
            lines.append(f"tensors  {len(self.tensor_differences)} of {self.tensors} DIFFER")
            lines += [
                f"         {tensor.name}: {tensor.reason}, max abs difference {tensor.max_abs_difference:.3g}"
                for tensor in self.tensor_differences
            ]
        else:
            lines.append(f"tensors  {self.tensors} equal, byte for byte")
        for finding in self.logits:
            sign = "<=" if finding.equal else "DIFFERS: not <="
            place = "" if finding.equal else f", at token {finding.where[1]} of text {finding.where[0]}"
            lines.append(
                f"logits   {finding.kind}: {finding.texts} texts, {finding.tokens} tokens, "
                f"max abs difference {finding.max_abs_difference:.3g} {sign} {finding.tolerance:g}{place}"
            )
        if self.first_apart:
            lines.append(f"module   the first that differs is {self.first_apart}")
        lines += [f"note     {note}" for note in self.notes]
        verdict = f"FAILED ({', '.join(self.failed)})" if self.failed else "the same model"
        return [*lines, f"{verdict}: {self.checkpoint} and {self.hf}"]

    def to_json(self) -> dict[str, Any]:
        """Return the findings for programs; a difference that is not finite is null."""
        return {
            "equal": self.equal,
            "failed": self.failed,
            "hf": self.hf,
            "checkpoint": self.checkpoint,
            "shape": {key: {"checkpoint": ours, "hf": theirs} for key, (ours, theirs) in self.shape.items()},
            "tensors": {
                "compared": self.tensors or 0,
                "differ": [_finite(asdict(tensor)) for tensor in self.tensor_differences],
                "sha256": {tensor.name: tensor.sha256 for tensor in self.tensor_findings},
            },
            "logits": [_finite({**asdict(finding), "equal": finding.equal}) for finding in self.logits],
            "first_module_apart": self.first_apart,
            "notes": self.notes,
        }


def verify(
    hf: str | Path,
    checkpoint: str | Path,
    data: str | None = None,
    tolerance: float = 1e-4,
    deep: bool = False,
) -> Findings:
    """Compare a checkpoint with a Hugging Face folder.

    Args:
        hf: Hugging Face folder.
        checkpoint: a checkpoint, or a run's folder, of which the newest is taken.
        data: JSON Lines file of chat samples to compare logits on; None: sentences of many scripts.
        tolerance: largest absolute difference of a logit.
        deep: run both models layer by layer, with one layer in memory on each side. Reward models always are.

    Raises:
        InputError: either is missing or damaged, or the data does not fit the model.
    """
    weights, hf_shape = open_hf(hf)
    found = open_checkpoint(checkpoint)
    state = open_state(found)
    require_intact(found.folder)
    texts, notes = choose_texts(hf, data, hf_shape)
    comparable = _tensor_sizes(hf_shape) == _tensor_sizes(found.shape)
    tensors: list[TensorFinding] = []
    logits: list[LogitsFinding] = []
    apart = None
    if comparable:
        sides = Sides(found, state, hf, weights, hf_shape)
        tensors = list(compare_tensors(state, weights))
        if (head := untied_head(weights, found.shape)) is not None:
            tensors.append(
                TensorFinding(HEAD, "", "", head, "differs from the embedding that it should be tied to")
            )
        with one_process() as groups:
            logits, apart = _compare_logits(sides, texts, tolerance, groups, deep or found.shape.is_reward)
    return Findings(
        hf=str(hf),
        checkpoint=str(found.folder),
        shape=shape_differences(asdict(found.shape), asdict(hf_shape)),
        tensors=len(_tensor_sizes(hf_shape)) if comparable else None,
        tensor_findings=tensors,
        logits=logits,
        first_apart=apart,
        notes=notes,
    )


def _compare_logits(
    sides: Sides, texts: dict[str, list[Tensor]], tolerance: float, groups: ProcessGroupCollection, deep: bool
) -> tuple[list[LogitsFinding], str | None]:
    """Return what was found by kind of text, and the first module that differs if logits do."""
    if deep:
        found = list(compare_layers(sides, texts, tolerance, groups))
        return [finding for finding, _ in found], next((module for _, module in found if module), None)
    logits = list(compare_logits(sides, texts, tolerance, groups))
    wrong = next((finding for finding in logits if not finding.equal), None)
    if wrong is None:
        return logits, None
    modules = differing_modules(sides, texts[wrong.kind][wrong.where[0] - 1], groups)
    return logits, first_apart(iter(modules), tolerance)


def _finite(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in entry.items()}


def _tensor_sizes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    return {
        name: size for row in rows(shape) for name, size in zip(row.hf, row.hf_shapes(shape), strict=True)
    }
