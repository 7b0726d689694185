"""Rewards of sampled completions before advantages: several combined, truncated and overlong answers.

Shapes: C completions of G prompts, R reward functions. Numbers of a step, in fp64, without gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from megatron_align.errors import InputError
from megatron_align.losses.advantages import Moments, ScoredGroups, whiten

Normalize = Literal["none", "group", "batch"]
STD_EPS = 1e-4  # added to deviations, as TRL does


def combine_rewards(
    rewards: Sequence[Sequence[float | None]],
    weights: Sequence[float] | Sequence[Sequence[float]],
    names: Sequence[str],
    *,
    normalize: Sequence[Normalize] | None = None,
    size_G: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of the rewards of each completion, ``[C]``, and whether any scored it, ``[C]`` bool.

    ``normalize: group`` of every function, with the sum's advantages scaled by the deviation of the batch, is TRL's
    ``multi_objective_aggregation: normalize_then_sum`` (GDPO, arXiv:2601.05242).

    Args:
        rewards: of each function, of each completion; None: this function does not score it, which counts as 0.
        weights: of each function, or of each function for each completion.
        names: of each function, for errors.
        normalize: of each function: (reward - mean) / (deviation + 1e-4) over the completions that it scores of a
            prompt, or of all; None: none.
        size_G: completions of each prompt, for normalisation in groups.

    Raises:
        InputError: a function returned another number of rewards than the first, or NaN or infinity; or there is not
            one weight for each function.
    """
    if len(weights) != len(names):
        raise InputError(
            f"each of the {len(names)} rewards ({', '.join(names)}) needs a weight, got {len(weights)} weights"
        )
    for name, values in zip(names, rewards, strict=True):
        if len(values) != len(rewards[0]):
            raise InputError(
                f"reward {name} must return a number or None for each of {len(rewards[0])} completions, "
                f"got {len(values)}"
            )
    scored_RC = torch.tensor([[value is not None for value in values] for values in rewards])
    number_RC = [[0.0 if value is None else float(value) for value in row] for row in rewards]
    reward_RC = torch.tensor(number_RC, dtype=torch.float64)
    bad = (~reward_RC.isfinite()).nonzero()
    if len(bad):
        r, c = bad[0].tolist()
        raise InputError(
            f"reward {names[r]} must return a finite number or None, got {number_RC[r][c]} for completion {c} of the "
            "step (counting from 0)"
        )
    for r, how in enumerate(normalize or ()):
        reward_RC[r] = _normalized(reward_RC[r], scored_RC[r], how, size_G)
    weight_RC = torch.tensor(list(weights), dtype=torch.float64).reshape(len(names), -1)  # [R, 1] or [R, C]
    return (weight_RC * reward_RC).sum(0), scored_RC.any(0)


def _normalized(reward_C: Tensor, scored_C: Tensor, how: Normalize, size_G: Tensor | None) -> Tensor:
    """Return the rewards of one function, normalised; 0 where it did not score."""
    if how == "none":
        return reward_C
    if how == "batch":
        return whiten(reward_C, Moments.of(reward_C, scored_C)).masked_fill(~scored_C, 0.0)
    if size_G is None:
        raise ValueError("normalisation in groups needs their sizes")
    groups = ScoredGroups.of(reward_C, size_G, scored_C=scored_C)
    return groups.centred() / (groups.spread(groups.deviations()) + STD_EPS)


def truncated(last_token_C: Tensor, end_tokens: Sequence[int]) -> Tensor:
    """Return which completions were cut off, ``[C]`` bool: their last token is none that ends an answer."""
    return ~torch.isin(last_token_C, torch.tensor(list(end_tokens), device=last_token_C.device))


def overlong_penalty(length_C: Tensor, *, limit: int, buffer: int, factor: float = 1.0) -> Tensor:
    """Return DAPO's soft penalty of long answers, ``[C]`` in ``[-factor, 0]``. arXiv:2503.14476, eq. 13.

    0 up to ``limit - buffer`` tokens, then linear down to ``-factor`` at ``limit``.

    Args:
        length_C: tokens of each completion.
        limit: the length limit of generation.
        buffer: tokens before the limit where the penalty begins, 1 to ``limit``.
        factor: penalty at the limit.
    """
    if not 0 < buffer <= limit:
        raise InputError(f"overlong shaping needs a buffer of 1 to {limit} tokens, the limit; got {buffer}")
    return -factor * ((length_C.double() - (limit - buffer)) / buffer).clamp(0, 1)
