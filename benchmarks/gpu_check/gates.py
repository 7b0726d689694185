"""The kernels' tests on this GPU, bf16 and fp16 included: errors against float64; one row per file, one per failure.

On a CPU one file's shortest cases run, in Triton's interpreter.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

from benchmarks.gpu_check.step import context

FILES = ("test_attention_kernels.py", "test_slab_kernels.py", "test_attention_tiles.py", "test_fused.py")
TINY = ["tests/ops/test_attention_kernels.py", "-k", "matches_float64 and short and float32"]


def main() -> int:
    """Run the tests and write their outcomes; the exit code is pytest's."""
    ours = context()
    report = ours.scratch / "gates.xml"
    tests = TINY if ours.tiny else [f"tests/ops/{name}" for name in FILES]
    # Compiling takes most of the time, and is done on the CPU.
    parallel = ["-n", "8"] if importlib.util.find_spec("xdist") and not ours.tiny else []
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *tests, "-m", "triton and not slow", "-p", "no:cacheprovider"]
        + [f"--junitxml={report}", *parallel],
        check=False,
    )
    if not report.exists():
        return done.returncode or 1
    outcomes, failures = read_report(report)
    for file, count in sorted(outcomes.items()):
        passed = count["ok"] > 0 and not count["failed"]
        ours.results.row("gates", "kernels", passed=passed, file=file, **count)
    for test, reason in failures:
        ours.results.row("gates", "failure", test=test, reason=reason)
    return done.returncode


def read_report(report: Path) -> tuple[dict[str, Counter[str]], list[tuple[str, str]]]:
    """Return the number of passed, failed and skipped tests by file, and each failure with its first line."""
    outcomes: dict[str, Counter[str]] = {}
    failures = []
    for case in ElementTree.parse(report).iter("testcase"):
        file = case.attrib["classname"].split(".")[2]
        bad = [child for child in case if child.tag in ("failure", "error")]
        skipped = case.find("skipped") is not None
        outcome = "failed" if bad else "skipped" if skipped else "ok"
        outcomes.setdefault(file, Counter(ok=0, failed=0, skipped=0))[outcome] += 1
        failures += [(case.attrib["name"], _reason(child)) for child in bad]
    return outcomes, failures


def _reason(failure: ElementTree.Element) -> str:
    lines = (failure.attrib.get("message") or failure.text or "").strip().splitlines()
    return lines[0][:300] if lines else ""


if __name__ == "__main__":
    sys.exit(main())
