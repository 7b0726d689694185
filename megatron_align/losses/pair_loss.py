"""A loss of pairs with the names of its options, and the weighted sum of several (TRL's ``loss_type`` list: MPO, RPO).

Shapes: N pairs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_align.losses.responses import Responses


@dataclass(frozen=True, slots=True)
class PairLoss:
    """A loss of pairs, called as its function.

    Args:
        function: ``(chosen, rejected, *, beta, **options) -> [N]`` fp32, not reduced
        options: names of the keyword arguments that it takes besides ``beta``
        batch_coupled: it sorts over the pairs, so it needs all of the step's global batch in one call
        reads_margin: it takes ``margin_N``: by how much each chosen response is better, in units of reward
    """

    function: Callable[..., Tensor]
    options: tuple[str, ...] = ()
    batch_coupled: bool = False
    reads_margin: bool = False

    def __call__(self, chosen: Responses, rejected: Responses, **options: Any) -> Tensor:
        """Return the loss of each pair, ``[N]``."""
        return self.function(chosen, rejected, **options)


@dataclass(frozen=True, slots=True)
class WeightedLosses:
    """The weighted sum of several losses of pairs.

    Args:
        losses: of the pairs
        weights: of each loss
        options: beta and others by name; each goes to the losses that take it
    """

    losses: tuple[PairLoss, ...]
    weights: tuple[float, ...]
    options: Mapping[str, Any]

    def __call__(self, chosen: Responses, rejected: Responses, margin_N: Tensor | None = None) -> Tensor:
        """Return the sum, ``[N]``, not reduced; ``margin_N`` goes to the losses that read margins.

        With a batch-coupled loss only the sum over N has a meaning.
        """
        parts = [
            weight * loss(chosen, rejected, **self._options_of(loss, margin_N))
            for loss, weight in zip(self.losses, self.weights, strict=True)
        ]
        return sum(parts[1:], start=parts[0])

    def _options_of(self, loss: PairLoss, margin_N: Tensor | None) -> dict[str, Any]:
        taken = {name: self.options[name] for name in ("beta", *loss.options) if name in self.options}
        return {**taken, "margin_N": margin_N} if loss.reads_margin else taken
