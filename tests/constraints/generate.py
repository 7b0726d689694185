"""Write the constraints of each supported Python, and of the image: ``make constraints``.

The versions chosen here are what the laws are tested against: the judges' versions are part of the claim. Everything
else is what `uv` (from the package registry) resolves for ``setup.py`` with the extras ``test`` and ``dev``, on Linux.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TORCH, TRITON_OF_TORCH = (
    "2.13.0",
    "3.7.1",
)  # a CUDA build of torch requires exactly this Triton; a CPU build brings none
NUMPY = "<2.4"  # what Triton 3.6's interpreter needs
# The newest that each Python has; of megatron-core 3.11 has the newest that CI's CPU build of torch can run with.
CHOSEN = {
    "3.10": {"megatron-core": "0.16.1", "transformers": "5.20.2", "trl": "1.14.2"},
    "3.11": {"megatron-core": "0.16.1", "transformers": "5.23.0", "trl": "1.16.0"},
    "3.12": {"megatron-core": "0.19.2", "transformers": "5.23.0", "trl": "1.16.0"},
    "3.13": {"megatron-core": "0.19.2", "transformers": "5.23.0", "trl": "1.16.0"},
}
IMAGE_PYTHON = "3.12"
# Installed with torch where it is a CUDA build, in the versions that torch itself requires.
TORCHS_OWN = re.compile(r"(nvidia|cuda)-|triton==")


def resolve(python: str) -> list[str]:
    """Return the pinned requirements of everything that is installed for the tests under this Python."""
    chosen = [f"{name}=={version}" for name, version in CHOSEN[python].items()]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write("\n".join([f"torch=={TORCH}", f"numpy{NUMPY}", *chosen]))
        constraints.flush()
        command = [sys.executable, "-m", "uv", "pip", "compile", "setup.py", "--extra", "test", "--extra", "dev",
                   "--python-version", python, "--python-platform", "x86_64-manylinux_2_28", "--quiet",
                   "--no-header", "--no-annotate", "--no-emit-package", "pip", "-c", constraints.name]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return [line for line in done.stdout.splitlines() if "==" in line]


def main() -> None:
    """Write ``tests/constraints/python3.X.txt`` and ``docker/constraints.txt``."""
    by = "# Written by `make constraints` (tests/constraints/generate.py). "
    for python in CHOSEN:
        pins = resolve(python)
        own = [line for line in pins if not TORCHS_OWN.match(line)]
        head = by + "Triton and CUDA's libraries are torch's choice.\n"
        file = ROOT / "tests" / "constraints" / f"python{python}.txt"
        file.write_text(head + "\n".join(own) + "\n", encoding="utf-8")
        if python == IMAGE_PYTHON:
            head = (
                by
                + f"The exact versions of the image: tests/constraints/python{python}.txt, and torch's Triton.\n"
            )
            triton = f"triton=={TRITON_OF_TORCH}"
            if triton not in pins:
                raise SystemExit(
                    f"error: torch {TORCH} must require {triton}: change TRITON_OF_TORCH in {__file__}"
                )
            image = head + "\n".join(sorted([*own, triton], key=str.lower)) + "\n"
            (ROOT / "docker" / "constraints.txt").write_text(image, encoding="utf-8")


if __name__ == "__main__":
    main()
