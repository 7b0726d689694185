"""Saved activations are counted exactly, and recompute keeps what its formula says: ``k * n + L / k`` boundaries."""

import math

import pytest
import torch

from benchmarks.recompute import PARTS, measure
from benchmarks.saved_bytes import SavedBytes
from megatron_align.config import ParallelConfig
from megatron_align.model import parallel

LAYERS = 6


def test_each_storage_counts_once_and_parameters_do_not():
    weight = torch.randn(10, 10, requires_grad=True)
    x = torch.randn(5, 10, requires_grad=True)
    counter = SavedBytes([weight])
    with counter.watching():
        y = (x @ weight).exp()  # keeps x, weight and its own output
        assert counter.held == 2 * 5 * 10 * 4
        y = y * y.view(50).view(5, 10)  # two views of what exp keeps already
        assert counter.held == 2 * 5 * 10 * 4
        y.sum().backward()
    assert counter.held == 0
    assert counter.peak == 2 * 5 * 10 * 4


def test_an_emptied_storage_counts_for_nothing():
    x = torch.randn(100, requires_grad=True)
    counter = SavedBytes()
    with counter.watching():
        y = x.exp()
    assert counter.held == 400
    y.untyped_storage().resize_(0)
    assert counter.held == 0


@pytest.fixture(scope="module")
def kept(pool):
    """Return ``{kind: (peak, held)}`` of a model of six layers, in boundaries."""
    [found] = pool.run(1, measure_all)
    return found


def measure_all(rank_info):
    parallel.join(rank_info, ParallelConfig())
    found = {"none": measure(LAYERS, torch.float32)}
    found |= {k: measure(LAYERS, torch.float32, merged=k) for k in (1, 2, 4, 6)}
    found |= {parts: measure(LAYERS, torch.float32, parts=parts) for parts in (*((p,) for p in PARTS), PARTS)}
    parallel.leave()
    return found


def test_merged_layers_keep_what_the_formula_says(kept):
    n = kept["none"][1] / LAYERS
    for k in (1, 2, 4, 6):
        peak, held = kept[k]
        assert held == math.ceil(LAYERS / k)
        # The input of the first merged layer is the boundary itself: n counts it once more.
        assert k * n + held - 2 <= peak <= k * n + held, k


def test_every_part_keeps_less(kept):
    none = kept["none"][1]
    parts = [(part,) for part in PARTS]
    assert all(kept[part][1] < none for part in parts)
    # The norms' inputs are kept and nothing else keeps them: two boundaries a layer stay, their outputs do not.
    assert none - kept[("norms",)][1] == pytest.approx(4 * LAYERS, abs=0.05 * LAYERS)
    assert kept[PARTS][1] < min(kept[part][1] for part in parts)
