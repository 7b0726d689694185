"""The type checker of `make check` is strict enough: it finds a wrong attribute, a dataclass taken for a list, a None.

The code below is checked with the project's own settings. `make check` has filled the cache, so this takes seconds.
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MISUSE = """
from megatron_align.config import RunConfig
from megatron_align.data.store import TokenStore
from megatron_align.kernels import PackedLayout
from megatron_align.training.resume import ResumePoint
from megatron_align.training.trainer import Trainer

def misspelt(config: RunConfig, layout: PackedLayout) -> None:
    config.optimiser
    layout.token

def dataclass_as_a_list(point: ResumePoint) -> object:
    return point[0]

def wrong_argument(config: RunConfig) -> TokenStore:
    return TokenStore(path=config)

def forgotten_none(point: ResumePoint | None) -> int:
    return point.step

class Hook:
    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def reads(self) -> object:
        return self.trainer.stepper.optimiser

def unannotated(point):
    return point.step
"""
FINDINGS = {
    9: '"RunConfig" has no attribute "optimiser"; maybe "optimizer"?',
    10: '"PackedLayout" has no attribute "token"; maybe "tokens"?',
    13: 'Value of type "ResumePoint" is not indexable',
    16: 'Argument "path" to "TokenStore" has incompatible type "RunConfig"; expected "str | Path"',
    19: 'Item "None" of "ResumePoint | None" has no attribute "step"',
    26: '"Stepper" has no attribute "optimiser"; maybe "optimizer"?',
    28: "Function is missing a type annotation",
}


@pytest.mark.skipif(
    sys.version_info < (3, 11), reason="types are checked on Python 3.11 or newer: see the Makefile"
)
def test_misuse_is_found_line_by_line(tmp_path):
    file = tmp_path / "misuse.py"
    file.write_text(MISUSE)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        ROOT / "pyproject.toml",
        "--no-error-summary",
        file,
    ]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    found = {}
    for line in run.stdout.splitlines():
        place, _, message = line.partition(": error: ")
        found[int(place.rpartition(":")[2])] = message.rpartition("  [")[0]
    assert found == FINDINGS, run.stdout + run.stderr
    assert run.returncode == 1
