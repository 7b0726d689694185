"""Select the raw prompts that get complements: usable, short enough, distinct, good, of a category with examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_align.augmentation.pairs import LabelledPrompt, Log
from megatron_align.augmentation.texts import Example
from megatron_align.curation.duplicates import Duplicates
from megatron_align.curation.raw_prompts import RawPrompt, Unusable, read_raw_prompts
from megatron_align.curation.records import chunks
from megatron_align.curation.scorers import Scorer
from megatron_align.evaluation.progress import progress

CHUNK = 256  # prompts that are scored between two signs of progress
# Why prompts are dropped, in the order of the steps.
STEPS = {
    "malformed": "records that are no prompt",
    "empty": "empty prompts",
    "too_long": "longer than the context",
    "equal": "equal to an earlier prompt",
    "near_duplicate": "near duplicates of an earlier prompt",
    "unscored": "without a quality score",
    "low_quality": "below the least quality",
    "unlabelled": "without a category",
    "without_examples": "of a category without examples",
}
Selected = tuple[LabelledPrompt, Sequence[Example]]


@dataclass(slots=True)
class SelectionCounts:
    """Records that were read, and prompts that were dropped, by step."""

    records: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    without_examples: Counter[str] = field(default_factory=Counter)  # prompts by category

    def to_dict(self) -> dict[str, Any]:
        """Return the counts for JSON."""
        return {
            "records": self.records,
            "dropped": {name: self.dropped[name] for name in STEPS},
            "without_examples": dict(sorted(self.without_examples.items())),
        }


class Selection:
    """The steps, each of which counts and logs what it drops.

    Args:
        counts: are added to.
        log: called with a row for each record that is dropped.
    """

    def __init__(self, counts: SelectionCounts, log: Log) -> None:
        self._counts, self._log = counts, log

    def distinct(
        self,
        path: str,
        near: Duplicates | None,
        excess: Callable[[RawPrompt], str | None],
    ) -> list[RawPrompt]:
        """Return the usable prompts of a file that duplicate no earlier one.

        Args:
            path: file, folder or glob pattern.
            near: finds near duplicates; None: only equal prompts are dropped.
            excess: returns by how much a prompt is too long; None: it is not.
        """
        kept: list[RawPrompt] = []
        for chunk in chunks(self._different(path, excess), CHUNK):
            others = [None] * len(chunk) if near is None else near.of(chunk)
            for prompt, other in zip(chunk, others, strict=True):
                if other is None:
                    kept.append(prompt)
                else:
                    self._drop("near_duplicate", prompt.where, prompt.text, f"of {other}")
        return kept

    def _different(self, path: str, excess: Callable[[RawPrompt], str | None]) -> Iterator[RawPrompt]:
        """Yield the usable prompts of a file that equal no earlier one."""
        places: dict[str, str] = {}
        for found in read_raw_prompts(path):
            self._counts.records += 1
            if isinstance(found, Unusable):
                self._drop(found.reason, found.where, None, found.line)
            elif line := excess(found):
                self._drop("too_long", found.where, found.text, line)
            elif (plain := found.text.strip()) in places:
                self._drop("equal", found.where, found.text, f"equal to {places[plain]}")
            else:
                places[plain] = found.where
                yield found

    def good(
        self, prompts: Sequence[RawPrompt], quality: Scorer[float] | None, least: float | None
    ) -> list[tuple[RawPrompt, float | None]]:
        """Return the prompts whose quality is at least this, with their quality.

        Args:
            prompts: distinct.
            quality: scores them; None: they are not scored.
            least: None: all that have a score are kept.
        """
        if quality is None:
            return [(prompt, None) for prompt in prompts]
        kept: list[tuple[RawPrompt, float | None]] = []
        for prompt, value in _scored(prompts, quality, "scoring"):
            if value is None:
                self._drop("unscored", prompt.where, prompt.text, "no score")
            elif least is not None and value < least:
                self._drop("low_quality", prompt.where, prompt.text, f"quality {value:g}")
            else:
                kept.append((prompt, value))
        return kept

    def labelled(
        self,
        prompts: Sequence[tuple[RawPrompt, float | None]],
        labels: Scorer[str],
        examples: Mapping[str | None, Sequence[Example]],
        *,
        required: bool,
    ) -> list[Selected]:
        """Return the prompts that have a category with examples, with these.

        Args:
            prompts: with their quality.
            labels: gives categories.
            examples: by category; those of None serve prompts whose category has none.
            required: a prompt without a category is dropped.
        """
        kept: list[Selected] = []
        values = _scored([prompt for prompt, _ in prompts], labels, "labelling")
        for (prompt, quality), (_, category) in zip(prompts, values, strict=True):
            if category is None and required:
                self._drop("unlabelled", prompt.where, prompt.text, "no category")
                continue
            own = examples.get(category) or examples.get(None)
            if own is None:
                name = "none" if category is None else category
                self._counts.without_examples[name] += 1
                self._drop("without_examples", prompt.where, prompt.text, f"category {name}")
                continue
            kept.append((LabelledPrompt(prompt=prompt, category=category, quality=quality), own))
        return kept

    def _drop(self, step: str, where: str, prompt: str | None, reason: str) -> None:
        self._counts.dropped[step] += 1
        self._log({"where": where, "prompt": prompt, "step": step, "reason": reason})


def _scored(prompts: Sequence[RawPrompt], scorer: Scorer[Any], title: str) -> Iterator[tuple[RawPrompt, Any]]:
    with progress(title, len(prompts)) as advance:
        for start in range(0, len(prompts), CHUNK):
            chunk = prompts[start : start + CHUNK]
            yield from zip(chunk, scorer.values(chunk), strict=True)
            advance(len(chunk), 0)
