"""Utilisation is the operations that a step's model needs, counted exactly, over the peak of all chips or the CPU."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest

from megatron_align.cost.chips import CHIPS, chip_of_device
from megatron_align.cost.flops import forward_flops, model_flops
from megatron_align.data.batching.step_batches import StepCounts
from megatron_align.model.families import read_shape
from megatron_align.monitoring import mfu
from megatron_align.monitoring.mfu import Utilisation
from megatron_align.objectives.configuration import parse
from tests.harness.tiny import run_arguments

COUNTS = StepCounts(
    samples=4,
    tokens=300,
    weight=4.0,
    duplicated_tokens=300,
    laid_tokens=300,
    padded_tokens=2 * 2 * 128,
    scored_tokens=120,
    scored_rows=120,
    visible_keys=15_000,
    completions=4,
    micro_batches=2,
)


@pytest.fixture
def run(tiny_models, chat_file, tmp_path):
    return parse(run_arguments(tiny_models(), chat_file, tmp_path)), read_shape(tiny_models())


def test_counts_what_the_model_needs(run):
    config, shape = run
    needed = model_flops(forward_flops(shape, 300, 15_000, 120))
    share = Utilisation(config, shape, world_size=2, peak=1e12).of_step(COUNTS, seconds=0.5)
    assert share == pytest.approx(needed / (0.5 * 2 * 1e12), rel=1e-12)
    assert share > 0


def test_the_peak_of_a_cpu_is_measured(run, monkeypatch):
    config, shape = run
    monkeypatch.setattr(mfu, "matrix_product_speed", lambda: 2e12)
    share = Utilisation(config, shape, world_size=1).of_step(COUNTS, seconds=0.5)
    assert share == pytest.approx(
        Utilisation(config, shape, world_size=1, peak=2e12).of_step(COUNTS, seconds=0.5)
    )


def test_there_is_none_where_the_peak_is_unknown(run):
    config, shape = run
    config = replace(config, train=replace(config.train, precision="bf16"))  # which many CPUs only emulate
    assert Utilisation(config, shape, world_size=2).of_step(COUNTS, seconds=0.5) is None


def test_the_measured_speed_is_that_of_the_fastest_product(monkeypatch):
    readings = itertools.accumulate([0.0, 0.1, 0.9, 0.1, 0.4, 1.0, 0.5, 1.0])
    monkeypatch.setattr(mfu, "time", SimpleNamespace(perf_counter=lambda: next(readings)))
    assert mfu.matrix_product_speed(size=8, seconds=1.3) == pytest.approx(2 * 8**3 / 0.4)


def test_chips_are_known_by_their_devices_names():
    assert chip_of_device("NVIDIA H100 80GB HBM3") is CHIPS["h100"]
    assert chip_of_device("NVIDIA A100-SXM4-80GB") is CHIPS["a100"]
    assert chip_of_device("NVIDIA GeForce RTX 4090") is None


@pytest.mark.parametrize(
    "name", ["NVIDIA H100 PCIe", "NVIDIA H200 NVL", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GB200"]
)
def test_a_board_with_another_peak_is_not_taken_for_the_chip(name):
    assert chip_of_device(name) is None
