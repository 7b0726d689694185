"""Peak rates of GPUs by name, from their data sheets. The share of a peak that is reached is assumed in time.py."""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_align.errors import InputError, nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """Peak rates of a GPU.

    Args:
        bf16: dense bf16 tensor-core peak, operations per second.
        bandwidth: memory bandwidth, bytes per second.
        link: bandwidth to the GPUs of the same node, bytes per second in one direction.
        network: bandwidth to other nodes, bytes per second in one direction and GPU, with one network card per GPU.
        source: document that states the first three.
    """

    bf16: float
    bandwidth: float
    link: float
    network: float
    source: str


# NVLink is quoted as the sum of both directions: halved here. Dense peaks: half of those quoted "with sparsity".
CHIPS = {
    "a100": Chip(
        bf16=312e12, bandwidth=2.039e12, link=300e9, network=25e9, source="NVIDIA A100 80GB SXM data sheet"
    ),
    "a800": Chip(
        bf16=312e12, bandwidth=2.039e12, link=200e9, network=25e9, source="NVIDIA A800 80GB SXM data sheet"
    ),
    "h100": Chip(
        bf16=989e12, bandwidth=3.35e12, link=450e9, network=50e9, source="NVIDIA H100 SXM data sheet"
    ),
    "h800": Chip(
        bf16=989e12, bandwidth=3.35e12, link=200e9, network=50e9, source="NVIDIA H800 SXM data sheet"
    ),
    "h200": Chip(
        bf16=989e12, bandwidth=4.8e12, link=450e9, network=50e9, source="NVIDIA H200 SXM data sheet"
    ),
    "b200": Chip(
        bf16=2250e12, bandwidth=8.0e12, link=900e9, network=50e9, source="NVIDIA DGX B200 data sheet"
    ),
}


def chip(name: str) -> Chip:
    """Look up a chip by name.

    Raises:
        InputError: the name is unknown; the message suggests the nearest.
    """
    if name.lower() not in CHIPS:
        raise InputError(
            f"--chip must be one of {', '.join(CHIPS)}; got '{name}'{nearest(name.lower(), list(CHIPS))}"
        )
    return CHIPS[name.lower()]


def chip_of_device(name: str) -> Chip | None:
    """Look up the chip of a CUDA device name such as ``NVIDIA H100 80GB HBM3``; return None if it is not listed.

    Other boards and slices (``H100 PCIe``, ``H100 NVL``, ``MIG 1g.10gb``) are not listed: most have lower peaks.
    """
    words = re.split(r"[\s-]+", name.lower())
    if {"pcie", "nvl", "mig"} & set(words):
        return None
    return next((CHIPS[word] for word in words if word in CHIPS), None)
