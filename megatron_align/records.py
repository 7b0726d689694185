"""The data types of a run: file -> Record -> Sample -> PackedBatch (tokens, attention layout, LossRows).

Shapes: T tokens, N scored rows and C completions of one pack, L tokens of one sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from operator import itemgetter
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from megatron_align.kernels.packed_attention import PackedLayout

ContextKind = Literal["ulysses", "allgather"]
ROLES = ("system", "user", "assistant", "tool")
# Fields of a message that hold the assistant's reasoning; chat templates read the first, or gpt-oss's second.
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. ``extra`` holds further fields for the chat template (``tool_calls``, ``name``, ...)."""

    role: str
    content: str
    extra: dict[str, Any] = field(default_factory=dict)
    train: bool = True  # False: an assistant turn that is context only

    def for_template(self) -> dict[str, Any]:
        """Return the mapping that chat templates expect."""
        return {"role": self.role, "content": self.content, **self.extra}


@dataclass(frozen=True, slots=True)
class Conversation:
    """Chat sample: every assistant turn is trained on. ``where`` is ``file:line``, for messages."""

    messages: tuple[Message, ...]
    where: str
    tools: tuple[Any, ...] | None = None
    # prompt + completion as messages: only those after the prompt are trained on
    prompt_messages: int | None = None
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
    """A prompt and its judged completions: a pair (chosen, rejected), a pair and a gold answer (triple), a ranked
    list, or a single one.

    Prompt and completions are all message lists, or all plain text (then no chat template is applied).
    """

    kind: Literal["triple", "pair", "ranked", "unpaired"]
    prompt: tuple[Message, ...] | str
    completions: tuple[tuple[Message, ...] | str, ...]
    where: str
    tools: tuple[Any, ...] | None = None
    scores: tuple[float | None, ...] = ()  # of each completion; empty: none were given
    margin: float | None = None  # pair: by how much the chosen one is better
    label: bool | None = None  # unpaired: desirable or not
    weight: float = 1.0


Record = Conversation | Completion | Preference


@dataclass(frozen=True, slots=True)
class Sample:
    """One tokenised sample: ``prompt | completion | completion ...``, the prompt stored once.

    A chat sample has no prompt: it is one completion, and ``scored_L`` marks the trained turns.
    ``scored_L[t]``: token ``t`` is a target (its log-prob enters the loss).
    """

    tokens_L: np.ndarray  # int32
    scored_L: np.ndarray  # bool; the first token of a sample is never set, as nothing predicts it
    prompt_length: int = 0
    completion_lengths: tuple[int, ...] = ()  # empty: one completion, all after the prompt
    scores: tuple[float, ...] = ()  # of each completion, NaN where none was given; empty: none were given
    margin: float = math.nan
    label: bool | None = None
    weight: float = 1.0

    def completion_scored(self) -> np.ndarray:
        """Return the number of targets of each completion (int64)."""
        lengths = self.completion_lengths or (len(self.tokens_L) - self.prompt_length,)
        before = np.concatenate([[0], np.cumsum(self.scored_L[self.prompt_length :], dtype=np.int64)])
        return np.diff(before[np.cumsum([0, *lengths])])


class Columns(dict[str, Tensor]):
    """Tensors of one length by name; reading an absent one raises a LookupError that lists those present."""

    def __missing__(self, name: str) -> Tensor:
        raise LookupError(f"this pack must have a column '{name}', found {sorted(self) or 'none'}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Completions:
    """Values of each completion of a pack, sample after sample; a chat sample is one completion.

    Weights hold the global normaliser: over all packs of all ranks ``weight_C``, taken once per sample, sums to 1,
    and so does ``token_weight_C`` over the scored tokens of all chosen (first) completions, of all second ones, ...

    ``columns``, each ``[C]``, hold what only some objectives need. A pre-pass or a cache fills in:

    - ``reference_logprobs``: float32, the reference's summed log-prob.
    - ``loss_coefficients``: float32, d loss / d summed log-prob of a loss that couples the whole step.
    """

    sample_C: Tensor  # int64: index of its sample in the pack
    weight_C: Tensor  # float32: of its sample in a loss per sample
    token_weight_C: Tensor  # float32: of one of its scored tokens in a loss per token
    length_C: Tensor  # int64: scored tokens
    # int64: its rows: length_C, and for a sample's first completion those of its prompt if that is scored too
    rows_C: Tensor
    last_C: Tensor  # int64: hidden row of its last token
    score_C: Tensor  # float32, NaN where none was given
    margin_C: Tensor  # float32: by how much the chosen one of its pair is better, NaN where none was given
    desirable_C: Tensor  # bool: the label of an unpaired completion
    columns: Columns = field(default_factory=Columns)


@dataclass(frozen=True, slots=True)
class LossRows:
    """The scored rows of one pack: hidden row ``row_N`` predicts ``target_N`` and weighs ``weight_N``.

    ``weight_N`` already holds the global normaliser, so the step's loss is a plain sum over every row of
    every pack of every rank. ``sequence_N`` is the index of the completion that a row belongs to, ascending.
    ``columns``, each ``[N]``, hold what only some objectives need (log-probs of an earlier policy, advantages, ...).
    """

    row_N: Tensor  # int64
    target_N: Tensor  # int64
    sequence_N: Tensor  # int64
    weight_N: Tensor  # float32
    prompt_N: Tensor  # bool: the target is in the prompt, whose rows come before the first completion's
    completions: Completions
    # On the host: number of rows and completions up to the end of each sample.
    ends: tuple[tuple[int, int], ...]
    columns: Columns = field(default_factory=Columns)
    host_row_N: np.ndarray | None = None  # for rows on a device: ``row_N`` on the host
    # Numbers of the pre-pass, the same for all packs of a step.
    step_statistics: Mapping[str, float] = field(default_factory=dict)

    def changed(self, change: Callable[[Tensor], Tensor]) -> LossRows:
        """Return the rows with every tensor changed."""
        return replace(
            self,
            **_each(self, change),
            host_row_N=self.rows_on_host(),
            completions=replace(self.completions, **_each(self.completions, change)),
        )

    def rows_on_host(self) -> np.ndarray:
        """Return ``row_N`` of an entire pack without synchronising with the device."""
        return self.row_N.numpy() if self.host_row_N is None else self.host_row_N

    def slabs(
        self, most_rows: int, *, whole_samples: bool, owner_N: np.ndarray | None = None
    ) -> list[LossRows]:
        """Split into consecutive slabs of at most ``most_rows`` rows, without synchronising with the device.

        Args:
            most_rows: limit of a slab. With ``whole_samples`` a sample that is longer is a slab by itself.
            whole_samples: slabs hold complete samples, and their ``sequence_N``, ``sample_C`` and ``ends`` count
                from 0. False: rows are cut anywhere; ``sequence_N`` and ``completions`` stay the pack's.
            owner_N: the rank that holds each row, if they are spread over several: the limit then applies to the
                rank that holds most of a slab. Default: one rank holds all.
        """
        rows = self.row_N.shape[0]
        owner_N = np.zeros(rows, np.int64) if owner_N is None else owner_N
        held_NR = owner_N[:, None] == np.arange(owner_N.max(initial=0) + 1)
        before_NR = np.concatenate([np.zeros_like(held_NR[:1], np.int64), held_NR.cumsum(0)])
        if not whole_samples:
            cuts = [0]
            while cuts[-1] < rows:
                full_R = before_NR[cuts[-1]] + most_rows
                cuts.append(int((before_NR <= full_R).all(1).sum()) - 1)
            return [replace(self, **_each(self, itemgetter(slice(a, b))), ends=()) for a, b in pairwise(cuts)]
        parts, first, start = [], 0, 0
        for i, (stop, _) in enumerate(self.ends):
            if i > first and (before_NR[stop] - before_NR[start]).max() > most_rows:
                parts.append(self._samples(first, i))
                first, start = i, self.ends[i - 1][0]
        return [*parts, self._samples(first, len(self.ends))] if self.ends else []

    def _samples(self, first: int, stop: int) -> LossRows:
        """Return the rows of the samples ``[first, stop)``."""
        (row, completion), (row_end, completion_end) = ((0, 0), *self.ends)[first], self.ends[stop - 1]
        part = _each(self.completions, lambda t: t[completion:completion_end])
        part["sample_C"] = part["sample_C"] - first
        mine = _each(self, lambda t: t[row:row_end])
        mine["sequence_N"] = mine["sequence_N"] - completion
        ends = tuple((r - row, c - completion) for r, c in self.ends[first:stop])
        return replace(self, **mine, completions=Completions(**part), ends=ends)


def _each(
    record: LossRows | Completions | LocalRows | ContextPart, change: Callable[[Tensor], Tensor]
) -> dict[str, Any]:
    """Return the record's fields that are tensors or columns, each tensor changed, by name."""
    changed: dict[str, Any] = {}
    for name, value in ((f.name, getattr(record, f.name)) for f in fields(record)):
        if isinstance(value, Tensor):
            changed[name] = change(value)
        elif isinstance(value, Columns):
            changed[name] = Columns((column, change(tensor)) for column, tensor in value.items())
    return changed


@dataclass(frozen=True, slots=True)
class LocalRows:
    """The rows (or completions) of a pack that are scored from a token of this context-parallel rank.

    ``number_n``, ascending, is the index in the pack; ``row_n`` the index among the rank's tokens.
    """

    number_n: Tensor  # int64
    row_n: Tensor  # int64
    host_number_n: np.ndarray  # the same on the host
    host_row_n: np.ndarray

    @classmethod
    def of(cls, number_n: np.ndarray, row_n: np.ndarray) -> LocalRows:
        """Return the rows with these indices, given on the host."""
        return cls(torch.from_numpy(number_n), torch.from_numpy(row_n), number_n, row_n)


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextPart:
    """The part of a pack on this context-parallel rank: Q = T / ranks of its tokens, and the rows scored from them.

    The pack itself is the same on all ranks; ``data.batching.context_parts`` computes the part.
    """

    kind: ContextKind  # how the ranks attend together, see ``model.context``
    token_Q: Tensor  # int64, ascending: indices of its tokens in the pack
    owner_N: np.ndarray  # int64, on the host: the rank of each scored row
    rows: LocalRows
    last: LocalRows  # of the completions' last tokens
    order_T: Tensor | None  # allgather: int64, indices of the pack's tokens, rank after rank
    queries: PackedLayout | None  # allgather: the attention layout of these tokens over the pack

    def changed(self, change: Callable[[Tensor], Tensor]) -> ContextPart:
        """Return the part with every tensor changed."""
        return replace(
            self,
            **_each(self, change),
            rows=replace(self.rows, **_each(self.rows, change)),
            last=replace(self.last, **_each(self.last, change)),
            queries=self.queries and self.queries.changed(change),
        )


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One pack = one micro-batch: T tokens, their positions, who attends to whom, and the scored rows."""

    tokens_T: Tensor  # int64
    positions_T: Tensor  # int64, restarting per sample
    layout: PackedLayout
    rows: LossRows
    part: ContextPart | None = None  # of a pack split over context ranks; None: it is not split
    dropout_T: Tensor | None = (
        None  # int64: what an adapter's dropout is drawn from; None: nothing is dropped
    )
    block: Tensor | None = None  # uint8: pinned memory in which the tensors lie, see ``model.transfer``

    def changed(self, change: Callable[[Tensor], Tensor]) -> PackedBatch:
        """Return the batch with every tensor changed, always in the same order; it has no ``block``."""
        return PackedBatch(
            change(self.tokens_T),
            change(self.positions_T),
            self.layout.changed(change),
            self.rows.changed(change),
            self.part and self.part.changed(change),
            None if self.dropout_T is None else change(self.dropout_T),
        )

    def to(self, device: torch.device) -> PackedBatch:
        """Return the batch on ``device``."""
        return self.changed(lambda t: t.to(device, non_blocking=True))

    def held(self) -> tuple[Tensor, Tensor]:
        """Return the tokens that this rank computes, and their positions."""
        if self.part is None:
            return self.tokens_T, self.positions_T
        return self.tokens_T[self.part.token_Q], self.positions_T[self.part.token_Q]

    def held_dropout(self) -> Tensor | None:
        """Return ``dropout_T`` of the tokens that this rank computes."""
        if self.part is None or self.dropout_T is None:
            return self.dropout_T
        return self.dropout_T[self.part.token_Q]
