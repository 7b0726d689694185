"""Samples to one pack: tokens one after the other, where each stands, who sees whom, and what is scored.

Shapes: T tokens, N scored rows and C completions of one pack, L tokens of one sample.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from megatron_align.kernels.packed_attention import PackedLayout
from megatron_align.records import Columns, Completions, LossRows, PackedBatch, Sample

PAD_ID = 0  # any id will do: padding is seen by nobody and never scored


@dataclass(frozen=True, slots=True, eq=False)
class CompletionValues:
    """Values of some samples' completions, in their order, that the step decides; as ``records.Completions`` has them.

    Args:
        weight_C: weight of the completion's sample.
        token_weight_C: weight of one of its scored tokens.
        columns: further values by name, each ``[C]``.
    """

    weight_C: np.ndarray
    token_weight_C: np.ndarray
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def unknown(cls, completions: int) -> CompletionValues:
        """Return NaN weights: a loss that reads them is NaN too, which does not go unnoticed."""
        return cls(np.full(completions, math.nan), np.full(completions, math.nan))


def pack(  # noqa: PLR0913 - one call per pack; the options are of its layout
    samples: Sequence[Sample],
    weights: Sequence[float],
    tokens: int,
    *,
    values: CompletionValues | None = None,
    share_prefix: bool = True,
    score_prompt: bool = False,
    pad_id: int = PAD_ID,
) -> PackedBatch:
    """Lay samples one after the other and name what is scored.

    A sample with several completions is one group, ``prompt | completion | completion ...``: positions of each
    completion go on after the prompt, and the row of the last prompt token appears once per completion, as it
    predicts the first token of each. Without ``share_prefix`` the same completions lie there as documents,
    ``prompt completion | prompt completion ...``: the same targets in the same order, from other rows.

    ``sequence_N`` counts the completions of the pack: 0, 1, ... in order of the samples and, within a sample, of
    its completions. A chat sample is one completion.

    Args:
        samples: perhaps none (a pack of padding).
        weights: weight of one scored token of each sample.
        tokens: T, at least the samples' tokens; the rest is padding.
        values: of the completions. Default: NaN weights and no columns.
        share_prefix: several completions share one prompt; False: each has its own copy.
        score_prompt: the prompt's tokens from the second on are scored too, once, with the first completion.
        pad_id: token id of the padding.

    Raises:
        ValueError: if the samples are longer than ``tokens``, or a token is scored that nothing predicts.
    """
    nothing = np.empty(0, np.int64)
    groups: list[tuple[int, tuple[int, ...]]] = []
    token, position, row, target, sequence, last = ([nothing] for _ in range(6))
    weight, of_prompt, ends = [np.empty(0)], [np.empty(0, bool)], [(0, 0)]
    start, completions = 0, 0
    for sample, one in zip(samples, weights, strict=True):
        extra = max(0, sample.prompt_length - 1) if score_prompt else 0
        for piece in _pieces(sample, share_prefix):
            groups.append(piece.group)
            token.append(piece.tokens)
            position.append(piece.positions)
            if extra and piece.first:
                row.append(start + np.arange(extra))
                target.append(piece.tokens[1 : extra + 1])
                sequence.append(np.full(extra, completions))
            row.append(start + piece.rows)
            target.append(piece.targets)
            sequence.append(completions + piece.completions)
            last.append(start + _last_tokens(*piece.group))
            start += len(piece.tokens)
            completions += len(piece.group[1])
        scored = int(sample.scored_L.sum())
        weight.append(np.full(extra + scored, one))
        of_prompt.append(np.arange(extra + scored) < extra)
        ends.append((ends[-1][0] + extra + scored, completions))
    layout = PackedLayout.from_groups(groups, total=tokens)
    tokens_T = np.full(tokens, pad_id, dtype=np.int64)
    positions_T = np.zeros(tokens, dtype=np.int64)
    tokens_T[:start], positions_T[:start] = np.concatenate(token), np.concatenate(position)
    rows = LossRows(
        *(torch.from_numpy(np.concatenate(column)) for column in (row, target, sequence)),
        torch.from_numpy(np.concatenate(weight).astype(np.float32)),
        torch.from_numpy(np.concatenate(of_prompt)),
        _completions(
            samples, np.concatenate(last), values or CompletionValues.unknown(completions), score_prompt
        ),
        tuple(ends[1:]),
    )
    return PackedBatch(torch.from_numpy(tokens_T), torch.from_numpy(positions_T), layout, rows)


def _completions(
    samples: Sequence[Sample], last_C: np.ndarray, values: CompletionValues, score_prompt: bool
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
    found = {
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
    columns = Columns((name, torch.from_numpy(column)) for name, column in values.columns.items())
    return Completions(**{name: torch.from_numpy(column) for name, column in found.items()}, columns=columns)


def _last_tokens(prompt: int, lengths: tuple[int, ...]) -> np.ndarray:
    """Return where each completion of a group ends; an empty one ends with the prompt."""
    ends = prompt + np.cumsum(lengths, dtype=np.int64) - 1
    return np.where(np.array(lengths) > 0, ends, prompt - 1)


@dataclass(frozen=True, slots=True)
class _Piece:
    """A prompt with its completions as it will lie in a pack; rows count from its first token."""

    first: bool  # it holds its sample's first completion
    group: tuple[int, tuple[int, ...]]
    tokens: np.ndarray
    positions: np.ndarray
    rows: np.ndarray
    targets: np.ndarray
    completions: np.ndarray  # of each row, within the piece


def _pieces(sample: Sample, share_prefix: bool) -> list[_Piece]:
    """Return the sample as one piece, or as one document per completion."""
    tokens, prompt = sample.tokens_L.astype(np.int64), sample.prompt_length
    scored = np.flatnonzero(sample.scored_L)
    if len(sample.completion_lengths) < 2:
        if sample.scored_L[:1].any():
            raise ValueError(
                "pack needs scored tokens with a token before them, got a sample's first one scored"
            )
        places = np.arange(len(tokens))
        return [
            _Piece(
                True, (0, (len(tokens),)), tokens, places, scored - 1, tokens[scored], np.zeros_like(scored)
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
            _Piece(True, (prompt, sample.completion_lengths), tokens, positions, rows, tokens[scored], which)
        ]
    alone = []
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        document = np.concatenate([tokens[:prompt], tokens[start : start + length]])
        own = prompt + np.flatnonzero(sample.scored_L[start : start + length])
        group, places = (0, (len(document),)), np.arange(len(document))
        alone.append(_Piece(not alone, group, document, places, own - 1, document[own], np.zeros_like(own)))
    return alone
