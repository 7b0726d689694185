"""Numbers from which the dropout of an adapter is drawn, one for each token of a step, the same on every layout.

A token is named by the seed, the step, its sample's place in the step, its completion and its position. Ranks, packs
and whether prompts are shared do not enter.

Shapes: T tokens of a pack.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from megatron_align.records import Sample

_INCREMENT = 0x9E3779B97F4A7C15


def mix(numbers: np.ndarray) -> np.ndarray:
    """Return well distributed uint64 numbers, one for each of ``numbers``: SplitMix64 (Steele et al. 2014)."""
    mixed = numbers.astype(np.uint64) + np.uint64(_INCREMENT)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def token_keys(
    seed: int, step: int, places: Sequence[int], samples: Sequence[Sample], tokens: int, share_prefix: bool
) -> np.ndarray:
    """Return the key of every token of a pack, int64 ``[T]``; of padding 0.

    Args:
        seed: of the run.
        step: 0-based.
        places: of the samples in the step.
        samples: of the pack, in its order.
        tokens: T.
        share_prefix: how the samples are laid into the pack.
    """
    of_step = mix(mix(np.array([seed])) + np.uint64(step))
    keys_T = np.zeros(tokens, np.uint64)
    start = 0
    for place, sample in zip(places, samples, strict=True):
        of_sample = mix(of_step + np.uint64(place))
        for completion, position in _named_tokens(sample, share_prefix):
            keys = mix(mix(of_sample + completion.astype(np.uint64)) + position.astype(np.uint64))
            keys_T[start : start + len(keys)] = keys
            start += len(keys)
    return keys_T.view(np.int64)


def _named_tokens(sample: Sample, share_prefix: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield completion (0: the prompt) and position of the tokens, in the order in which a pack holds them."""
    if len(sample.completion_lengths) < 2:
        positions = np.arange(len(sample.tokens_L))
        yield np.zeros_like(positions), positions
        return
    prompt = np.arange(sample.prompt_length)
    for number, length in enumerate(sample.completion_lengths, 1):
        if number == 1 or not share_prefix:
            yield np.zeros_like(prompt), prompt
        yield np.full(length, number), len(prompt) + np.arange(length)
