"""Compare a checkpoint's logits with transformers', in fp32: complete models, or layer by layer.

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
from transformers import PreTrainedModel

from megatron_align.convert.hf_model import HFModel, load_hf_model
from megatron_align.convert.merged_state import MergedState
from megatron_align.convert.open_checkpoint import Checkpoint
from megatron_align.convert.our_model import empty_model, fill_model, load_model
from megatron_align.convert.state_reader import StateReader
from megatron_align.convert.verify_layers import ModuleDifference, OurLayers, compare_modules
from megatron_align.data.batching.collate import pack
from megatron_align.hf.safetensors import HFWeights
from megatron_align.model import cpu
from megatron_align.model.families import ModelShape, rows
from megatron_align.model.policy import Policy
from megatron_align.records import PackedBatch, Sample

PACK_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class LogitsFinding:
    """The comparison of logits on one kind of text; ``where`` is (text, token) of the largest difference."""

    kind: str
    texts: int
    tokens: int
    max_abs_difference: float
    where: tuple[int, int]
    tolerance: float

    @property
    def equal(self) -> bool:
        """Whether they agree within the tolerance; NaN never does."""
        return self.max_abs_difference <= self.tolerance


@dataclass(frozen=True, slots=True)
class ComparedModels:
    """A checkpoint (of an adapter: merged into its base) and the Hugging Face folder that it is compared with."""

    checkpoint: Checkpoint
    state: StateReader | MergedState
    hf: str | Path
    weights: HFWeights
    hf_shape: ModelShape

    def policy(self, groups: ProcessGroupCollection) -> Policy:
        """Return our complete model in fp32, with the checkpoint's weights."""
        if isinstance(self.state, StateReader):
            return load_model(self.checkpoint, torch.float32, groups)[0].eval()
        chunks = empty_model(self.checkpoint.shape, torch.float32, groups)
        fill_model(chunks, rows(self.checkpoint.shape), self.state.read)
        return chunks[0].eval()


@torch.no_grad()
def compare_logits(
    models: ComparedModels, texts: dict[str, list[Tensor]], tolerance: float, groups: ProcessGroupCollection
) -> Iterator[LogitsFinding]:
    """Yield the comparison of both complete models by kind of text; ours computes packed texts."""
    hf_model = load_hf_model(models.hf, models.weights, models.hf_shape).to(cpu.device())
    yield from compare_models(models.policy(groups), hf_model, texts, tolerance)


@torch.no_grad()
def compare_models(
    policy: Policy, hf_model: PreTrainedModel, texts: dict[str, list[Tensor]], tolerance: float
) -> Iterator[LogitsFinding]:
    """Yield the comparison of our model's logits with those of transformers', by kind of text."""
    for kind, batch in texts.items():
        differences = [
            (hf_model(text[None].to(cpu.device())).logits[0] - ours).abs().amax(-1)
            for text, ours in zip(batch, _packed_logits(policy, batch), strict=True)
        ]
        worst = torch.stack([text_T.max() for text_T in differences])  # NaN wins
        text = int(worst.argmax())
        yield LogitsFinding(
            kind=kind,
            texts=len(batch),
            tokens=sum(map(len, batch)),
            max_abs_difference=worst.max().item(),
            where=(text + 1, int(differences[text].argmax()) + 1),
            tolerance=tolerance,
        )


def _packed_logits(policy: Policy, texts: list[Tensor]) -> Iterator[Tensor]:
    """Yield our logits ``[T, V]`` of each text, computed for several texts per pack."""
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
    models: ComparedModels, texts: dict[str, list[Tensor]], tolerance: float, groups: ProcessGroupCollection
) -> Iterator[tuple[LogitsFinding, str | None]]:
    """Yield the comparison computed layer by layer, by kind of text, and the first module that differs."""
    for kind, batch in texts.items():
        by_text = [differing_modules(models, text, groups) for text in batch]
        last = torch.tensor([modules[-1].max_abs_difference for modules in by_text])
        text = int(last.argmax())
        finding = LogitsFinding(
            kind=kind,
            texts=len(batch),
            tokens=sum(map(len, batch)),
            max_abs_difference=last.max().item(),
            where=(text + 1, 0),
            tolerance=tolerance,
        )
        yield finding, first_difference((module for modules in by_text for module in modules), tolerance)


def differing_modules(
    models: ComparedModels, text: Tensor, groups: ProcessGroupCollection
) -> list[ModuleDifference]:
    """Return each module's difference from transformers' on one text."""
    ours = OurLayers(models.state, models.checkpoint.shape, groups)
    return compare_modules(HFModel(models.hf, models.weights, models.hf_shape), ours, text)


def first_difference(modules: Iterator[ModuleDifference], tolerance: float) -> str | None:
    """Return the first module that differs by more than the tolerance, with the difference."""
    for module in modules:
        if module.exceeds(tolerance):
            return f"{module.module} (max abs difference {module.max_abs_difference:.3g})"
    return None
