"""Objectives in a user's own file: ``objective.name: my_objectives.py:MyObjective``."""

from __future__ import annotations

from dataclasses import is_dataclass
from functools import lru_cache
from pathlib import Path

from megatron_align.config.user_files import find_user_file, import_user_file
from megatron_align.errors import InputError, listed, nearest, require
from megatron_align.objectives.base import Objective
from megatron_align.objectives.options import ObjectiveOptions


def load(name: str) -> type[Objective]:
    """Return the class that ``FILE.py:CLASS`` names; a relative path is relative to the working directory.

    Raises:
        InputError: there is no such file or class, it is no objective, or the file raises when it is imported.
    """
    return _load(*find_user_file(name, "objective.name", "CLASS"))


@lru_cache
def _load(file: Path, class_name: str) -> type[Objective]:
    module = import_user_file(file, "objective.name")
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


def _is_own_objective(value: object, module: str) -> bool:
    return isinstance(value, type) and issubclass(value, Objective) and value.__module__ == module
