"""Run the steps of the check in order, each in a process of its own with a time limit.

A step that fails or exceeds its limit is a row of the results, and the next one runs. Exit code: 0 all gates passed;
1 a gate failed, or did not get to its end; 2 the machine lacks a package, or bad arguments. This process needs the
standard library only: packages that the machine lacks are installed from a folder of wheels into a temporary one.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.gpu_check import packages
from benchmarks.gpu_check.results import Results

ABOUT = """Check this project on one GPU, in under 9 minutes: kernels against float64, losses against the CPU, memory
against the plan, attention and log-probs against their peers, training speed, the longest kernels. Without a GPU it
runs everything at tiny sizes on the CPU. Results: results.jsonl, report.txt, log.txt."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step of the check.

    Args:
        name: of the step.
        about: what it does, for the report.
        command: arguments of this interpreter.
        seconds: time limit.
        gate: whether the exit code depends on it.
    """

    name: str
    about: str
    command: tuple[str, ...]
    seconds: float
    gate: bool = False


def _module(name: str) -> tuple[str, ...]:
    return ("-m", f"benchmarks.gpu_check.{name}")


# Their sum is the longest that a complete run can take; see TOTAL.
STEPS = (
    Step(name="gates", about="kernels against float64", command=_module("gates"), seconds=140, gate=True),
    Step(
        name="losses",
        about="20 steps of SFT and DPO of a 0.5B model against the CPU in fp32",
        command=_module("losses"),
        seconds=150,
        gate=True,
    ),
    Step(
        name="memory",
        about="peak memory against the plan",
        command=(*_module("speed"), "memory"),
        seconds=40,
        gate=True,
    ),
    Step(
        name="attention",
        about="attention against its peers",
        command=(*_module("ops"), "attention"),
        seconds=60,
    ),
    Step(
        name="logprobs",
        about="log-prob engine against its peers",
        command=(*_module("ops"), "logprobs"),
        seconds=40,
    ),
    Step(
        name="mfu",
        about="training of a 1.5B model and of a 7B model cut to six layers",
        command=(*_module("speed"), "mfu"),
        seconds=60,
    ),
    Step(
        name="profile",
        about="the five kernels that a step spends most time in",
        command=(*_module("speed"), "profile"),
        seconds=30,
    ),
)
TOTAL = 530.0  # seconds, the machine's own start not counted
PATIENCE_ON_CPU = 600.0  # a CPU runs tiny sizes, and may be busy

_MACHINE = """
import json, platform, torch, triton, transformers, megatron.core, jsonargparse, pytest, hypothesis
gpu = torch.cuda.is_available()
print(json.dumps({"gpu": torch.cuda.get_device_name() if gpu else None, "python": platform.python_version(),
    "torch": torch.__version__, "triton": triton.__version__, "transformers": transformers.__version__,
    "megatron_core": megatron.core.__version__}))
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check; return the exit code."""
    parser = argparse.ArgumentParser(prog="gpu-check", description=ABOUT)
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        default=Path(os.environ.get("OUT", "runs/gpu_check")),
        help="folder of the results",
    )
    add("--wheels", type=Path, default=packages.FOLDER, help="wheels of packages that may be missing here")
    add("--tiny", action="store_true", help="tiny sizes, as on a machine without a GPU")
    add("--only", nargs="+", choices=[step.name for step in STEPS], help="some of the steps")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the step that runs, too
    options.out.mkdir(parents=True, exist_ok=True)
    results = Results(options.out)
    for old in (results.rows_file, results.text_file, results.log_file):
        old.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as scratch:
        path = _path(Path(scratch), options.wheels)
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
        machine = _machine(environment)
        if machine is None:
            return 2
        results.row("machine", "machine", **machine)
        tiny = options.tiny or machine["gpu"] is None
        steps = [step for step in STEPS if options.only is None or step.name in options.only]
        shared = ["--out", str(options.out.resolve()), "--scratch", scratch, *(["--tiny"] if tiny else [])]
        if machine["gpu"] is None:
            steps = [replace(step, seconds=PATIENCE_ON_CPU) for step in steps]
        steps = [replace(step, command=(*step.command, *shared)) for step in steps]
        total = TOTAL if machine["gpu"] else len(steps) * PATIENCE_ON_CPU
        return run(steps, results, environment, total)


def _path(scratch: Path, wheels: Path) -> str:
    """Return the PYTHONPATH of the steps: this checkout, and what was missing from the interpreter."""
    path = [str(packages.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = packages.missing(wheels)
    if found:
        site = scratch / "site"
        packages.install(found, site)
        path.append(str(site))
    return os.pathsep.join(path)


def _machine(environment: dict[str, str]) -> dict[str, str | None] | None:
    """Return GPU and versions; None: a package is missing, which is printed."""
    done = subprocess.run(
        [sys.executable, "-c", _MACHINE],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_ON_CPU,
    )
    if done.returncode:
        reason = (done.stderr.strip() or "it ended without a word").splitlines()[-1]
        print(
            f"error: this machine lacks a package: {reason}; collect wheels with 'make gpu-wheels' where there is a "
            f"network, and bring {packages.FOLDER.name}/ along",
            file=sys.stderr,
        )
        return None
    return json.loads(done.stdout.splitlines()[-1])


def run(steps: Sequence[Step], results: Results, environment: dict[str, str], total: float) -> int:
    """Run steps in order, as long as there is time; return the exit code.

    Args:
        steps: with their complete commands.
        results: the rows of the steps go there, and one for the end of each.
        environment: of the steps' processes.
        total: seconds for all of them.
    """
    ends = time.monotonic() + total
    failed = []
    for step in steps:
        limit = min(step.seconds, ends - time.monotonic())
        results.say(f"{step.name}: {step.about}")
        with results.printing_what_others_write():
            outcome = {"status": "no time left"}
            if limit >= 1:
                outcome = _run_one(step, results, environment, limit)
        gates = [row["passed"] for row in results.rows(step.name) if "passed" in row]
        if step.gate:
            outcome["passed"] = outcome["status"] == "done" and bool(gates) and all(gates)
            failed += [] if outcome["passed"] else [step.name]
        results.row(step.name, "end", **outcome)
    results.say(f"gates that failed: {', '.join(failed)}" if failed else "all gates passed")
    return 1 if failed else 0


def _run_one(step: Step, results: Results, environment: dict[str, str], limit: float) -> dict[str, object]:
    """Run a step in a process group of its own; return how it ended."""
    began = time.monotonic()
    with open(results.log_file, "ab") as log:
        log.write(f"==== {step.name}\n".encode())
        log.flush()
        start = log.tell()
        process = subprocess.Popen(
            [sys.executable, *step.command],
            env=environment,
            cwd=packages.ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    seconds = round(time.monotonic() - began, 1)
    if code is None:
        return {"status": "exceeded its limit", "limit": round(limit, 1), "seconds": seconds}
    if code:
        return {
            "status": "failed",
            "exit_code": code,
            "seconds": seconds,
            "reason": _last_line(results, start),
        }
    return {"status": "done", "seconds": seconds}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a step's process and those that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        process.wait()


def _last_line(results: Results, start: int) -> str:
    text = results.log_file.read_bytes()[start:].decode(errors="replace").strip()
    return text.splitlines()[-1][:400] if text else "it ended without a word"


if __name__ == "__main__":
    sys.exit(main())
