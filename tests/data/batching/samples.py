"""Samples whose tokens say which sample and position they are."""

import numpy as np

from megatron_align.records import Sample


def sample(tokens, scored):
    return Sample(np.array(tokens, np.int32), np.array(scored, bool))


def group(i, prompt, completions, weight=1.0):
    """Token t of sample i is 1000 i + t + 1; of each completion the first and every third token are scored."""
    tokens = 1000 * i + np.arange(prompt + sum(completions)) + 1
    scored = np.concatenate([np.zeros(prompt, bool), *(np.arange(c) % 3 == 0 for c in completions)])
    if prompt == 0:
        scored[0] = False
    return Sample(tokens.astype(np.int32), scored, prompt, tuple(completions), weight=weight)


def documents(lengths):
    """Token t of sample i is 1000 i + t + 1, every third one is scored."""
    samples = []
    for i, length in enumerate(lengths):
        scored = np.arange(length) % 3 == i % 3
        scored[[0, -1]] = False, True
        samples.append(sample(1000 * i + np.arange(length) + 1, scored))
    return samples
