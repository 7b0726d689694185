"""Options of objectives: their common base, and the checks that several of them share.

An option that an objective or its loss type does not use is an error, never ignored. Formulas: ``losses/`` and
docs/objectives.md; names and defaults are TRL's where TRL has the loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_align.errors import nearest, require, shown


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions:
    """The options of an objective, a subclass for each; the docstring of a field is its help text.

    Args:
        name: built-in objective, or FILE.py:CLASS for one in a file of yours
    """

    name: str


def require_loss_types(loss_types: Sequence[str], available: Mapping[str, object]) -> None:
    """Check that ``loss_type`` names at least one loss, and only available ones."""
    require(len(loss_types) > 0, "objective.loss_type must name at least one loss type, got none")
    for name in loss_types:
        require(
            name in available,
            f"objective.loss_type must be one of {', '.join(available)}; got {shown(name)}{nearest(name, available)}",
        )


def require_used(
    given: Mapping[str, object], loss_types: Sequence[str], options_of: Mapping[str, Sequence[str]]
) -> None:
    """Check that at least one of the loss types uses each option that was given (is not None)."""
    for option, value in given.items():
        users = [name for name, options in options_of.items() if option in options]
        require(
            value is None or any(name in users for name in loss_types),
            f"objective.{option} belongs to loss_type {', '.join(users)}; "
            f"got {value} with loss_type {', '.join(loss_types)}",
        )


def require_positive(**values: float) -> None:
    """Check that each value is positive; NaN is not."""
    for name, value in values.items():
        require(value > 0, f"objective.{name} must be positive, got {value}")


def require_smoothing(value: float | None) -> None:
    """Check a label smoothing; None: the loss's default."""
    require(value is None or 0 <= value < 0.5, f"objective.label_smoothing must be in [0, 0.5), got {value}")
