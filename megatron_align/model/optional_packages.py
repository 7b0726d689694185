"""Optional packages, each enabled by a switch: whether they load, their version, and what the chip allows.

Every refusal is one line that names the option, what was found, and what to do.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from types import ModuleType

import torch

from megatron_align.errors import InputError, require


def capability() -> tuple[int, int] | None:
    """Return the compute capability of this process's GPU; None: it sees none."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def require_gpu(option: str) -> tuple[int, int]:
    """Return the compute capability of this process's GPU.

    Raises:
        InputError: there is none.
    """
    found = capability()
    if found is None:
        raise InputError(f"{option} needs a CUDA GPU, this process sees none; leave it out to run on a CPU")
    return found


def chip_name(found: tuple[int, int]) -> str:
    """Return a compute capability as compilers name it: ``sm_90``."""
    return f"sm_{found[0]}{found[1]}"


def import_or_reason(module: str) -> ModuleType | str:
    """Return a module, or why it cannot be imported: absent, or built for another torch or CUDA."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:  # OSError: a shared library that does not load
        return "not installed" if isinstance(error, ModuleNotFoundError) else f"it does not load ({error})"


def version_of(module: ModuleType, distribution: str) -> str:
    """Return the version that a module or its distribution states; ``0``: neither does."""
    stated = getattr(module, "__version__", None)
    if stated is not None:
        return str(stated)
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "0"


def at_least(version: str, least: str) -> bool:
    """Return whether a version is ``least`` or newer, by the numbers that it begins with."""

    def numbers(text: str) -> list[int]:
        found = re.match(r"\d+(\.\d+)*", text)
        return [int(part) for part in found[0].split(".")] if found else [0]

    return numbers(version) >= numbers(least)


def require_version(option: str, package: str, version: str, least: str) -> None:
    """Check the version of an installed package.

    Raises:
        InputError: it is older than ``least``.
    """
    require(at_least(version, least), f"{option} needs {package} {least} or newer, {version} is installed")
