"""Each switch to an optional package leaves loss and gradients as they are without it, or as near as FP8 is.

The packages need a GPU: stand-ins with their signatures compute in PyTorch (``harness/fake_packages.py``).
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

DEFAULT = Choice(KernelChoice())
CHOICES = {
    "te linear": Choice(KernelChoice(linear="te"), ("te",)),
    "flash": Choice(KernelChoice(attention="flash"), ("flash3",)),
    "fp8 without rounding": Choice(KernelChoice(linear="te", fp8="tensorwise"), ("te_exact",)),
    "fp8": Choice(KernelChoice(linear="te", fp8="tensorwise"), ("te",)),
    "fp8, recomputed": Choice(KernelChoice(linear="te", fp8="tensorwise"), ("te",), recompute=2),
    "fp8 of blocks": Choice(KernelChoice(linear="te", fp8="blockwise"), ("te",)),
}
ROUNDED = {"fp8", "fp8, recomputed", "fp8 of blocks"}


def packs():
    draw = np.random.default_rng(0)
    samples = [Sample(draw.integers(0, 259, n).astype(np.int32), np.arange(n) > 0) for n in (9, 40, 3, 25)]
    return [pack(samples[:3], [1.0] * 3, tokens=64), pack(samples[3:], [1.0], tokens=64)]


@pytest.fixture(scope="module")
def found(pool, tiny_models):
    """By switch, of each of two tensor- and sequence-parallel ranks: the loss and the gradients by name."""
    of_ranks = pool.run(
        2, switch_ranks.losses_and_gradients, tiny_models("qwen2_untied"), ParallelConfig(tensor=2), packs(),
        [DEFAULT, *CHOICES.values()],
    )  # fmt: skip
    return {name: [of_rank[i] for of_rank in of_ranks] for i, name in enumerate(["default", *CHOICES])}


def distance(got, want):
    """Return the largest relative difference of a loss, and of a gradient by its norm."""
    apart = []
    for (loss, gradients), (want_loss, want_gradients) in zip(got, want, strict=True):
        assert gradients.keys() == want_gradients.keys()
        apart.append(abs(loss / want_loss - 1))
        for name, gradient in gradients.items():
            norm = torch.linalg.vector_norm(want_gradients[name])
            apart.append((torch.linalg.vector_norm(gradient - want_gradients[name]) / norm).item())
    return max(apart)


@pytest.mark.parametrize("switch", [name for name in CHOICES if name not in ROUNDED])
def test_loss_and_gradients_are_those_without_it(switch, found):
    assert distance(found[switch], found["default"]) < 1e-5


@pytest.mark.parametrize("switch", sorted(ROUNDED))
def test_fp8_rounds_every_linear_layer_of_the_transformer(switch, found):
    assert 0.01 < distance(found[switch], found["default"]) < 0.5
    for (_, gradients), (_, exact) in zip(found[switch], found["default"], strict=True):
        assert all(
            not torch.allclose(gradients[name], exact[name], rtol=1e-3)
            for name in exact
            if ".linear_" in name
        )


def test_a_layer_that_is_computed_again_is_rounded_again(found):
    assert distance(found["fp8, recomputed"], found["fp8"]) < 1e-5
