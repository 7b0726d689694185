"""Functions from a margin to a loss that the losses on pairs share.

Shapes: N pairs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_align.errors import InputError


def logistic(margin_N: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return ``-(1 - e) log sigmoid(margin) - e log sigmoid(-margin)``, ``[N]``.

    ``e``, the label smoothing in [0, 0.5), is the assumed probability that a preference label is flipped.
    """
    if not 0 <= label_smoothing < 0.5:
        raise InputError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    if label_smoothing == 0:
        return -F.logsigmoid(margin_N)
    return -(1 - label_smoothing) * F.logsigmoid(margin_N) - label_smoothing * F.logsigmoid(-margin_N)


def hinge_loss(margin_N: Tensor) -> Tensor:
    """Return ``max(0, 1 - margin)``, ``[N]``."""
    return torch.relu(1 - margin_N)


def squared_loss(margin_N: Tensor, *, beta: float) -> Tensor:
    """Return ``(margin - 1 / (2 beta))^2``, ``[N]``: IPO's regression to a finite margin."""
    return (margin_N - 1 / (2 * beta)) ** 2
