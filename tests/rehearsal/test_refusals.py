"""A rehearsal of what another package computes is refused: its kernels need a GPU, and a stand-in would say nothing."""

import pytest

from megatron_align import load_config
from megatron_align.errors import InputError
from megatron_align.rehearsal.rehearse import require_can_rehearse

SECTIONS = {"model": {"path": "m"}, "data": {"train": "d"}, "checkpoint": {"dir": "c"}, "train": {"steps": 1}}


@pytest.mark.parametrize(
    "option, instead",
    [
        ("model.attention=flash", "model.attention: auto"),
        ("model.attention=te", "model.attention: auto"),
        ("model.linear=te", "model.linear: torch"),
        ("optimizer.implementation=apex", "optimizer.implementation: torch"),
        ("train.gradient_accumulation_fusion=true", "train.gradient_accumulation_fusion: false"),
    ],
)
def test_other_packages_cannot_be_rehearsed(option, instead):
    require_can_rehearse(load_config(SECTIONS, []))
    name, value = option.split("=")
    with pytest.raises(
        InputError, match=f"{name}: {value} cannot be rehearsed, .* need a GPU: rehearse {instead}"
    ):
        require_can_rehearse(load_config(SECTIONS, [option]))
