"""Open the scorers of quality and category that an option names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_align.curation.asking import Asker
from megatron_align.curation.chat_models import Request, is_function, is_url
from megatron_align.curation.raw_prompts import RawPrompt
from megatron_align.curation.requests import label_request, parse_category, parse_score, quality_request
from megatron_align.curation.scorers import (
    Classifier,
    ColumnScorer,
    ComputedScorer,
    RepliedScorer,
    Scorer,
    function_scorer,
    is_classifier,
)
from megatron_align.errors import require
from megatron_align.rollout.kept_replies import KeptReplies

COLUMN = "column:"
CATEGORY = f"{COLUMN}category"  # what labels reads where it names nothing
REPLY_TOKENS = 1024  # room for a model that reasons first
OpenAsker = Callable[[str, str, str], Asker]  # model, option, name of the file of its replies


def open_quality(spec: str, open_asker: OpenAsker, folder: Path, tries: int) -> Scorer[float]:
    """Return the scorer of ``column:NAME``, ``FILE.py:FUNCTION``, a reward model, or a model that replies.

    Args:
        spec: what the option names.
        open_asker: opens a model that replies.
        folder: of kept values.
        tries: replies of a prompt, until one has a score.

    Raises:
        InputError: there is no such file, function or model.
    """
    option, file = "quality", folder / "quality.jsonl"
    if spec.startswith(COLUMN):
        return ColumnScorer(_column(spec, option), float)
    if is_function(spec):
        return function_scorer(spec, float, option, KeptReplies(file))
    if not is_url(spec) and is_classifier(spec):
        model = Classifier(spec, option)
        require(
            len(model.labels) <= 1,
            f"{option}: a reward model has one output, got {len(model.labels)} labels in {spec}",
        )
        return ComputedScorer(model.scores, model.identity, KeptReplies(file), model.close)

    def request(prompt: RawPrompt) -> Request:
        fields = {"prompt": prompt.text}
        content = quality_request(prompt.text)
        return Request(
            task="quality", content=content, fields=fields, max_tokens=REPLY_TOKENS, where=prompt.where
        )

    return RepliedScorer(open_asker(spec, option, "quality"), request, parse_score, tries)


def open_labels(
    spec: str | None, open_asker: OpenAsker, folder: Path, tries: int, categories: Sequence[str]
) -> Scorer[str]:
    """Return the scorer of ``column:NAME``, ``FILE.py:FUNCTION``, a classifier, or a model that replies.

    Args:
        spec: what the option names; None: the column ``category``.
        open_asker: opens a model that replies.
        folder: of kept values.
        tries: replies of a prompt, until one has a category.
        categories: among which a model that replies chooses.

    Raises:
        InputError: there is no such file, function or model, or nothing to choose among.
    """
    option, file = "labels", folder / "labels.jsonl"
    spec = spec or CATEGORY
    if spec.startswith(COLUMN):
        return ColumnScorer(_column(spec, option), str)
    if is_function(spec):
        return function_scorer(spec, str, option, KeptReplies(file))
    if not is_url(spec) and is_classifier(spec):
        model = Classifier(spec, option)
        require(
            len(model.labels) > 1,
            f"{option}: a classifier has at least two labels, got {len(model.labels)} in {spec}",
        )
        return ComputedScorer(model.categories, model.identity, KeptReplies(file), model.close)
    require(
        bool(categories),
        f"{option}: {spec} chooses among the categories of the examples, which have none: add the field category",
    )

    def request(prompt: RawPrompt) -> Request:
        fields = {"prompt": prompt.text, "categories": list(categories)}
        content = label_request(prompt.text, categories)
        return Request(
            task="label", content=content, fields=fields, max_tokens=REPLY_TOKENS, where=prompt.where
        )

    return RepliedScorer(
        open_asker(spec, option, "labels"), request, lambda reply: parse_category(reply, categories), tries
    )


def _column(spec: str, option: str) -> str:
    name = spec.removeprefix(COLUMN)
    require(bool(name), f"{option}: {COLUMN}NAME needs the name of a field, got '{spec}'")
    return name
