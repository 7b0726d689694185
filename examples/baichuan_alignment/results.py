"""What each stage gained, from ``metrics.jsonl`` and ``results.json`` alone.

A difference of two accuracies counts as a gain or a loss if it is more than 1.96 of its standard errors, the two taken
as independent.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from examples.baichuan_alignment.plan import MERGED, METHODS
from examples.baichuan_alignment.questions import FIELDS, GROUPS
from megatron_align.errors import InputError, require

Verdict = Literal["gain", "loss", "no clear change"]
METRIC = {"preferences": "accuracy"}  # of other evaluations: exact_match
CLEAR = tuple(field for field in FIELDS if field != "open")  # whose prompts say what is right
_Z = 1.96


@dataclass(frozen=True, slots=True)
class Score:
    """The share of right answers (or pairs) among the held-out ones of a field."""

    share: float
    n: int

    def compared(self, before: Score) -> Verdict:
        """Return whether the difference to an earlier score is more than chance would give."""
        difference = self.share - before.share
        variance = sum(one.share * (1 - one.share) / one.n for one in (self, before))
        if abs(difference) <= _Z * math.sqrt(variance):
            return "no clear change"
        return "gain" if difference > 0 else "loss"


Scores = Mapping[str, Score]  # by field


@dataclass(frozen=True, slots=True)
class Model:
    """A row of the table: a model's scores, and those of the model that its stage started from.

    Args:
        name: of the model.
        scores: by field.
        before: name of the row that it is compared with; empty: nothing.
        fields: that the stage is meant to improve.
        what: kind of the scores: answers, complements, preferences.
    """

    name: str
    scores: Scores
    before: str = ""
    fields: tuple[str, ...] = CLEAR
    what: str = "answers"


def read_scores(folder: Path, kind: str = "answers") -> Scores:
    """Read the ``results.json`` of an evaluation.

    Raises:
        InputError: it is missing or lacks a field; names the file.
    """
    file = folder / "results.json"
    require(file.is_file(), f"the page needs {file}: run the recipe until it is complete")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["tasks"]
        metric = METRIC.get(kind, "exact_match")
        return {field: Score(float(found[field][metric]), int(found[field]["n"])) for field in FIELDS}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{file} must have the tasks {', '.join(FIELDS)} of an evaluation; got {error!r}"
        ) from error


def read_models(out: Path) -> list[Model]:
    """Return the rows of the table, in the order of the recipe."""

    def of(folder: str, kind: str = "answers") -> Scores:
        return read_scores(out / "evaluations" / folder, kind)

    best = {
        field: max((of(f"sft_{group}")[field] for group in GROUPS), key=lambda s: s.share) for field in FIELDS
    }
    mean = {
        field: Score(sum(of(f"sft_{group}")[field].share for group in GROUPS) / len(GROUPS), best[field].n)
        for field in FIELDS
    }
    half = {field: Score(0.5, score.n) for field, score in of("reward_preferences", "preferences").items()}
    return [
        Model("pas", of("pas"), what="complements"),
        Model("base", of("base")),
        *(
            Model(f"sft_{group}", of(f"sft_{group}"), "base", tuple(f for f in fields if f in CLEAR))
            for group, fields in GROUPS.items()
        ),
        Model("mean of the three", mean),
        Model("best of the three", best),
        *(Model(f"merge_{method}", of(f"merge_{method}"), "mean of the three") for method in METHODS),
        Model("grpo", of("grpo"), MERGED),
        Model("grpo with pas", of("grpo_augmented"), "grpo", ("open",)),
        Model("chance", half, what="preferences"),
        Model(f"{MERGED} likelihood", of(f"{MERGED}_preferences", "preferences"), what="preferences"),
        Model("reward", of("reward_preferences", "preferences"), "chance", FIELDS, "preferences"),
    ]


def verdicts(models: Sequence[Model]) -> list[tuple[Model, dict[str, Verdict]]]:
    """Return of each row that is compared with another what each field gained."""
    by_name = {model.name: model for model in models}
    return [
        (
            model,
            {field: model.scores[field].compared(by_name[model.before].scores[field]) for field in FIELDS},
        )
        for model in models
        if model.before
    ]


def not_improved(models: Sequence[Model]) -> list[str]:
    """Return a sentence for each stage and field that did not gain what it should, or lost."""
    by_name = {model.name: model for model in models}
    lines = []
    for model, found in verdicts(models):
        for field, verdict in found.items():
            after, before = model.scores[field], by_name[model.before].scores[field]
            changed = f"{before.share:.1%} -> {after.share:.1%} of {after.n}"
            if verdict == "loss":
                lines.append(f"{model.name} lost {field} against {model.before}: {changed}")
            elif verdict == "no clear change" and field in model.fields:
                full = ", at the top already" if min(after.share, before.share) > 0.97 else ""
                lines.append(
                    f"{model.name} did not clearly improve {field} over {model.before}: {changed}{full}"
                )
    return lines
