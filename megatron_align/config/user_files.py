"""Import Python files that users name in a configuration: ``FILE.py:NAME``."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_align.config.paths import expand_home
from megatron_align.errors import InputError, listed, nearest, one_line, require


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


def user_function(name: str, option: str) -> tuple[Path, Callable[..., Any]]:
    """Return the file and the function of ``FILE.py:FUNCTION``.

    Args:
        name: as configured.
        option: that has it, for errors.

    Raises:
        InputError: there is no such file or function, or the file raises when it is imported.
    """
    file, attribute = find_user_file(name, option, "FUNCTION")
    module = import_user_file(file, option)
    function = getattr(module, attribute, None)
    own = [
        key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")
    ]
    if function is None:
        raise InputError(
            f"{option}: no function '{attribute}' in {file}, whose functions are {listed(own) or 'none'}"
            f"{nearest(attribute, own)}"
        )
    require(callable(function), f"{option}: '{attribute}' in {file} must be a function, got a value")
    return file, function


def parameters_of(function: Callable[..., Any], option: str) -> tuple[dict[str, bool], bool]:
    """Return the parameters by name, whether each is required, and whether the function takes all others too.

    Raises:
        InputError: they cannot be read, or one is positional only.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{option}: the parameters of the function cannot be read: {one_line(error)}"
        ) from error
    for parameter in parameters:
        require(
            parameter.kind is not parameter.POSITIONAL_ONLY,
            f"{option}: the function is called by keywords, its parameter '{parameter.name}' takes none",
        )
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = {p.name: p.default is inspect.Parameter.empty for p in parameters if p.kind in by_keyword}
    return named, any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def raised_at(error: BaseException, file: Path) -> str:
    """Return one line about what a user's function raised, with the user's own line of code."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == str(file)]
    frame = (own or frames)[-1]
    return f"raised {type(error).__name__}: {one_line(error, 300)} at {frame.filename}:{frame.lineno}"
