"""The launch scripts run as they are: two nodes of gloo ranks under a Slurm that is played by two small scripts.

Slurm's part, as its manual has it: ``srun`` starts the command once per node and hands signals on; ``scontrol``
expands the node list and puts the job back into the queue.
"""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.harness.pool import free_port
from tests.harness.tiny import metrics_of, run_arguments

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "examples" / "launch"
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
for node in 0 1; do SLURM_NODEID=$node "$@" & nodes+=($!); done
trap 'kill -USR1 "${nodes[@]}"' USR1
code=0
for node in "${nodes[@]}"; do
    while kill -0 "$node" 2>/dev/null; do wait "$node" || true; done
    wait "$node" || code=$?
done
exit $code
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in
    show) printf '127.0.0.1\\n127.0.0.2\\n' ;;
    requeue) echo "$2" >>"$REQUEUED" ;;
esac
"""


@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.iterdir()))
def test_scripts_are_short_and_parse(script):
    text = (LAUNCH / script).read_text()
    assert len(text.splitlines()) < 60
    assert "set -euo pipefail" in text
    subprocess.run(["bash", "-n", LAUNCH / script], check=True)


def test_a_missing_argument_is_told():
    for script, usage in (
        ("torchrun.sh", "usage: torchrun.sh CONFIG"),
        ("slurm.sbatch", "usage: sbatch"),
        ("slurm_online.sbatch", "usage: sbatch"),
    ):
        done = subprocess.run(["bash", LAUNCH / script], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert usage in done.stderr


@pytest.fixture
def slurm(tmp_path):
    """Return the environment of a job of two nodes with one rank each."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHON": os.sys.executable,
        "PYTHONPATH": str(ROOT),
        "GPUS": "1",
        "OMP_NUM_THREADS": "1",
        "REQUEUED": str(tmp_path / "requeued"),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": str(free_port() - 20000),  # the script makes a port of it
    }


def command(tiny_models, chat_file, run, **options):
    """Return the batch script's command line; what a configuration file lacks follows as options."""
    config = run.parent / "run.yaml"
    config.write_text("objective: {name: sft}\n")
    arguments = run_arguments(tiny_models("qwen2_tied"), chat_file, run, parallel__tensor=2, **options)
    at = arguments.index("--checkpoint.dir")
    return ["bash", LAUNCH / "slurm.sbatch", config, run, *arguments[:at], *arguments[at + 2 :]]


@pytest.mark.slow
def test_two_nodes_train_together(slurm, tiny_models, chat_file, tmp_path):
    run = tmp_path / "run"
    done = subprocess.run(
        command(tiny_models, chat_file, run, train__steps=3),
        env=slurm,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["step"] for row in metrics_of(run)] == [1, 2, 3]
    assert not (tmp_path / "requeued").exists()


@pytest.mark.slow
def test_a_fault_ends_the_job_and_is_not_put_back(slurm, tiny_models, chat_file, tmp_path):
    run = tmp_path / "run"
    done = subprocess.run(
        command(tiny_models, chat_file, run, parallel__pipeline=3),
        env=slurm,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode != 0
    assert "world size must be a multiple of" in done.stdout + done.stderr
    assert not (tmp_path / "requeued").exists()


@pytest.mark.slow
def test_preemption_is_handed_to_the_ranks_and_the_job_goes_back(slurm, tmp_path):
    """A stand-in for training writes down the signal as training does: it saves, leaves the marker and ends."""
    run, started = tmp_path / "run", tmp_path / "started"
    run.mkdir()
    stub = tmp_path / "stub"  # the job is submitted from there
    package = stub / "megatron_align"
    package.mkdir(parents=True)
    (stub / "examples").symlink_to(ROOT / "examples")
    (package / "__init__.py").write_text("")
    (package / "train.py").write_text(
        "import os, pathlib, signal, sys, time\n"
        f"run, started = pathlib.Path({str(run)!r}), pathlib.Path({str(started)!r})\n"
        "def stop(*_):\n"
        "    (run / f\"told_{os.environ['RANK']}\").touch()\n"
        "    (run / 'requeue').touch()\n"
        "    sys.exit(85)\n"
        "signal.signal(signal.SIGUSR1, stop)\n"
        "pathlib.Path(f\"{started}_{os.environ['RANK']}\").touch()\n"
        "time.sleep(300)\n"
    )
    config = tmp_path / "run.yaml"
    config.write_text("")
    job = subprocess.Popen(
        ["bash", LAUNCH / "slurm.sbatch", config, run],
        env={**slurm, "PYTHONPATH": str(stub), "SLURM_SUBMIT_DIR": str(stub)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 200
        while not all(Path(f"{started}_{rank}").exists() for rank in (0, 1)):
            assert time.monotonic() < deadline
            assert job.poll() is None, job.stdout.read()
            time.sleep(0.2)
        job.send_signal(signal.SIGUSR1)
        said, _ = job.communicate(timeout=120)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode == 0, said
    assert {path.name for path in run.iterdir()} >= {"told_0", "told_1", "requeue"}
    assert (tmp_path / "requeued").read_text().split() == [slurm["SLURM_JOB_ID"]]
