"""Inputs of the preference losses: log-probability sums per response, and WPO's weights from them.

Shapes: N responses; in a loss on pairs, ``chosen`` and ``rejected`` hold one response of each of N pairs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_align.errors import InputError


@dataclass(frozen=True)
class Responses:
    """N scored responses. All tensors are ``[N]`` fp32.

    Args:
        policy_N: sum of the scored tokens' log-probabilities under the policy, in nats; carries the gradient
        length_N: scored tokens, at least 1
        reference_N: the same sum under the reference model; None where the loss needs none
    """

    policy_N: Tensor
    length_N: Tensor
    reference_N: Tensor | None = None

    def require_reference(self) -> Tensor:
        """Return ``reference_N``. Raises InputError if there is none."""
        if self.reference_N is None:
            raise InputError("this loss needs reference log-probabilities, got none")
        return self.reference_N

    @property
    def log_ratio_N(self) -> Tensor:
        """``log policy - log reference``, ``[N]``; beta times it is DPO's implicit reward."""
        return self.policy_N - self.require_reference()

    @property
    def mean_logprob_N(self) -> Tensor:
        """Log-probability per token, ``[N]``."""
        return self.policy_N / self.length_N


def wpo_weights(policy_N: Tensor, log_square_sum_N: Tensor, length_N: Tensor) -> Tensor:
    """Return WPO's weight of each response: how likely the policy itself is to write it, ``[N]``, without gradient.

    ``exp(mean over tokens of (log p(token) - log sum_v p(v)^2))``: 1 where a token is as likely as the policy's own
    samples are on average. ``log_square_sum_N`` sums ``log sum_v p(v)^2`` over the response's tokens. A pair's loss is
    multiplied by the product of its two weights. Zhou et al. 2024, arXiv:2406.11827, eq. 2 with sampled alignment.
    TRL: ``use_weighting`` (default False); not for the loss types that sort over the batch.
    """
    with torch.no_grad():
        return torch.exp((policy_N - log_square_sum_N) / length_N)
