"""Logits of a checkpoint against transformers', in fp32: of whole models, or layer by layer.

Shapes: T tokens of a pack, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_align.convert.convert import Checkpoint, load_model
from megatron_align.convert.hf_model import Judge, whole_judge
from megatron_align.convert.state_reader import StateReader
from megatron_align.convert.verify_layers import ModuleDifference, OurLayers, compare_modules
from megatron_align.data.batching.collate import pack
from megatron_align.hf.safetensors import HFWeights
from megatron_align.model import cpu
from megatron_align.model.families import ModelShape
from megatron_align.model.policy import Policy
from megatron_align.records import PackedBatch, Sample

PACK_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class LogitsFinding:
    """Logits of one kind of text; ``where`` is the text and the token of the largest difference."""

    kind: str
    texts: int
    tokens: int
    max_abs_difference: float
    where: tuple[int, int]
    tolerance: float

    @property
    def equal(self) -> bool:
        """Whether they agree; NaN never does."""
        return self.max_abs_difference <= self.tolerance


@dataclass(frozen=True, slots=True)
class Sides:
    """What is compared: a checkpoint and a Hugging Face folder."""

    checkpoint: Checkpoint
    state: StateReader
    hf: str | Path
    weights: HFWeights
    hf_shape: ModelShape


@torch.no_grad()
def compare_logits(
    sides: Sides, texts: dict[str, list[Tensor]], tolerance: float, groups: ProcessGroupCollection
) -> Iterator[LogitsFinding]:
    """Yield the differences of both whole models by kind of text, ours computed in packs."""
    policy = load_model(sides.checkpoint, torch.float32, groups)[0].eval()
    judge = whole_judge(sides.hf, sides.weights, sides.hf_shape).to(cpu.device())
    for kind, batch in texts.items():
        apart = [
            (judge(text[None].to(cpu.device())).logits[0] - ours).abs().amax(-1)
            for text, ours in zip(batch, _packed_logits(policy, batch), strict=True)
        ]
        worst = torch.stack([text_T.max() for text_T in apart])  # NaN wins, as it must
        text = int(worst.argmax())
        yield LogitsFinding(
            kind=kind,
            texts=len(batch),
            tokens=sum(map(len, batch)),
            max_abs_difference=worst.max().item(),
            where=(text + 1, int(apart[text].argmax()) + 1),
            tolerance=tolerance,
        )


def _packed_logits(policy: Policy, texts: list[Tensor]) -> Iterator[Tensor]:
    """Yield our logits ``[tokens, V]`` of each text, computed several texts to a pack."""
    waiting = list(texts)
    while waiting:
        together = [waiting.pop(0)]
        while waiting and sum(map(len, together)) + len(waiting[0]) <= PACK_TOKENS:
            together.append(waiting.pop(0))
        yield from policy.logits(_packed(together).to(cpu.device())).split([len(text) for text in together])


def _packed(texts: list[Tensor]) -> PackedBatch:
    samples = [Sample(text.numpy(), np.zeros(len(text), dtype=bool)) for text in texts]
    return pack(samples, [0.0] * len(texts), sum(map(len, texts)))


def compare_layers(
    sides: Sides, texts: dict[str, list[Tensor]], tolerance: float, groups: ProcessGroupCollection
) -> Iterator[tuple[LogitsFinding, str | None]]:
    """Yield the same from a pass layer by layer, all texts of a kind one after another, and the first module apart."""
    for kind, batch in texts.items():
        found = [differing_modules(sides, text, groups) for text in batch]
        last = torch.tensor([modules[-1].max_abs_difference for modules in found])
        text = int(last.argmax())
        finding = LogitsFinding(
            kind=kind,
            texts=len(batch),
            tokens=sum(map(len, batch)),
            max_abs_difference=last.max().item(),
            where=(text + 1, 0),
            tolerance=tolerance,
        )
        yield finding, first_apart((module for modules in found for module in modules), tolerance)


def differing_modules(sides: Sides, text: Tensor, groups: ProcessGroupCollection) -> list[ModuleDifference]:
    """Return how far each module is from transformers' on one text."""
    ours = OurLayers(sides.state, sides.checkpoint.shape, groups)
    return compare_modules(Judge(sides.hf, sides.weights, sides.hf_shape), ours, text)


def first_apart(modules: Iterator[ModuleDifference], tolerance: float) -> str | None:
    """Return the first module that differs by more than the tolerance, and by how much."""
    for module in modules:
        if module.exceeds(tolerance):
            return f"{module.module} (max abs difference {module.max_abs_difference:.3g})"
    return None
