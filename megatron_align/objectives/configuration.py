"""A run's configuration with the options of its objective: what commands and programs call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron_align.config import run
from megatron_align.config.inputs import ReferenceConfig
from megatron_align.config.run import ObjectiveNames, RunConfig
from megatron_align.errors import require
from megatron_align.objectives.options import ObjectiveOptions
from megatron_align.objectives.registry import OBJECTIVES, build_objective, objective_class


def parse(arguments: Sequence[str]) -> RunConfig:
    """Build a RunConfig from ``--config FILE`` and ``--section.key value`` arguments (later ones win).

    ``--dry_run`` is ignored here: the training command reads it.

    Raises:
        InputError: naming the key and, for a misspelt one, the nearest key that exists.
        SystemExit: after ``--help`` or ``--print_config`` has printed.
    """
    return _checked(run.parse(arguments, _OBJECTIVES))


def load_config(
    config: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | Sequence[str] = ()
) -> RunConfig:
    """Build a RunConfig from a YAML file or a mapping of sections, checked as the command line is.

    Args:
        config: path of a YAML file, or ``{"model": {"path": ...}, "data": {...}, ...}``.
        overrides: ``{"optimizer.lr": 2e-5}`` or ``["optimizer.lr=2e-5"]``; they win over ``config``.

    Raises:
        InputError: naming the key and, for a misspelt one, the nearest key that exists.
    """
    return _checked(run.load(config, overrides, _OBJECTIVES))


def _options_class(name: str) -> type[ObjectiveOptions]:
    return objective_class(name).Options


def _owners(option: str) -> list[str]:
    return [
        name for name, kind in OBJECTIVES.items() if option in (field.name for field in fields(kind.Options))
    ]


_OBJECTIVES = ObjectiveNames(_options_class, _owners)


def _checked(config: RunConfig) -> RunConfig:
    """Check what needs the objective itself."""
    compares = build_objective(config.objective).compares
    require(
        compares or config.reference in (ReferenceConfig(), ReferenceConfig(mode="none")),
        f"objective {config.objective.name} compares with no reference: the options reference.* do not apply",
    )
    return config
