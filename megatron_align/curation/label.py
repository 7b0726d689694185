"""Add columns of quality and category to data, chunk by chunk; a killed run continues."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_align.curation.asking import Asker
from megatron_align.curation.chat_models import ChatModel, ChatOptions, open_chat
from megatron_align.curation.open_scorers import open_labels, open_quality
from megatron_align.curation.raw_prompts import RawPrompt
from megatron_align.curation.records import BadRecords, TextOf, chunks, read_records
from megatron_align.curation.scorers import Scorer
from megatron_align.data.formats.files import expand
from megatron_align.data.store import sha256
from megatron_align.errors import require
from megatron_align.rollout.endpoint import FailureBudget
from megatron_align.rollout.kept_replies import KeptReplies
from megatron_align.storage.atomic_write import require_writable
from megatron_align.storage.resumable_lines import ResumableLines

CHUNK = 256  # records between two writes
QUALITY, CATEGORY = "quality", "category"  # columns


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelOptions:
    """Data and scorers.

    Args:
        data: file, folder or glob pattern
        out: JSONL file to write
        quality: FILE.py:FUNCTION, a reward model, URL#NAME or a language model; None: no column quality
        labels: FILE.py:FUNCTION, a classifier, URL#NAME or a language model; None: no column category
        categories: among which a model that replies chooses
        of: which text of a record is judged
        skip_bad: leave malformed records out and count them
        tries: replies that are requested until one can be read
        failures: requests that may fail after all their tries
        chat: how models are reached
    """

    data: str
    out: str
    quality: str | None = None
    labels: str | None = None
    categories: tuple[str, ...] = ()
    of: TextOf = "prompt"
    skip_bad: bool = False
    tries: int = 3
    failures: int = 10
    chat: ChatOptions = field(default_factory=ChatOptions)

    def __post_init__(self) -> None:
        require(
            self.quality is not None or self.labels is not None,
            "data label writes the columns of quality or labels, got neither",
        )
        require(self.tries >= 1, f"tries must be at least 1, got {self.tries}")
        require(self.failures >= 0, f"failures must not be negative, got {self.failures}")


@dataclass(slots=True)
class LabelCounts:
    """Records, and what they were given."""

    records: int = 0
    bad: int = 0
    unscored: int = 0
    categories: Counter[str] = field(default_factory=Counter)  # "" : none could be given


def label(options: LabelOptions) -> LabelCounts:
    """Write the records with the columns ``quality`` and ``category``, null where there is no value.

    Replies and values are kept in a hidden folder next to the output until it is complete.

    Raises:
        InputError: bad data, models or output; or an endpoint fails too often.
    """
    out = Path(options.out)
    require_writable(out)
    require(not out.exists(), f"the output must be a new file, found one: delete it, or name another: {out}")
    replies = out.with_name(f".{out.name}.replies")
    key: dict[str, Any] = {"data": [sha256(file) for file in expand(options.data)], "of": options.of}
    key |= {"skip_bad": options.skip_bad}
    key |= {"quality": options.quality, "labels": options.labels, "categories": list(options.categories)}
    counts = LabelCounts()
    with ExitStack() as opened:
        scorers = _scorers(options, replies, opened)
        replies.mkdir(parents=True, exist_ok=True)
        output = opened.enter_context(ResumableLines(out, key))
        bad = BadRecords(options.skip_bad)
        for chunk in chunks(read_records(options.data, bad, options.of), CHUNK):
            rows = [dict(record.raw) for record in chunk]
            prompts = [RawPrompt(text=r.text, raw=r.raw, where=r.where) for r in chunk]
            for column, scorer in scorers.items():
                for row, value in zip(rows, scorer.values(prompts), strict=True):
                    row[column] = value
            lines = []
            for row in rows:
                _count(row, scorers, counts)
                if counts.records > output.done:  # the others were written before a kill
                    lines.append(json.dumps(row, ensure_ascii=False))
            output.append(lines)
        counts.bad = bad.count
        output.finish()
    for file in replies.iterdir():
        file.unlink()
    replies.rmdir()
    return counts


def _scorers(
    options: LabelOptions, replies: Path, opened: ExitStack
) -> dict[str, Scorer[float] | Scorer[str]]:
    models: dict[str, ChatModel] = {}
    budget = FailureBudget(options.failures)

    def open_asker(model: str, option: str, name: str) -> Asker:
        if model not in models:
            models[model] = open_chat(model, option, options.chat)
        asker = Asker(models[model], KeptReplies(replies / f"{name}.jsonl"), budget)
        opened.callback(asker.close)
        return asker

    scorers: dict[str, Scorer[float] | Scorer[str]] = {}
    if options.quality is not None:
        scorers[QUALITY] = open_quality(options.quality, open_asker, replies, options.tries)
    if options.labels is not None:
        scorers[CATEGORY] = open_labels(
            options.labels, open_asker, replies, options.tries, options.categories
        )
    for scorer in scorers.values():
        opened.callback(scorer.close)
    return scorers


def _count(row: Mapping[str, object], columns: Mapping[str, object], counts: LabelCounts) -> None:
    counts.records += 1
    counts.unscored += QUALITY in columns and row[QUALITY] is None
    if CATEGORY in columns:
        counts.categories[str(row[CATEGORY] or "")] += 1
