"""Samples that fill every pack of a step: the data of a rehearsal, where only lengths matter.

Shapes: L tokens of a sample, N targets, K tokens of a row's top k.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_align.data.sample_table import MemoryTable
from megatron_align.objectives.base import DataKind, Objective
from megatron_align.records import Sample

COMPLETIONS: dict[DataKind, int] = {"chat": 0, "unpaired": 1, "pair": 2, "triple": 3, "ranked": 4}
PROMPT_SHARE = 16  # a prompt is this part of a sample: plan assumes that every token is scored


class FullPacks(MemoryTable):
    """As many samples as a step has, each as long as a pack, of the first kind of data that an objective takes.

    Args:
        count: samples.
        length: tokens of each.
        objective: what is rehearsed; the values that it reads of the reference's cache are all 0.
        logits: type of the cached logits of an objective on the reference's likeliest tokens.
    """

    def __init__(self, count: int, length: int, objective: Objective, logits: np.dtype):
        kind = objective.data[0]
        self.kind: str = kind
        completions = COMPLETIONS[kind]
        samples = [_sample(completions, length, label=bool(i % 2)) for i in range(count)]
        columns = {}
        if "reference_logprobs" in objective.needs:
            columns["reference_logprobs"] = np.zeros(count * max(1, completions))
        rows = {}
        if objective.top_k:
            shape = (sum(int(sample.scored_L.sum()) for sample in samples), objective.top_k)
            rows["reference_tokens"] = np.broadcast_to(np.zeros((), np.int32), shape)
            rows["reference_logits"] = np.broadcast_to(np.zeros((), logits), shape)
        super().__init__(samples, completion_columns=columns, row_columns=rows)
        self.path = Path("full_packs")
        self.manifest: dict[str, Any] = {"samples": count, "largest_token": 0}

    def last_tokens(self) -> list[int]:
        """See :class:`.TokenStore`; there are none."""
        return []


def _sample(completions: int, length: int, *, label: bool) -> Sample:
    tokens_L, scored_L = np.zeros(length, np.int32), np.ones(length, bool)
    if not completions:
        scored_L[0] = False
        return Sample(tokens_L, scored_L)
    prompt = max(1, length // PROMPT_SHARE)
    scored_L[:prompt] = False
    ends = np.linspace(prompt, length, completions + 1).astype(int)
    return Sample(
        tokens_L,
        scored_L,
        prompt_length=prompt,
        completion_lengths=tuple(np.diff(ends).tolist()),
        scores=tuple(range(completions, 0, -1)),
        label=label if completions == 1 else None,
    )
