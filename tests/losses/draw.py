"""Random responses for the tests of losses, in float64."""

import torch

from megatron_align.losses.responses import Responses


def responses(n: int = 6, seed: int = 0, requires_grad: bool = False) -> Responses:
    """Draw n responses of 3 to 12 tokens, log-probabilities around -1 per token, log-ratios around 0 +- 2."""
    generator = torch.Generator().manual_seed(seed)
    length = torch.randint(3, 13, (n,), generator=generator).double()
    reference = -length * (0.5 + torch.rand(n, dtype=torch.float64, generator=generator))
    policy = reference + 2 * torch.randn(n, dtype=torch.float64, generator=generator)
    policy = policy.clamp(max=-0.1).requires_grad_(requires_grad)
    return Responses(policy_N=policy, length_N=length, reference_N=reference)


def pair(n: int = 6, seed: int = 0, requires_grad: bool = False) -> tuple[Responses, Responses]:
    return responses(n, 2 * seed + 1, requires_grad), responses(n, 2 * seed + 2, requires_grad)


def at_reference(r: Responses) -> Responses:
    """Return the same responses, with the reference's log-probs as the policy's."""
    return Responses(policy_N=r.reference_N, length_N=r.length_N, reference_N=r.reference_N)


def shifted(r: Responses, policy: float = 0.0, reference: float = 0.0) -> Responses:
    return Responses(r.policy_N + policy, r.length_N, r.reference_N + reference)


def taken(r: Responses, index) -> Responses:
    return Responses(r.policy_N[index], r.length_N[index], r.reference_N[index])
