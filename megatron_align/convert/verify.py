"""Verify that a checkpoint and a Hugging Face folder hold the same model: shape, bytes, logits.

Shapes: T tokens of a pack, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_align.checkpoint.card import shape_differences
from megatron_align.checkpoint.integrity import require_intact
from megatron_align.convert.hf_model import read_hf_config
from megatron_align.convert.open_checkpoint import open_checkpoint, open_state
from megatron_align.convert.our_model import one_process
from megatron_align.convert.verify_logits import (
    ComparedModels,
    LogitsFinding,
    compare_layers,
    compare_logits,
    differing_modules,
    first_difference,
)
from megatron_align.convert.verify_tensors import TensorFinding, compare_tensors
from megatron_align.convert.verify_texts import choose_texts
from megatron_align.hf.hub import model_folder
from megatron_align.hf.load import HEAD, open_hf, untied_head
from megatron_align.hf.safetensors import HFWeights
from megatron_align.model.families import ModelShape, rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """The result of a verification. ``tensors`` None: the two have different tensors, see ``shape``."""

    hf: str
    checkpoint: str
    shape: dict[str, tuple[Any, Any]]  # key: (checkpoint's, HF folder's)
    tensors: int | None
    tensor_findings: list[TensorFinding]
    logits: list[LogitsFinding]
    first_difference: str | None  # the first module that differs
    notes: list[str]

    @property
    def tensor_differences(self) -> list[TensorFinding]:
        """The tensors that differ or are not finite."""
        return [tensor for tensor in self.tensor_findings if tensor.reason]

    @property
    def failed(self) -> list[str]:
        """Names of the checks that failed."""
        failures = {
            "shape": self.shape,
            "tensors": self.tensor_differences,
            "logits": self.tensors is None
            or self.first_difference is not None
            or not all(finding.equal for finding in self.logits),
        }
        return [check for check, failed in failures.items() if failed]

    @property
    def equal(self) -> bool:
        """Whether both hold the same model."""
        return not self.failed

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        shape = [
            f"{key} is {ours!r} in the checkpoint, {theirs!r} in the HF folder"
            for key, (ours, theirs) in self.shape.items()
        ]
        lines = [f"shape    DIFFERS: {line}" for line in shape] or ["shape    equal"]
        if self.tensors is None:
            lines.append("tensors  not compared, nor logits: the models have different tensors")
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
            position = "" if finding.equal else f", at token {finding.where[1]} of text {finding.where[0]}"
            lines.append(
                f"logits   {finding.kind}: {finding.texts} texts, {finding.tokens} tokens, "
                f"max abs difference {finding.max_abs_difference:.3g} {sign} {finding.tolerance:g}{position}"
            )
        if self.first_difference:
            lines.append(f"module   the first that differs is {self.first_difference}")
        lines += [f"note     {note}" for note in self.notes]
        verdict = f"FAILED ({', '.join(self.failed)})" if self.failed else "the same model"
        return [*lines, f"{verdict}: {self.checkpoint} and {self.hf}"]

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values; a difference that is not finite is null."""
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
            "first_module_apart": self.first_difference,
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
        data: JSON Lines file of chat samples to compare logits on; None: built-in sentences.
        tolerance: largest absolute difference of a logit.
        deep: run both models layer by layer, with one layer of each in memory. Always done for reward models.

    Raises:
        InputError: either is missing or corrupt, or the data does not fit the model.
    """
    hf = model_folder(hf)
    weights, hf_shape = open_hf(hf)
    opened = open_checkpoint(checkpoint)
    state = open_state(opened)
    read_hf_config(hf, hf_shape)  # refused before everything is read
    require_intact(opened.folder)
    texts, notes = choose_texts(hf, data, hf_shape)
    comparable = tensor_sizes(hf_shape) == tensor_sizes(opened.shape)
    tensors: list[TensorFinding] = []
    logits: list[LogitsFinding] = []
    module = None
    if comparable:
        models = ComparedModels(opened, state, hf, weights, hf_shape)
        tensors = [*compare_tensors(state, weights), *untied_head_finding(weights, opened.shape)]
        with one_process() as groups:
            logits, module = compare_by_kind(models, texts, tolerance, groups, deep or opened.shape.is_reward)
    return Findings(
        hf=str(hf),
        checkpoint=str(opened.folder),
        shape=shape_differences(asdict(opened.shape), asdict(hf_shape)),
        tensors=len(tensor_sizes(hf_shape)) if comparable else None,
        tensor_findings=tensors,
        logits=logits,
        first_difference=module,
        notes=notes,
    )


def untied_head_finding(weights: HFWeights, shape: ModelShape) -> list[TensorFinding]:
    """Return the finding of a stored output head that differs from the embedding it is tied to; none if it is right."""
    if (head := untied_head(weights, shape)) is None:
        return []
    return [TensorFinding(HEAD, "", "", head, "differs from the embedding that it should be tied to")]


def compare_by_kind(
    models: ComparedModels,
    texts: dict[str, list[Tensor]],
    tolerance: float,
    groups: ProcessGroupCollection,
    deep: bool,
) -> tuple[list[LogitsFinding], str | None]:
    """Return the comparison by kind of text, and the first module that differs if logits do."""
    if deep:
        compared = list(compare_layers(models, texts, tolerance, groups))
        return [finding for finding, _ in compared], next((module for _, module in compared if module), None)
    logits = list(compare_logits(models, texts, tolerance, groups))
    wrong = next((finding for finding in logits if not finding.equal), None)
    if wrong is None:
        return logits, None
    modules = differing_modules(models, texts[wrong.kind][wrong.where[0] - 1], groups)
    return logits, first_difference(iter(modules), tolerance)


def _finite(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in entry.items()}


def tensor_sizes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    return {
        name: size for row in rows(shape) for name, size in zip(row.hf, row.hf_shapes(shape), strict=True)
    }
