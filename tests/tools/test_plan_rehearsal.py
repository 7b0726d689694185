"""``plan --rehearse`` says which stage does not fit, who holds most, what would fail and where the host waits."""

import json
import subprocess

import pytest

from megatron_align.cost.memory import GIB
from megatron_align.errors import InputError
from megatron_align.tools import plan_rehearsal

REPORT = {
    "stage": 0,
    "micro_batches": 4,
    "tokens": 8192,
    "planned": 61 * GIB,
    "peak": 60 * GIB,
    "holders": {"model/layer.py:70 _normalise": 40 * GIB, "training/optimizer.py:9 step": 20 * GIB},
    "waits": [["waiting for an event", "model/transfer.py:130 read", 1]],
    "faults": [],
    "bytes_outside": 163_000_000_000,
    "product_flops": 5_000_000_000_000,
}


@pytest.fixture
def answers(monkeypatch):
    """Return a function that sets what the rehearsing process writes."""

    def set_answers(*reports):
        done = subprocess.CompletedProcess([], 0, "".join(json.dumps(each) + "\n" for each in reports))
        monkeypatch.setattr(plan_rehearsal.subprocess, "run", lambda *args, **options: done)

    return set_answers


def test_stages_that_fit(answers):
    answers(REPORT, {**REPORT, "stage": 1, "peak": 50 * GIB, "waits": []})
    text, fits = plan_rehearsal.rehearsal([], 2, 8, 80 * GIB)
    assert fits
    assert "4 micro-batches, full packs of 8,192 tokens" in text
    assert [line.split() for line in text.splitlines() if line.startswith("  stage")] == [
        ["stage", "0", "60.00", "61.00", "65.00", "1", "163.0", "5.0"],
        ["stage", "1", "50.00", "61.00", "54.50", "0", "163.0", "5.0"],
    ]
    assert "stage 0 waits 1 time a step: waiting for an event, model/transfer.py:130 read" in text
    assert "out of memory" not in text


def test_what_is_wrong(answers):
    answers(
        {**REPORT, "faults": ["3 times a tensor on cpu in the collective allreduce_ at training/step.py:1 f"]}
    )
    text, fits = plan_rehearsal.rehearsal([], 1, 8, 64 * GIB)
    assert not fits
    assert (
        "stage 0 is out of memory: it needs 65.00 of 64 GiB; at the peak most is held by\n     40.00 GiB  model"
        in text
    )
    assert "stage 0 would fail on a GPU: 3 times a tensor on cpu" in text
    fits_by_memory = plan_rehearsal.rehearsal([], 1, 8, 80 * GIB)[1]
    assert not fits_by_memory


def test_a_rehearsal_that_cannot_be_made(answers):
    answers({"error": "no compiler"})
    with pytest.raises(InputError, match="no compiler"):
        plan_rehearsal.rehearsal([], 1, 8, 64 * GIB)
    answers(REPORT)
    with pytest.raises(InputError, match="stage 1 ended with exit code 0"):
        plan_rehearsal.rehearsal([], 2, 8, 64 * GIB)
