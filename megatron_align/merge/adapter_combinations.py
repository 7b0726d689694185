"""The merged A and B of one module that several adapters change.

Shapes: E elements of the module's weight, N adapters, O outputs and I inputs, R rank, K sum of the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_align.merge.adapted_weights import weight_delta
from megatron_align.merge.adapter import nearest_factors
from megatron_align.merge.methods import Block, Method
from megatron_align.model.families.adapter import EMBED_TOKENS, Adapter, adapter_tensors

COMBINATIONS = ("cat", "svd", "linear")  # PEFT's names
Factors = tuple[Tensor, Tensor]  # A [R, I] and B [O, R], fp32


class Merged(NamedTuple):
    """Merged A and B, whose scale is 1.

    Args:
        a: ``[R, I]``.
        b: ``[O, R]``.
        squares: sum of squares of the merged task vector, where A and B may hold a part of it.
        held: that of the part.
    """

    a: Tensor
    b: Tensor
    squares: float = 0.0
    held: float = 0.0


class ModuleAdapters:
    """The adapters of one module, and what they are merged to.

    Args:
        module: Hugging Face name.
        adapters: options of each.
        tensors: of each, by PEFT's names.
    """

    def __init__(self, module: str, adapters: Sequence[Adapter], tensors: Sequence[Mapping[str, Tensor]]):
        self._module, self._adapters, self._tensors = module, adapters, tensors
        names = adapter_tensors(module)
        self._factors: list[Factors] = [(each[names[0]].float(), each[names[1]].float()) for each in tensors]
        self._scales = [adapter.scale for adapter in adapters]

    def merged(self, method: Method, combination: str, rank: int) -> Merged:
        """Return the merged A and B.

        Args:
            method: formula and options.
            combination: ``cat``, ``svd`` or ``linear``.
            rank: of ``svd``.
        """
        weights_N = method.task_weights(self._gram())
        if weights_N is None:
            return self._nearest_of_elements(method, rank)
        weights = [weight * scale for weight, scale in zip(weights_N.tolist(), self._scales, strict=True)]
        if combination == "linear":
            return self._summed(weights)
        a_RI = torch.cat([a * weight for (a, _), weight in zip(self._factors, weights, strict=True)])
        b_OR = torch.cat([b for _, b in self._factors], 1)
        return Merged(a_RI, b_OR) if combination == "cat" else truncated(a_RI, b_OR, rank)

    def _summed(self, weights: Sequence[float]) -> Merged:
        """Return the sums of A and of B, each with the square root of its weight, as PEFT's ``linear``."""
        roots_N = torch.tensor([math.sqrt(abs(weight)) for weight in weights])
        signs_N = torch.tensor([math.copysign(1, weight) for weight in weights])
        a_NRI, b_NOR = (torch.stack(every) for every in zip(*self._factors, strict=True))
        return Merged(
            torch.einsum("n,nri->ri", roots_N * signs_N, a_NRI), torch.einsum("n,nor->or", roots_N, b_NOR)
        )

    def _gram(self) -> Tensor:
        """Return the inner products ``[N, N]`` of the task vectors, from A and B, in float64."""
        doubles = [(a.double(), b.double()) for a, b in self._factors]
        rows = [[((b.T @ d) * (a @ c.T)).sum() for c, d in doubles] for a, b in doubles]
        scales_N = torch.tensor(self._scales, dtype=torch.float64)
        return torch.stack([torch.stack(row) for row in rows]) * scales_N[:, None] * scales_N

    def _nearest_of_elements(self, method: Method, rank: int) -> Merged:
        """Return the nearest A and B to the result of a formula that changes single elements."""
        name = f"{self._module}.weight"
        a, b = self._factors[0]
        is_embedding = self._module == EMBED_TOKENS  # whose A has the vocabulary
        size = (a.shape[1], b.shape[0]) if is_embedding else (b.shape[0], a.shape[1])
        blocks = _TaskBlocks(lambda: self._task_vectors(name))
        merged = torch.cat([block.clone() for block in method.merge(blocks, name)]).reshape(size)
        factors = nearest_factors(merged.T if is_embedding else merged, rank)
        return Merged(*factors[:2], squares=merged.double().square().sum().item(), held=factors[2])

    def _task_vectors(self, name: str) -> Tensor:
        """Return the elements ``[N, E]`` that each adapter adds to a tensor, in the tensor's order."""
        every = zip(self._adapters, self._tensors, strict=True)
        return torch.stack(
            [weight_delta(name, slice(None), adapter, each).reshape(-1) for adapter, each in every]
        )


class _TaskBlocks:
    """A tensor's task vectors as one block over a base of zeros, computed again by each iteration."""

    def __init__(self, deltas: Callable[[], Tensor]):
        self._deltas = deltas

    def __iter__(self) -> Iterator[Block]:
        task_NE = self._deltas()
        yield Block(task_NE.new_zeros(task_NE.shape[1]), task_NE)


def truncated(a_KI: Tensor, b_OK: Tensor, rank: int) -> Merged:
    """Return the nearest A and B of a rank to the product of others, from the QR of each, in float64."""
    a_orthogonal_IK, a_upper_KK = torch.linalg.qr(a_KI.T.double())
    b_orthogonal_OK, b_upper_KK = torch.linalg.qr(b_OK.double())
    u, s, vh = torch.linalg.svd(b_upper_KK @ a_upper_KK.T, full_matrices=False)
    kept = min(rank, len(s))
    root = s[:kept].sqrt()
    a_RI = a_KI.new_zeros(rank, a_KI.shape[1])  # the product may have fewer singular values than the rank
    b_OR = b_OK.new_zeros(b_OK.shape[0], rank)
    a_RI[:kept] = (root[:, None] * vh[:kept]) @ a_orthogonal_IK.T
    b_OR[:, :kept] = b_orthogonal_OK @ (u[:, :kept] * root)
    return Merged(a_RI, b_OR, squares=s.square().sum().item(), held=s[:kept].square().sum().item())
