"""Packages that a machine without a network lacks: collected as wheels here, installed into a temporary folder there.

``python -m benchmarks.gpu_check.packages`` fills ``.gpu_wheels/`` (ignored by git) for CPython 3.12 on x86-64 Linux and
prints its size. The machine must have torch, Triton, transformers, pytest and hypothesis; names of further packages can
be added to the command. Uses the standard library and pip only, as nothing else may be installed yet.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".gpu_wheels"
CONSTRAINTS = ROOT / "tests" / "constraints" / "python3.12.txt"
LIMIT = 60 * 2**20  # bytes
# What we need and images with PyTorch often lack, with all that each needs: none of them brings torch.
WHEELS = (
    "megatron-core",
    "jsonargparse",
    "docstring-parser",
    "typeshed-client",
    "importlib-resources",
    "rich",
    "markdown-it-py",
    "mdurl",
    "pygments",
    "liger-kernel",
)
_PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17)] + ["manylinux2014_x86_64"]


def pinned(names: Sequence[str], constraints: str) -> list[str]:
    """Return requirements at the versions of a constraints file; a name that is not in it stays as it is."""
    versions = dict(re.findall(r"(?m)^([\w.-]+)==(\S+)", constraints))
    return [f"{name}=={versions[name]}" if name in versions else name for name in names]


def collect(names: Sequence[str], folder: Path) -> int:
    """Download one wheel per name, without what it requires; return the folder's bytes."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
        + ["--python-version", "3.12", "--implementation", "cp", "-d", str(folder)]
        + [part for platform in _PLATFORMS for part in ("--platform", platform)]
        + pinned(names, CONSTRAINTS.read_text(encoding="utf-8")),
        check=True,
    )
    return sum(wheel.stat().st_size for wheel in folder.glob("*.whl"))


def missing(wheels: Path) -> list[Path]:
    """Return the wheels of a folder whose package this interpreter does not have, in any version."""
    have = {_name(d.metadata["Name"]) for d in importlib.metadata.distributions() if d.metadata["Name"]}
    return [wheel for wheel in sorted(wheels.glob("*.whl")) if _name(wheel.name.split("-")[0]) not in have]


def install(wheels: Sequence[Path], site: Path) -> None:
    """Install wheels into a folder, without a network and without what they require."""
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
        + ["--no-cache-dir", "--target", str(site), *map(str, wheels)],
        check=True,
        env={**os.environ, "PIP_CONSTRAINT": ""},
    )


def _name(text: str) -> str:
    return re.sub(r"[-_.]+", "-", text).lower()


def main() -> int:
    """Collect the wheels and print their size; 1: they are too large to carry."""
    parser = argparse.ArgumentParser(prog="gpu_check.packages", description=__doc__)
    parser.add_argument("more", nargs="*", metavar="NAME", help="further packages")
    options = parser.parse_args()
    size = collect([*WHEELS, *options.more], FOLDER)
    print(f"{len(list(FOLDER.glob('*.whl')))} wheels, {size / 2**20:.1f} MiB in {FOLDER.relative_to(ROOT)}")
    if size > LIMIT:
        print(f"error: over {LIMIT / 2**20:.0f} MiB", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
