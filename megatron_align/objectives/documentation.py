"""The table of objectives in docs/objectives.md, from the objectives themselves.

``python -m megatron_align.objectives.documentation docs/objectives.md`` rewrites it between its two marks.
"""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron_align.objectives.base import Objective
from megatron_align.objectives.registry import OBJECTIVES

BEGIN = "<!-- from the objectives: python -m megatron_align.objectives.documentation docs/objectives.md -->"
END = "<!-- end -->"


def row(objective: type[Objective]) -> str:
    """Return the table row of an objective with its default options."""
    options: Any = objective.Options  # a dataclass whose fields all have defaults
    built = objective(options())
    names = ", ".join(f"`{option.name}`" for option in fields(options) if option.name != "name")
    needs = ", ".join(sorted(built.needs)) or "-"
    trains = "reward model" if objective.trains_reward_model else "policy"
    summary = (options.__doc__ or "").strip().partition("\n")[0].rstrip(".")
    return f"| `{options.name}` | {summary} | {trains} | {', '.join(objective.data)} | {needs} | {names} |"


def table() -> str:
    """Return the table, one row for each built-in objective."""
    head = "| `objective.name` | what it is | trains | data | needs before its loss | options |"
    return "\n".join([head, "|---" * 6 + "|", *(row(objective) for objective in OBJECTIVES.values())])


def updated(page: str) -> str:
    """Return the text of a page with the table between the marks as it must be."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(updated(file.read_text(encoding="utf-8")), encoding="utf-8")
