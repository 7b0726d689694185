"""The version of this package, which setup.py reads too, and those of the packages that it runs on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

__version__ = "0.1.0"
_RUNS_ON = ("torch", "megatron-core", "transformers", "triton")


def versions() -> str:
    """Return the line that ``--version`` prints; nothing is imported."""

    def of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    packages = ", ".join(f"{package} {of(package)}" for package in _RUNS_ON)
    return f"megatron_align {__version__} (Python {platform.python_version()}, {packages})"
