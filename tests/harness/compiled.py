"""Compile kernel launches without a GPU and inspect registers, spills, shared memory and tensor-core instructions.

``with compiling_for("sm_90") as built:`` makes every Triton launch inside the block compile for that chip instead of
running; ``built`` lists the kernels. The code under test is called as usual, on CPU tensors, so the
kernels are those that users launch: same types, alignments, constants and options. Outputs are never written.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

# Bytes of shared memory available to one block (CUDA programming guide, technical specifications per capability).
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True, slots=True)
class Loop:
    """Instructions of one iteration of an innermost loop, as the listing has them: all of it, branches included."""

    matrix: int  # on tensor cores
    other: int
    exponentials: int  # MUFU among the others: their unit takes 8 cycles for one


@dataclass(frozen=True, slots=True)
class Built:
    """Figures of one compiled kernel, read from its cubin."""

    name: str
    chip: str
    warps: int
    registers: int  # per thread
    stack: int  # bytes per thread
    spills: int  # instructions that spill registers to local memory or reload them
    shared: int  # bytes per block
    tensor_core: int  # instructions: HMMA (sm_80), HGMMA (sm_90), UTCHMMA (sm_100)
    warpgroup: int  # HGMMA among them: sm_90 needs these for its full rate
    loops: tuple[Loop, ...] = ()  # the innermost loops with tensor-core instructions

    def __str__(self) -> str:
        return (
            f"{self.name} on {self.chip}: {self.registers} registers x {self.warps} warps, {self.spills} spills, "
            f"{self.stack} B stack, {self.shared} B shared, {self.tensor_core} tensor-core instructions"
        )

    def fault(self, *, tensor_core: bool = True, registers: int = 255) -> str | None:
        """Describe what exceeds the chip's limits or ``registers``; None if nothing does.

        Args:
            tensor_core: whether the kernel must use tensor cores.
            registers: maximum registers per thread.
        """
        faults = [
            (self.spills or self.stack, "spills"),
            (self.shared > SHARED_LIMIT[self.chip], f"shared memory over {SHARED_LIMIT[self.chip]}"),
            (self.registers > registers, f"registers over {registers}"),
            (tensor_core and not self.tensor_core, "no tensor cores"),
        ]
        found = ", ".join(text for wrong, text in faults if wrong)
        return f"{found}: {self}" if found else None


@contextmanager
def compiling_for(chip: str) -> Iterator[list[Built]]:
    """Compile launches for ``chip`` (``sm_80``) instead of running them; yield the list of compiled kernels."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter does not compile: run without TRITON_INTERPRET")
    built: list[Built] = []
    held = vars(driver)  # read without asking for an active driver: there is none without a GPU
    run, before = (
        JITFunction.run,
        held["_active"] if "_active" in held else held["active"],
    )  # before Triton 3.4
    target = GPUTarget("cuda", int(chip.removeprefix("sm_")), 32)

    def compile_only(kernel: JITFunction, *args: object, grid: object, warmup: bool, **options: object):
        compiled = run(kernel, *args, grid=grid, warmup=True, **options)
        built.append(_inspect(compiled, chip))
        return compiled

    JITFunction.run = compile_only
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: chip,  # kernels are cached by device
            get_current_stream=lambda device: 0,
            get_current_target=lambda: target,
        )
    )
    try:
        yield built
    finally:
        JITFunction.run = run
        driver.set_active(before)


def _inspect(compiled: object, chip: str) -> Built:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage, code = (
            subprocess.run(
                [_TOOLS / "cuobjdump", flag, cubin.name],
                capture_output=True,
                text=True,
                check=True,
                timeout=60,
            ).stdout
            for flag in ("-res-usage", "-sass")
        )
    sizes = dict(re.findall(r"\b(REG|STACK):(\d+)", usage))
    count = {
        name: len(re.findall(rf"\b{name}", code)) for name in ("STL", "LDL", "HMMA", "HGMMA", "UTC.?MMA")
    }
    return Built(
        name=compiled.name,
        chip=chip,
        warps=compiled.metadata.num_warps,
        registers=int(sizes["REG"]),
        stack=int(sizes["STACK"]),
        spills=count["STL"] + count["LDL"],
        shared=compiled.metadata.shared,
        tensor_core=count["HMMA"] + count["HGMMA"] + count["UTC.?MMA"],
        warpgroup=count["HGMMA"],
        loops=tuple(_matrix_loops(code)),
    )


_MATRIX = re.compile(r"^(HMMA|HGMMA|UTC.?MMA)")
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(?:@!?\w+ )?\s*(\w+)(.*?);", re.MULTILINE)


def _matrix_loops(code: str) -> Iterator[Loop]:
    """Yield the innermost loops of a listing that use tensor cores: from a branch's earlier target to the branch."""
    listing = [(int(at, 16), name, rest) for at, name, rest in _INSTRUCTION.findall(code)]
    branches = [
        (int(target[1], 16), at)
        for at, name, rest in listing
        if name == "BRA" and (target := re.search(r"0x([0-9a-f]+)", rest))
    ]
    backward = [(first, last) for first, last in branches if first < last]
    for first, last in backward:
        if any(first <= a and b <= last for a, b in backward if (a, b) != (first, last)):
            continue
        names = [name for at, name, _ in listing if first <= at <= last]
        matrix = sum(bool(_MATRIX.search(name)) for name in names)
        if matrix:
            yield Loop(matrix, len(names) - matrix, names.count("MUFU"))
