"""docs/objectives.md says of every objective and loss type what the code has, and nothing of what no run computes."""

import re
from pathlib import Path

import pytest

from megatron_align.losses.kto_bco import UNPAIRED_LOSSES
from megatron_align.losses.ranked import RANKED_LOSSES
from megatron_align.objectives.documentation import BEGIN, END, updated
from megatron_align.objectives.dpo import DPO_OPTIONS
from megatron_align.objectives.registry import OBJECTIVES

PAGE = (Path(__file__).parents[2] / "docs" / "objectives.md").read_text(encoding="utf-8")


def test_the_table_of_objectives_is_the_code():
    assert updated(PAGE) == PAGE
    between = PAGE.partition(BEGIN)[2].partition(END)[0]
    assert set(re.findall(r"^\| `(\w+)`", between, re.MULTILINE)) - {"objective"} == set(OBJECTIVES)


def first_cells(heading):
    """Return the names in the first column of the tables under a heading."""
    section = PAGE.partition(f"\n## {heading}")[2].partition("\n## ")[0]
    return set(re.findall(r"^\| `([\w-]+)`", section, re.MULTILINE)) - {"loss_type"}


@pytest.mark.parametrize(
    "heading, names",
    [
        ("DPO family", set(DPO_OPTIONS)),
        ("Single responses", set(UNPAIRED_LOSSES)),
        ("Reward model", set(RANKED_LOSSES)),
    ],
)
def test_every_loss_type_has_its_row(heading, names):
    assert first_cells(heading) == names
