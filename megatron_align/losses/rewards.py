"""Rewards of sampled completions before advantages: several combined, truncated and overlong answers.

Shapes: C completions, R reward functions. Numbers of a step, in fp64, without gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_align.errors import InputError


def combine_rewards(
    rewards: Sequence[Sequence[float | None]], weight_R: Sequence[float], names: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of the rewards of each completion, ``[C]``, and whether any scored it, ``[C]`` bool.

    Args:
        rewards: of each function, of each completion; None: this function does not score it, which counts as 0.
        weight_R: of each function.
        names: of each function, for errors.

    Raises:
        InputError: a function returned another number of rewards than the first, or NaN or infinity; or there is not
            one weight for each function.
    """
    if len(weight_R) != len(names):
        raise InputError(
            f"each of the {len(names)} rewards ({', '.join(names)}) needs a weight, got {len(weight_R)} weights"
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
    weights = torch.tensor(list(weight_R), dtype=torch.float64)
    return (weights[:, None] * reward_RC).sum(0), scored_RC.any(0)


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
