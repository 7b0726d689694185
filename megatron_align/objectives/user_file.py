"""Objectives in a user's own file: ``objective.name: my_objectives.py:MyObjective``."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from dataclasses import is_dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from megatron_align.config.paths import expand_home
from megatron_align.errors import InputError, listed, nearest, one_line, require
from megatron_align.objectives.base import Objective
from megatron_align.objectives.options import ObjectiveOptions


def load(name: str) -> type[Objective]:
    """Return the class that ``FILE.py:CLASS`` names; a relative path is relative to the working directory.

    Raises:
        InputError: there is no such file or class, it is no objective, or the file raises when it is imported.
    """
    path, _, class_name = name.rpartition(":")
    file = Path(expand_home(path))
    require(
        path.endswith(".py") and file.is_file(),
        f"objective.name: FILE.py:CLASS needs a Python file, found none at '{path}' in {Path.cwd()}",
    )
    return _load(file.resolve(), class_name)


@lru_cache
def _load(file: Path, class_name: str) -> type[Objective]:
    module = _module(file)
    objective = getattr(module, class_name, None)
    classes = [name for name, value in vars(module).items() if _is_own_objective(value, module.__name__)]
    if objective is None:
        raise InputError(
            f"objective.name: no class '{class_name}' in {file}, whose objectives are "
            f"{listed(classes) or 'none'}{nearest(class_name, classes)}"
        )
    if not (isinstance(objective, type) and issubclass(objective, Objective)):
        raise InputError(
            f"objective.name: {class_name} in {file} must be a subclass of megatron_align.objectives.base.Objective"
        )
    options = getattr(objective, "Options", None)
    require(
        isinstance(options, type) and issubclass(options, ObjectiveOptions) and is_dataclass(options),
        f"objective.name: {class_name}.Options in {file} must be a dataclass derived from "
        "megatron_align.objectives.options.ObjectiveOptions",
    )
    missing = [attribute for attribute in ("data", "normalization") if not hasattr(objective, attribute)]
    require(not missing, f"objective.name: {class_name} in {file} must set {' and '.join(missing)}")
    return objective


@lru_cache
def _module(file: Path) -> ModuleType:
    """Import a file under a name of its own, once, in ``sys.modules`` as dataclasses and pickle need it."""
    name = f"megatron_align_user_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise InputError(f"objective.name: {file} cannot be imported as a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a user's file may raise anything
        del sys.modules[name]
        reason = one_line(error)
        raise InputError(
            f"objective.name: {file} raised {type(error).__name__} when imported: {reason}"
        ) from error
    return module


def _is_own_objective(value: object, module: str) -> bool:
    return isinstance(value, type) and issubclass(value, Objective) and value.__module__ == module
