"""Attention work of samples: the pairs of a token and a token that it sees, exact and estimated.

Shapes: S samples and C completions of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def attention_cost(
    lengths_S: np.ndarray, prompts_S: np.ndarray, completions_S: np.ndarray, shared: bool = True
) -> np.ndarray:
    """Return twice the area (int64) that attention computes for each sample; length^2 for a plain document.

    A prompt of P tokens with k completions c_j costs ``P^2 + 2 P sum(c_j) + sum(c_j^2)``, and k P^2 in place of
    P^2 where each completion computes the prompt again. The c_j are taken as equally long, which never
    overestimates: a step plan needs no more.

    Args:
        lengths_S: tokens of each sample, its prompt once.
        prompts_S: tokens of its prompt.
        completions_S: number of its completions.
        shared: the prompt is computed once.
    """
    own_S = lengths_S - prompts_S
    times_S = np.ones_like(completions_S) if shared else completions_S
    return times_S * prompts_S**2 + 2 * prompts_S * own_S + own_S**2 // completions_S


def visible_keys(
    prompts_S: Sequence[int] | np.ndarray,
    completions_S: Sequence[int] | np.ndarray,
    lengths_C: Sequence[int] | np.ndarray,
    shared: bool = True,
) -> np.ndarray:
    """Return the pairs of a token and a token that it sees (itself among them) within each sample, int64[S].

    Args:
        prompts_S: tokens of each sample's prompt; 0 for chat.
        completions_S: number of its completions; 1 for chat.
        lengths_C: tokens of each completion, sample after sample; of a chat sample, all of its tokens.
        shared: the prompt is computed once for all completions.
    """
    prompts_S, completions_S, lengths_C = (
        np.asarray(values, np.int64) for values in (prompts_S, completions_S, lengths_C)
    )
    prompts_C = np.repeat(prompts_S, completions_S)
    seen_C = _triangle(prompts_C + lengths_C) - (_triangle(prompts_C) if shared else 0)
    before = np.concatenate([[0], np.cumsum(seen_C)])
    ends_S = np.cumsum(completions_S)
    return before[ends_S] - before[ends_S - completions_S] + (_triangle(prompts_S) if shared else 0)


def _triangle(tokens: np.ndarray) -> np.ndarray:
    return tokens * (tokens + 1) // 2
