"""Each switch to an optional package leaves loss and gradients as they are without it, or as near as FP8 is.

What it chooses is called for every layer, and nothing is called without a switch. The packages need a GPU: stand-ins
with their signatures compute in PyTorch (``harness/fake_packages.py``).
"""

import numpy as np
import pytest
import torch

from megatron_align.config import ParallelConfig
from megatron_align.data.batching.collate import pack
from megatron_align.model.kernel_choice import KernelChoice
from megatron_align.records import Sample
from tests.harness import switch_ranks
from tests.harness.switch_ranks import Choice

LAYERS, LINEARS = 4, 4  # linear layers of a layer
ATTENTION, LINEAR = LAYERS, LAYERS * LINEARS  # calls for a pack
ALL = ("te_exact", "flash3", "apex")
TE = {"linear": "te"}
# What is chosen, the packages that are installed, and what is called how often.
EXACT = {
    "all are installed": (Choice(KernelChoice(), ALL), {}),
    "te linear": (Choice(KernelChoice(**TE), ("te",)), {"te linear": LINEAR}),
    "flash": (Choice(KernelChoice(attention="flash"), ("flash3",)), {"attention": ATTENTION}),
    "te attention": (
        Choice(KernelChoice(attention="te"), ("te",)),
        {"attention": ATTENTION, "te attention": ATTENTION},
    ),
    "fused gradients": (Choice(KernelChoice(fused_gradients=True), ("apex",)), {"fused gradient": LINEAR}),
    "fused gradients of te": (
        Choice(KernelChoice(**TE, fused_gradients=True), ("te",)),
        {"te linear": LINEAR, "fused gradient of te": LINEAR},
    ),
    "fp8 without rounding": (
        Choice(KernelChoice(**TE, fp8="tensorwise"), ("te_exact",)),
        {"te linear": LINEAR},
    ),
    "apex update": (
        Choice(KernelChoice(), ("apex",), update="apex"),
        {"apex update": 2},
    ),  # matrices, vectors
}
ROUNDED = {
    "fp8": Choice(KernelChoice(**TE, fp8="tensorwise"), ("te",)),
    "fp8, recomputed": Choice(KernelChoice(**TE, fp8="tensorwise"), ("te",), recompute=2),
    "fp8 of blocks": Choice(KernelChoice(**TE, fp8="blockwise"), ("te",)),
}


def documents():
    draw = np.random.default_rng(0)
    samples = [Sample(draw.integers(0, 259, n).astype(np.int32), np.arange(n) > 0) for n in (9, 40, 3, 25)]
    return pack(samples, [1.0] * 4, tokens=96)


@pytest.fixture(scope="module")
def found(pool, tiny_models):
    """By switch, what each of two tensor- and sequence-parallel ranks found."""
    choices = {"default": Choice(KernelChoice(), update="torch")}
    choices |= {name: choice for name, (choice, _) in EXACT.items()} | ROUNDED
    of_ranks = pool.run(
        2, switch_ranks.losses_and_gradients, tiny_models("qwen2_untied"), ParallelConfig(tensor=2), documents(),
        list(choices.values()),
    )  # fmt: skip
    return {name: [of_rank[i] for of_rank in of_ranks] for i, name in enumerate(choices)}


def distance(got, want):
    """Return the largest relative difference of a loss, and of a gradient by its norm."""
    apart = []
    for ours, theirs in zip(got, want, strict=True):
        assert ours.gradients.keys() == theirs.gradients.keys()
        apart.append(abs(ours.loss / theirs.loss - 1))
        for name, gradient in theirs.gradients.items():
            difference = torch.linalg.vector_norm(ours.gradients[name] - gradient)
            apart.append((difference / torch.linalg.vector_norm(gradient)).item())
    return max(apart)


@pytest.mark.parametrize("switch", EXACT)
def test_loss_and_gradients_are_those_without_it(switch, found):
    assert distance(found[switch], found["default"]) < 1e-5


@pytest.mark.parametrize("switch", EXACT)
def test_what_a_switch_chooses_and_nothing_else_is_called(switch, found):
    assert not any(rank.calls for rank in found["default"])
    for rank in found[switch]:
        assert dict(rank.calls) == EXACT[switch][1]


def test_the_weights_after_apexs_update_are_torchs(found):
    for ours, theirs in zip(found["apex update"], found["default"], strict=True):
        for name, weight in theirs.weights.items():
            torch.testing.assert_close(ours.weights[name], weight, rtol=1e-6, atol=1e-7)
    before, after = (found[name][0].weights for name in ("te linear", "apex update"))
    assert all(not torch.equal(before[name], after[name]) for name in after)


@pytest.mark.parametrize("switch", ROUNDED)
def test_fp8_rounds_every_linear_layer_of_the_transformer(switch, found):
    assert 0.01 < distance(found[switch], found["default"]) < 0.5
    for ours, exact in zip(found[switch], found["default"], strict=True):
        for name in exact.gradients:
            if ".linear_" in name:
                assert not torch.allclose(ours.gradients[name], exact.gradients[name], rtol=1e-3)


def test_a_layer_that_is_computed_again_is_rounded_again(found):
    assert distance(found["fp8, recomputed"], found["fp8"]) < 1e-5
