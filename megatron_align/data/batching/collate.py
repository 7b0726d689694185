"""Collate samples into one pack: their tokens, positions, attention layout and scored rows.

Shapes: T tokens, N scored rows and C completions of one pack, L tokens of one sample.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from megatron_align.kernels.packed_attention import PackedLayout
from megatron_align.records import Columns, Completions, LossRows, PackedBatch, Sample

PAD_ID = 0  # any id works: no token attends to padding, and it is never scored


@dataclass(frozen=True, slots=True, eq=False)
class PackValues:
    """Values of a pack's completions and targets that its samples do not hold, in the order of the samples.

    Args:
        weight_C: weight of each completion's sample.
        token_weight_C: weight of one of its scored tokens.
        completion_columns: further values of the completions by name, each ``[C]``.
        row_columns: further values of the targets by name, ``[N]``, which become fp32, or ``[N, K]``, which keep their
            type; uint16 holds the bits of bf16. Rows of a scored prompt, which have none, get NaN.
    """

    weight_C: np.ndarray
    token_weight_C: np.ndarray
    completion_columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    row_columns: Mapping[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def unknown(cls, completions: int) -> PackValues:
        """Return NaN weights: a loss that reads them is NaN too, which does not go unnoticed."""
        return cls(np.full(completions, math.nan), np.full(completions, math.nan))


def pack(
    samples: Sequence[Sample],
    weights: Sequence[float],
    tokens: int,
    *,
    values: PackValues | None = None,
    share_prefix: bool = True,
    score_prompt: bool = False,
) -> PackedBatch:
    """Concatenate samples into one pack and list the rows that are scored.

    A sample with several completions is one group, ``prompt | completion | completion ...``: positions of each
    completion continue after the prompt, and the row of the last prompt token appears once per completion, as it
    predicts the first token of each. Without ``share_prefix`` the same completions are separate documents,
    ``prompt completion | prompt completion ...``: the same targets in the same order, from other rows.

    ``sequence_N`` counts the completions of the pack: 0, 1, ... in order of the samples and, within a sample, of
    its completions. A chat sample is one completion.

    Args:
        samples: perhaps none (a pack of padding).
        weights: weight of one scored token of each sample.
        tokens: T, at least the samples' tokens; the rest is padding.
        values: of the completions and targets. Default: NaN weights and no columns.
        share_prefix: completions share their prompt; False: each has its own copy.
        score_prompt: the prompt's tokens from the second on are scored too, once, with the first completion.

    Raises:
        ValueError: if the samples are longer than ``tokens``, or a scored token has none before it.
    """
    parts = _PackParts(share_prefix, score_prompt)
    for sample, weight in zip(samples, weights, strict=True):
        parts.add(sample, weight)
    layout = PackedLayout.from_groups(parts.groups, total=tokens)
    tokens_T = np.full(tokens, PAD_ID, dtype=np.int64)
    positions_T = np.zeros(tokens, dtype=np.int64)
    used = parts.tokens
    tokens_T[:used], positions_T[:used] = np.concatenate(parts.token), np.concatenate(parts.position)
    prompt_N, values = np.concatenate(parts.of_prompt), values or PackValues.unknown(parts.completions)
    rows = LossRows(
        torch.from_numpy(np.concatenate(parts.row)),
        torch.from_numpy(np.concatenate(parts.target)),
        torch.from_numpy(np.concatenate(parts.sequence)),
        torch.from_numpy(np.concatenate(parts.weight).astype(np.float32)),
        torch.from_numpy(prompt_N),
        _completions(samples, np.concatenate(parts.last), values, score_prompt),
        tuple(parts.ends[1:]),
        Columns((name, _row_column(column, prompt_N)) for name, column in values.row_columns.items()),
    )
    return PackedBatch(torch.from_numpy(tokens_T), torch.from_numpy(positions_T), layout, rows)


class _PackParts:
    """The documents and scored rows of a pack, collected sample by sample; arrays are to be concatenated."""

    def __init__(self, share_prefix: bool, score_prompt: bool) -> None:
        self._share_prefix, self._score_prompt = share_prefix, score_prompt
        self.groups: list[tuple[int, tuple[int, ...]]] = []
        self.token, self.position, self.row, self.target, self.sequence, self.last = (
            [np.empty(0, np.int64)] for _ in range(6)
        )
        self.weight, self.of_prompt, self.ends = [np.empty(0)], [np.empty(0, bool)], [(0, 0)]
        self.tokens = self.completions = 0

    def add(self, sample: Sample, weight: float) -> None:
        """Append a sample; ``weight``: of one of its scored rows."""
        extra = max(0, sample.prompt_length - 1) if self._score_prompt else 0  # rows of the prompt
        for document in _documents(sample, self._share_prefix):
            self.groups.append(document.group)
            self.token.append(document.tokens)
            self.position.append(document.positions)
            if extra and document.first:
                self.row.append(self.tokens + np.arange(extra))
                self.target.append(document.tokens[1 : extra + 1])
                self.sequence.append(np.full(extra, self.completions))
            self.row.append(self.tokens + document.rows)
            self.target.append(document.targets)
            self.sequence.append(self.completions + document.completions)
            self.last.append(self.tokens + _last_tokens(*document.group))
            self.tokens += len(document.tokens)
            self.completions += len(document.group[1])
        rows = extra + int(sample.scored_L.sum())
        self.weight.append(np.full(rows, weight))
        self.of_prompt.append(np.arange(rows) < extra)
        self.ends.append((self.ends[-1][0] + rows, self.completions))


def _completions(
    samples: Sequence[Sample], last_C: np.ndarray, values: PackValues, score_prompt: bool
) -> Completions:
    counts = [max(1, len(sample.completion_lengths)) for sample in samples]

    def of_samples(values: list[float]) -> np.ndarray:
        return np.repeat(np.array(values, np.float32), counts)

    nothing = np.empty(0, np.int64)
    length_C = np.concatenate([nothing, *(sample.completion_scored() for sample in samples)])
    rows_C = length_C.copy()
    if score_prompt and samples:
        prompts = np.array([sample.prompt_length for sample in samples])
        rows_C[np.cumsum(counts) - counts] += np.maximum(prompts - 1, 0)
    scores = [sample.scores or (math.nan,) * count for sample, count in zip(samples, counts, strict=True)]
    columns_C = {
        "sample_C": np.repeat(np.arange(len(samples)), counts),
        "weight_C": values.weight_C.astype(np.float32),
        "token_weight_C": values.token_weight_C.astype(np.float32),
        "length_C": length_C,
        "rows_C": rows_C,
        "last_C": last_C,
        "score_C": np.array([score for some in scores for score in some], np.float32),
        "margin_C": of_samples([sample.margin for sample in samples]),
        "desirable_C": of_samples([bool(sample.label) for sample in samples]).astype(bool),
    }
    columns = Columns(
        (name, torch.from_numpy(column.astype(np.float32)))
        for name, column in values.completion_columns.items()
    )
    return Completions(
        **{name: torch.from_numpy(column) for name, column in columns_C.items()}, columns=columns
    )


def _row_column(column: np.ndarray, prompt_N: np.ndarray) -> Tensor:
    """Return ``[N]`` float32: the column on the targets, NaN on the rows of prompts; or ``[N, K]`` as it is."""
    if column.ndim == 2:
        assert not prompt_N.any(), "no objective scores prompts and reads such a column"
        values_NK = torch.from_numpy(column)
        return values_NK.view(torch.bfloat16) if column.dtype == np.uint16 else values_NK
    column_N = np.full(len(prompt_N), math.nan, np.float32)
    column_N[~prompt_N] = column
    return torch.from_numpy(column_N)


def _last_tokens(prompt: int, lengths: tuple[int, ...]) -> np.ndarray:
    """Return the last token of each completion of a group; an empty one ends with the prompt."""
    ends = prompt + np.cumsum(lengths, dtype=np.int64) - 1
    return np.where(np.array(lengths) > 0, ends, prompt - 1)


@dataclass(frozen=True, slots=True)
class _Document:
    """A document of a pack: a prompt with one or all of its completions; rows count from its first token."""

    first: bool  # whether it holds its sample's first completion
    group: tuple[int, tuple[int, ...]]
    tokens: np.ndarray
    positions: np.ndarray
    rows: np.ndarray
    targets: np.ndarray
    completions: np.ndarray  # of each row: index of its completion in the document


def _documents(sample: Sample, share_prefix: bool) -> list[_Document]:
    """Return the sample as one document, or as one per completion."""
    tokens, prompt = sample.tokens_L.astype(np.int64), sample.prompt_length
    scored = np.flatnonzero(sample.scored_L)
    if len(sample.completion_lengths) < 2:
        if sample.scored_L[:1].any():
            raise ValueError(
                "pack needs scored tokens with a token before them, got a sample's first one scored"
            )
        positions = np.arange(len(tokens))
        return [
            _Document(
                True,
                (0, (len(tokens),)),
                tokens,
                positions,
                scored - 1,
                tokens[scored],
                np.zeros_like(scored),
            )
        ]
    lengths = np.array(sample.completion_lengths)
    starts = prompt + np.cumsum(lengths) - lengths
    if prompt + lengths.sum() != len(tokens) or (len(scored) and scored[0] < prompt):
        raise ValueError(
            f"pack needs a prompt, never scored, and completions that fill the sample; got {prompt} + "
            f"{list(sample.completion_lengths)} of {len(tokens)} tokens, scored from {scored[:1]}"
        )
    if prompt == 0 and sample.scored_L[starts[lengths > 0]].any():
        raise ValueError("pack needs a prompt before a completion's first token, if it is scored; got none")
    if share_prefix:
        which = np.searchsorted(starts + lengths, scored, side="right")
        rows = np.where(scored == starts[which], prompt - 1, scored - 1)
        inside = [prompt + np.arange(length) for length in lengths]
        positions = np.concatenate([np.arange(prompt), *inside])
        return [
            _Document(
                True, (prompt, sample.completion_lengths), tokens, positions, rows, tokens[scored], which
            )
        ]
    alone: list[_Document] = []
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        document = np.concatenate([tokens[:prompt], tokens[start : start + length]])
        own = prompt + np.flatnonzero(sample.scored_L[start : start + length])
        group, positions = (0, (len(document),)), np.arange(len(document))
        alone.append(
            _Document(not alone, group, document, positions, own - 1, document[own], np.zeros_like(own))
        )
    return alone
