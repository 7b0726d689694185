"""The GPU check gets to its end whatever a step does, writes each result at once, and its exit code is the gates'."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu_check import packages
from benchmarks.gpu_check.__main__ import STEPS, TOTAL, Step, run
from benchmarks.gpu_check.gates import read_report
from benchmarks.gpu_check.losses import compare
from benchmarks.gpu_check.results import Results

ROOT = Path(__file__).parents[2]
WRITE = (
    "from benchmarks.gpu_check.results import Results; from pathlib import Path; r = Results(Path({out!r})); "
)


def step(name, code, gate=False, seconds=30.0):
    return Step(name=name, about=f"step {name}", command=("-c", code), seconds=seconds, gate=gate)


def ends(results, names):
    return {name: results.rows(name)[-1] for name in names}


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path)


@pytest.fixture
def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_failures_and_hangs_are_rows_and_the_steps_after_them_run(tmp_path, results, environment, capsys):
    write = WRITE.format(out=str(tmp_path))
    sleeper = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {!r}]); time.sleep(60)"
    late = tmp_path / "late"
    grandchild = f"import time; time.sleep(2); open({str(late)!r}, 'w')"
    steps = [
        step("good", write + "r.row('good', 'gate', passed=True, error=0.25)", gate=True),
        step("broken", write + "r.row('broken', 'figure', ms=3); raise OSError('no such device')"),
        step("hanging", sleeper.format(grandchild), seconds=1.0),
        step("figures", write + "r.row('figures', 'figure', ms=1)"),
    ]
    assert run(steps, results, environment, 100.0) == 0
    found = ends(results, ["good", "broken", "hanging", "figures"])
    assert found["good"] | {"seconds": 0} == {
        "step": "good",
        "kind": "end",
        "status": "done",
        "seconds": 0,
        "passed": True,
    }
    assert found["broken"]["status"] == "failed"
    assert found["broken"]["exit_code"] == 1
    assert found["broken"]["reason"] == "OSError: no such device"
    assert results.rows("broken")[0]["ms"] == 3, "what it wrote before it failed stays"
    assert found["hanging"]["status"] == "exceeded its limit"
    assert found["figures"]["status"] == "done"
    printed = capsys.readouterr().out
    assert "passed  error 0.25" in printed
    assert printed == results.text_file.read_text()
    time.sleep(1.5)
    assert not late.exists(), "what a step started ends with it"


@pytest.mark.parametrize(
    "code",
    [
        "r.row('x', 'gate', passed=False)",
        "r.row('x', 'gate', passed=True); r.row('x', 'gate', passed=False)",
        "r.row('x', 'gate', passed=True); raise ValueError",
        "pass",
    ],
    ids=["failed", "one of two", "stopped early", "nothing was checked"],
)
def test_the_exit_code_is_the_gates(tmp_path, results, environment, code):
    steps = [step("x", WRITE.format(out=str(tmp_path)) + code.replace("; raise", "\nraise"), gate=True)]
    assert run(steps, results, environment, 100.0) == 1
    assert results.rows("x")[-1]["passed"] is False


def test_without_time_a_step_is_left_out_and_a_gate_failed(results, environment):
    assert run([step("x", "pass"), step("y", "pass", gate=True)], results, environment, 0.5) == 1
    assert [results.rows(name)[-1]["status"] for name in "xy"] == ["no time left"] * 2


def test_a_complete_run_takes_less_than_nine_minutes():
    assert sum(each.seconds for each in STEPS) <= TOTAL < 9 * 60
    assert [each.name for each in STEPS if each.gate] == ["gates", "losses", "memory"]


def test_losses_that_differ_or_are_no_numbers_fail():
    truth = {"sft": [12.0, 11.0], "dpo": [0.69, 0.5]}
    close = {"sft": [12.01, 11.0], "dpo": [0.691, 0.5]}

    def verdicts(fp32):
        rows = compare({"cpu": truth, "fp32": fp32, "bf16": close})
        return [row["passed"] for kind, row in rows if kind == "gate"]

    assert verdicts(close) == [True] * 4
    assert verdicts({**close, "sft": [12.0, 11.1]}) == [False, True, True, True]
    assert verdicts({**close, "dpo": [float("nan"), 0.5]}) == [True, True, False, True]
    assert [kind for kind, _ in compare({"cpu": truth, "fp32": close, "bf16": close})].count("sft") == 2


def test_a_report_of_tests_becomes_counts_and_first_lines(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="tests.ops.test_a" name="one"/>'
        '<testcase classname="tests.ops.test_a" name="two"><failure message="dq: error 1&#10;more"/></testcase>'
        '<testcase classname="tests.ops.test_b.TestOnGPU" name="three"><skipped/></testcase></testsuite></testsuites>'
    )
    outcomes, failures = read_report(report)
    assert outcomes == {
        "test_a": {"ok": 1, "failed": 1, "skipped": 0},
        "test_b": {"ok": 0, "failed": 0, "skipped": 1},
    }
    assert failures == [("two", "dq: error 1")]


def test_wheels_have_the_tested_versions_and_only_missing_ones_are_installed(tmp_path):
    names = packages.pinned(["megatron-core", "liger-kernel"], packages.CONSTRAINTS.read_text())
    assert names[0].startswith("megatron-core==0.")
    assert names[1] == "liger-kernel"
    assert not {"torch", "triton", "numpy"} & set(packages.WHEELS)
    for name in ("rich-99.0-py3-none-any.whl", "no_such_package-1.0-py3-none-any.whl"):
        (tmp_path / name).touch()
    assert [wheel.name for wheel in packages.missing(tmp_path)] == ["no_such_package-1.0-py3-none-any.whl"]


def test_the_gpu_tests_of_make_start_no_ranks():
    """Several ranks cannot share one GPU: what ``make gpu-test`` selects uses no pool."""
    recipe = (ROOT / "Makefile").read_text().split("\ngpu-test:")[1].split("\n\n")[0]
    assert "tests/ops tests/harness/test_kernel_harness.py -m triton" in recipe
    for file in (ROOT / "tests" / "ops").glob("test_*.py"):
        blocks = file.read_text().split("\n\n\n")
        everywhere = "pytestmark = pytest.mark.triton" in blocks[0]
        for block in blocks:
            if everywhere or "@pytest.mark.triton" in block:
                assert "pool" not in block.split("\n\n")[0], f"{file.name}: {block[:200]}"


@pytest.mark.slow
def test_the_complete_check_runs_on_a_cpu(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check", "--tiny", "--out", tmp_path],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "end"] == [each.name for each in STEPS]
    assert {row["status"] for row in rows if row["kind"] == "end"} == {"done"}
    assert len([row for row in rows if row["step"] == "profile" and row["kind"] == "kernel"]) == 5
    assert {row["difference"] for row in rows if row.get("precision") == "fp32"} == {0.0}, "the same device"
