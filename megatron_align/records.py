"""The types that flow: file -> Record -> Sample -> PackedBatch (tokens, attention layout, LossRows).

Shapes: T tokens of one pack, N scored rows of one pack, L tokens of one sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from megatron_align.kernels.packed_attention import PackedLayout

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. ``extra`` holds what the chat template may use besides (``tool_calls``, ``name``, ...)."""

    role: str
    content: str
    extra: dict[str, Any] = field(default_factory=dict)
    train: bool = True  # False: an assistant turn that is context only

    def for_template(self) -> dict[str, Any]:
        """Return the mapping that chat templates expect."""
        return {"role": self.role, "content": self.content, **self.extra}


@dataclass(frozen=True, slots=True)
class Conversation:
    """Chat sample: every assistant turn is trained on. ``where`` is ``file:line`` for messages to people."""

    messages: tuple[Message, ...]
    where: str
    tools: tuple[Any, ...] | None = None
    prompt_messages: int | None = None  # conversational prompt + completion: only what follows is trained on
    weight: float = 1.0  # of the sample in the loss


@dataclass(frozen=True, slots=True)
class Completion:
    """Plain text sample: the completion is trained on, no chat template is applied."""

    prompt: str
    completion: str
    where: str
    weight: float = 1.0  # of the sample in the loss


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """A prompt and completions that were judged: a pair (chosen, rejected), a ranked list, or a single one.

    Prompt and completions are all message lists, or all plain text (no chat template then).
    """

    kind: Literal["pair", "ranked", "unpaired"]
    prompt: tuple[Message, ...] | str
    completions: tuple[tuple[Message, ...] | str, ...]
    where: str
    tools: tuple[Any, ...] | None = None
    scores: tuple[float | None, ...] = ()  # of each completion; empty: none was given
    margin: float | None = None  # pair: by how much the chosen one is better
    label: bool | None = None  # unpaired: desirable or not
    weight: float = 1.0


Record = Conversation | Completion | Preference


@dataclass(frozen=True, slots=True)
class Sample:
    """One tokenised sample: ``prompt | completion | completion ...``, the prompt stored once.

    A chat sample has no prompt of its own: it is one completion with ``scored_L`` telling the trained turns.
    ``scored_L[t]``: token ``t`` is a target (its log-prob enters the loss).
    """

    tokens_L: np.ndarray  # int32
    scored_L: np.ndarray  # bool; the first token of a sample is never set, as nothing predicts it
    prompt_length: int = 0
    completion_lengths: tuple[int, ...] = ()  # empty: one completion, all after the prompt
    scores: tuple[float, ...] = ()  # of each completion, NaN where none was given; empty: none at all
    margin: float = math.nan
    label: bool | None = None
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class LossRows:
    """What is scored in one pack: hidden row ``row_N`` predicts ``target_N`` and weighs ``weight_N``.

    ``weight_N`` already holds the global normaliser, so the step's loss is a plain sum over every row of
    every pack of every rank. ``sequence_N`` tells the rows of one sequence from those of the next.
    """

    row_N: Tensor  # int64
    target_N: Tensor  # int64
    sequence_N: Tensor  # int64
    weight_N: Tensor  # float32

    def to(self, device: torch.device) -> LossRows:
        """Return the rows on ``device``."""
        moved = (
            t.to(device, non_blocking=True)
            for t in (self.row_N, self.target_N, self.sequence_N, self.weight_N)
        )
        return LossRows(*moved)


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One pack = one micro-batch: T tokens, where they stand, who sees whom, and what is scored."""

    tokens_T: Tensor  # int64
    positions_T: Tensor  # int64, restarting per sample
    layout: PackedLayout
    rows: LossRows

    def to(self, device: torch.device) -> PackedBatch:
        """Return the batch on ``device``."""
        return PackedBatch(
            self.tokens_T.to(device, non_blocking=True),
            self.positions_T.to(device, non_blocking=True),
            self.layout.to(device),
            self.rows.to(device),
        )
