"""Build and load ``cuda_stub.cpp``, before torch is imported: afterwards tensors may claim to be on CUDA."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from megatron_align.errors import InputError, require

SOURCE = Path(__file__).with_name("cuda_stub.cpp")
COMPILERS = ("c++", "g++", "clang++")


def compiler() -> str | None:
    """Return the C++ compiler: that of ``CXX``, or the first that is found; None: there is none."""
    named = os.environ.get("CXX")
    return next((found for name in (named, *COMPILERS) if name and (found := shutil.which(name))), None)


def load() -> None:
    """Make this process accept tensors on CUDA; torch must not be imported yet.

    Raises:
        InputError: torch is a build with CUDA, or there is no C++ compiler, or it fails.
    """
    assert "torch" not in sys.modules, "torch has taken CUDA's hooks"
    libraries = _torch_folder() / "lib"
    require(
        not (libraries / "libtorch_cuda.so").exists(),
        "a rehearsal needs a build of torch without CUDA, this one has it: make an environment with the CPU wheel of "
        "torch, and rehearse there",
    )
    library = ctypes.CDLL(str(_built(libraries)))
    library.install.restype = ctypes.c_bool
    if not library.install():
        raise RuntimeError("torch took CUDA's hooks before the stub was loaded")


def _torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None, "it is a dependency"
    assert spec.origin is not None, "it has files"
    return Path(spec.origin).parent


def _built(libraries: Path) -> Path:
    """Return the compiled stub, from the cache if it was compiled for this torch before (six seconds)."""
    text = SOURCE.read_bytes() + importlib.metadata.version("torch").encode() + str(libraries).encode()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_align"
    target = cache / f"cuda_stub_{hashlib.sha256(text).hexdigest()[:16]}.so"
    if target.exists():
        return target
    program = compiler()
    if program is None:
        raise InputError(
            f"a rehearsal compiles {SOURCE.name} once and needs a C++ compiler, found none of {', '.join(COMPILERS)}: "
            "install one (g++), or name it in CXX"
        )
    cache.mkdir(parents=True, exist_ok=True)
    include = libraries.parent / "include"
    partial = target.with_suffix(f".{os.getpid()}")
    done = subprocess.run(
        [
            *(program, "-std=c++20", "-O0", "-shared", "-fPIC", str(SOURCE), "-o", str(partial)),
            *(f"-I{include}", f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}"),
            *(f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ltorch_cpu", "-lc10"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        partial.unlink(missing_ok=True)
        line = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200].strip())
        raise InputError(f"{program} must compile {SOURCE}, it failed: {line}")
    os.replace(partial, target)
    return target
