"""The gradient norm is exact to fp64 at real sizes, however gradients lie on ranks."""

import pytest
import torch

from tests.harness import ranks


def test_norm_of_twenty_million_elements(pool):
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(n, generator=generator) * 1e-3 for n in (19_000_001, 1_000_000, 7)]
    exact = torch.cat(grads).double().norm().item()
    for world in (1, 2):
        assert pool.run(world, ranks.norm_of, grads) == pytest.approx([exact] * world, rel=1e-12)
