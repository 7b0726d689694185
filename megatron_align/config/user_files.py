"""Import Python files that users name in a configuration: ``FILE.py:NAME``."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from megatron_align.config.paths import expand_home
from megatron_align.errors import InputError, one_line, require


def find_user_file(name: str, option: str, kind: str) -> tuple[Path, str]:
    """Return the file and the name of ``FILE.py:NAME``; a relative path is relative to the working directory.

    Args:
        name: as configured.
        option: that has it, for errors.
        kind: what NAME is, for errors.

    Raises:
        InputError: there is no such file.
    """
    path, _, attribute = name.rpartition(":")
    file = Path(expand_home(path))
    require(
        path.endswith(".py") and file.is_file(),
        f"{option}: FILE.py:{kind} needs a Python file, found none at '{path}' in {Path.cwd()}",
    )
    return file.resolve(), attribute


@lru_cache
def import_user_file(file: Path, option: str) -> ModuleType:
    """Import a file under a name of its own, once, in ``sys.modules`` as dataclasses and pickle need it.

    Raises:
        InputError: it raises when it is imported.
    """
    name = f"megatron_align_user_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise InputError(f"{option}: {file} cannot be imported as a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a user's file may raise anything
        del sys.modules[name]
        raise InputError(
            f"{option}: {file} raised {type(error).__name__} when imported: {one_line(error)}"
        ) from error
    return module
