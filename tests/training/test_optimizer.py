"""The gradient norm is exact to fp64 at real sizes, however gradients lie on ranks; matrices decay, vectors do
not; fp32 masters start as the weights.
"""

import pytest
import torch

from tests.harness import training_ranks


def test_norm_of_twenty_million_elements(pool):
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(n, generator=generator) * 1e-3 for n in (19_000_001, 1_000_000, 7)]
    exact = torch.cat(grads).double().norm().item()
    for world in (1, 2):
        assert pool.run(world, training_ranks.norm_of, grads) == pytest.approx([exact] * world, rel=1e-12)


def test_matrices_decay_and_vectors_do_not(pool, tiny_models):
    [(decaying, still, masters_equal)] = pool.run(1, training_ranks.decay_groups, tiny_models())
    assert masters_equal
    assert decaying
    assert all(name.endswith("weight") and "norm" not in name for name in decaying)
    assert still
    assert all(name.endswith("bias") or "norm" in name for name in still)
