"""A fault is injected at its point, step and rank only, and none is injected unless requested."""

import errno
from pathlib import Path

import pytest

import megatron_align
from megatron_align import faults


def test_nothing_happens_unless_requested(monkeypatch):
    monkeypatch.delenv(faults.VARIABLE, raising=False)
    for point in faults.POINTS:
        faults.at(point, 1)


def test_it_is_injected_at_its_point_step_and_rank(monkeypatch):
    monkeypatch.setenv(faults.VARIABLE, "full@save.file:4:1")
    monkeypatch.setenv("RANK", "1")
    faults.at("save.file", 2)
    faults.at("save.begun", 4)
    with pytest.raises(OSError) as error:
        faults.at("save.file", 4)
    assert error.value.errno == errno.ENOSPC
    monkeypatch.setenv("RANK", "0")
    faults.at("save.file", 4)


@pytest.mark.parametrize("requested", ["kill", "kill@nowhere", "burn@save.file", "kill@save.file:1:0:2"])
def test_a_misspelt_fault_is_an_error(monkeypatch, requested):
    monkeypatch.setenv(faults.VARIABLE, requested)
    with pytest.raises(ValueError, match="must be KIND@POINT"):
        faults.at("save.file", 1)


def test_every_point_is_in_the_code():
    root = Path(megatron_align.__file__).parent
    text = "".join(file.read_text(encoding="utf-8") for file in root.rglob("*.py"))
    for point in faults.POINTS:
        assert f'faults.at("{point}"' in text, point
