"""Tokenised samples as batching sees them: an index of lengths and counts, and one sample's tokens at a time.

:class:`megatron_align.data.store.TokenStore` reads them from disk; :class:`MemoryTable` holds them in memory.

Shapes: S samples, C completions and N targets (scored tokens) of the table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_align.records import Sample


class SampleTable(Protocol):
    """A set of tokenised samples; a chat sample has no prompt and one completion.

    Attributes:
        lengths: int64[S], tokens of each sample, its prompt counted once.
        duplicated_lengths: int64[S], tokens where every completion repeats the prompt.
        prompt_lengths: int64[S], tokens of the prompt.
        scored_counts: int64[S], targets of each sample.
        weights: float64[S], of each sample in the loss.
        sources: int32[S], index of the source of the mixture it comes from.
        completion_counts: int64[S], completions of each sample.
        completion_offsets: int64[S+1], index of each sample's first completion among all of the table.
        completion_lengths: int64[C], tokens of each completion.
        completion_scored: int64[C], targets of each completion.
        completion_columns: by name, [C]: further values of each completion, such as ``reference_logprobs``.
        row_columns: by name, [N] or [N, K]: further values of each target, in order of samples and tokens.
    """

    lengths: np.ndarray
    duplicated_lengths: np.ndarray
    prompt_lengths: np.ndarray
    scored_counts: np.ndarray
    weights: np.ndarray
    sources: np.ndarray
    completion_counts: np.ndarray
    completion_offsets: np.ndarray
    completion_lengths: np.ndarray
    completion_scored: np.ndarray

    @property
    def completion_columns(self) -> Mapping[str, np.ndarray]: ...

    @property
    def row_columns(self) -> Mapping[str, np.ndarray]: ...

    def __len__(self) -> int: ...

    def sample(self, i: int) -> Sample:
        """Return sample ``i``."""
        ...


class TrainingData(SampleTable, Protocol):
    """The data of a run: a :class:`.TokenStore`, or the prompts of an online run.

    Attributes:
        kind: of its records.
        path: its name is a key: another one means other data.
        manifest: its inputs and counts.
    """

    kind: str
    path: Path
    manifest: dict[str, Any]

    def last_tokens(self) -> list[int]:
        """Return the distinct tokens that completions end with."""
        ...


class MemoryTable:
    """A :class:`SampleTable` of samples in memory.

    Args:
        samples: in order.
        sources: int[S], index of each sample's source. Default: one source.
        completion_columns: by name, [C].
        row_columns: by name, [N].

    Raises:
        ValueError: if a column's length is not the number of completions, or of targets.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        sources: np.ndarray | None = None,
        *,
        completion_columns: Mapping[str, np.ndarray] | None = None,
        row_columns: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self._samples = list(samples)
        completions = [s.completion_lengths or (len(s.tokens_L) - s.prompt_length,) for s in samples]
        self.lengths = _int64(len(s.tokens_L) for s in samples)
        self.prompt_lengths = _int64(s.prompt_length for s in samples)
        self.completion_counts = _int64(map(len, completions))
        self.duplicated_lengths = self.lengths + (self.completion_counts - 1) * self.prompt_lengths
        self.scored_counts = _int64(s.scored_L.sum() for s in samples)
        self.weights = np.array([s.weight for s in samples], np.float64)
        self.sources = np.zeros(len(self), np.int32) if sources is None else np.asarray(sources, np.int32)
        self.completion_offsets = np.concatenate([[0], np.cumsum(self.completion_counts)])
        self.completion_lengths = _int64(length for lengths in completions for length in lengths)
        self.completion_scored = _int64(count for s in samples for count in s.completion_scored())
        self.completion_columns = dict(completion_columns or {})
        self.row_columns = dict(row_columns or {})
        _require_lengths("completion", self.completion_columns, len(self.completion_lengths))
        _require_lengths("row", self.row_columns, int(self.scored_counts.sum()))

    def __len__(self) -> int:
        return len(self._samples)

    def sample(self, i: int) -> Sample:
        """Return sample ``i``."""
        return self._samples[i]


def _int64(values: Iterable[int]) -> np.ndarray:
    return np.fromiter(values, np.int64)


def _require_lengths(level: str, columns: Mapping[str, np.ndarray], length: int) -> None:
    for name, column in columns.items():
        if len(column) != length:
            raise ValueError(f"{level} column '{name}' must have {length} values, got {len(column)}")
