"""Several losses on the same pairs, weighted and summed, as TRL's ``loss_type`` list with ``loss_weights`` (MPO, RPO).

Shapes: N pairs.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from megatron_align.errors import InputError
from megatron_align.losses.responses import Responses


def parameters(loss: Callable[..., Tensor]) -> set[str]:
    """Return the names of what a loss takes by keyword: its options and statistics."""
    signature = inspect.signature(loss).parameters.values()
    return {parameter.name for parameter in signature if parameter.kind is parameter.KEYWORD_ONLY}


@dataclass(frozen=True)
class WeightedLosses:
    """The weighted sum of losses with their options bound. Call it as one of them.

    Args:
        losses: of the pairs
        weights: of each loss
    """

    losses: tuple[Callable[..., Tensor], ...]
    weights: tuple[float, ...]

    def __call__(self, chosen: Responses, rejected: Responses, **statistics: Any) -> Tensor:
        """Return the sum, ``[N]``, not reduced. Each statistic of the step goes to the losses that take it.

        With a loss that sorts over the batch only the sum over N has a meaning.
        """
        parts = [
            weight * loss(chosen, rejected, **_taken(loss, statistics))
            for loss, weight in zip(self.losses, self.weights, strict=True)
        ]
        return sum(parts[1:], start=parts[0])


def weighted_losses(
    table: Mapping[str, Callable[..., Tensor]],
    loss_types: Sequence[str],
    loss_weights: Sequence[float] | None = None,
    options: Mapping[str, Any] | None = None,
) -> WeightedLosses:
    """Bind options to the named losses of a table; weights are 1 unless given.

    An option goes to every loss that takes it. One that no loss takes is an InputError, and so is a wrong count of
    weights: nothing is ignored.
    """
    losses, options = [table[name] for name in loss_types], options or {}
    weights = [1.0] * len(losses) if loss_weights is None else list(loss_weights)
    if len(weights) != len(losses):
        raise InputError(f"loss_weights must be as many as loss_type, {len(losses)}, got {len(weights)}")
    for option in options:
        if not any(option in parameters(loss) for loss in losses):
            raise InputError(f"{option} is no option of loss_type {', '.join(loss_types)}")
    return WeightedLosses(tuple(partial(loss, **_taken(loss, options)) for loss in losses), tuple(weights))


def _taken(loss: Callable[..., Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: given[name] for name in given.keys() & parameters(loss)}
