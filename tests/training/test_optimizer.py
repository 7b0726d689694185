"""The gradient norm is exact to fp64 at real sizes, however gradients lie on ranks; matrices decay, vectors do
not; fp32 masters start as the weights; an update that the device decides on is that of the host, or none.
"""

from types import SimpleNamespace

import pytest
import torch

from megatron_align.training.optimizer import Optimizer
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


@pytest.mark.parametrize("skip", [True, False])
def test_an_update_that_the_device_decides_on(skip):
    """``launch_update`` clips as the host does, and leaves weight, moments and step as they are if it must."""
    draw = torch.Generator().manual_seed(0)
    weight, gradient = (torch.randn(50, generator=draw) for _ in range(2))
    parameters = [torch.nn.Parameter(weight.clone()) for _ in range(2)]
    launched, expected = (torch.optim.AdamW([p], lr=0.1, fused=True) for p in parameters)
    for optimizer, parameter in zip((launched, expected), parameters, strict=True):
        parameter.grad = 0.1 * gradient
        optimizer.step()
    norm = gradient.double().norm()
    parameters[0].grad, parameters[1].grad = gradient.clone(), gradient * (0.5 / (norm + 1e-6)).float()
    if not skip:
        expected.step()
    owner = SimpleNamespace(
        config=SimpleNamespace(clip_grad=0.5), optimizer=launched, step_with_ready_grads=launched.step
    )
    Optimizer.launch_update(owner, norm, torch.tensor(skip))
    for name in ("step", "exp_avg", "exp_avg_sq"):
        ours, theirs = (o.state[p][name] for o, p in zip((launched, expected), parameters, strict=True))
        assert torch.equal(ours, theirs) if skip else torch.allclose(ours, theirs)
    assert torch.equal(*parameters) if skip else torch.allclose(*parameters)
