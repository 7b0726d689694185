"""Initial values of adapters: functions of seed, module, row and the complete weight, the same on every layout."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from megatron_align.config.inputs import PISSA


def uniform_row(seed: int, module: str, row: int, inputs: int) -> Tensor:
    """Return one row of a linear layer's A, ``[inputs]`` fp32 in +-1 / sqrt(inputs)."""
    return (2 * torch.rand(inputs, generator=_generator(seed, module, row)) - 1) / math.sqrt(inputs)


def normal_row(seed: int, module: str, row: int, size: int) -> Tensor:
    """Return one row of an embedding's B, ``[size]`` fp32 of the standard normal distribution."""
    return torch.randn(size, generator=_generator(seed, module, row))


def principal_factors(weight_OI: Tensor, rank: int, scale: float, init: str) -> tuple[Tensor, Tensor]:
    """Return A and B of PiSSA (arXiv:2404.02948): ``scale x B A`` is the nearest matrix of the rank to a weight.

    Both are fp32. The common sign of two singular vectors is free: the largest element of A's rows is positive.

    Args:
        weight_OI: of any dtype.
        rank: of the adapter, at most the weight's smaller side.
        scale: of the adapter.
        init: ``pissa``, or ``pissa_niter_N`` by random projections and N iterations, the same every time.
    """
    match = PISSA.fullmatch(init)
    assert match is not None, "the configuration checks it"
    iterations = match["iterations"]
    weight_OI = weight_OI.float()
    if iterations is None:
        u_OR, s_R, v_RI = torch.linalg.svd(weight_OI, full_matrices=False)
    else:
        u_OR, s_R, v_RI = truncated_svd(weight_OI, rank, int(iterations))
    u_OR, s_R, v_RI = u_OR[:, :rank], s_R[:rank], v_RI[:rank]
    largest_R1 = v_RI.abs().argmax(1, keepdim=True)
    root_R = (s_R / scale).sqrt() * v_RI.gather(1, largest_R1)[:, 0].sign()
    return root_R[:, None] * v_RI, u_OR * root_R


def truncated_svd(matrix: Tensor, rank: int, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return left vectors, values and right vectors (as rows) of about the largest singular values of a matrix.

    By random projections (arXiv:0909.4061), which are the same every time.
    """
    with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(matrix, rank, niter=iterations)
    return u, s, v.T


def _generator(seed: int, module: str, row: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{module}/{row}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
