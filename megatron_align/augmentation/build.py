"""Build the training data of a prompt-augmenting model (PAS): raw prompts in, chats prompt -> complement out.

Every reply and every value is kept in the output folder by what was requested. A process that is started again, after a
kill or with other thresholds, computes all steps once more from these and requests only what is missing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_align.augmentation.examples import read_examples
from megatron_align.augmentation.pairs import ComplementWriter, LabelledPrompt, WriterCounts, WriterOptions
from megatron_align.augmentation.sample_length import SampleLength
from megatron_align.augmentation.selection import Selected, Selection, SelectionCounts
from megatron_align.augmentation.texts import filled, load_template
from megatron_align.curation.asking import Asker
from megatron_align.curation.chat_models import ChatModel, ChatOptions, open_chat
from megatron_align.curation.duplicates import Duplicates, open_duplicates
from megatron_align.curation.open_scorers import open_labels, open_quality
from megatron_align.curation.raw_prompts import RawPrompt
from megatron_align.curation.scorers import Scorer
from megatron_align.errors import require
from megatron_align.evaluation.progress import progress
from megatron_align.rollout.endpoint import FailureBudget
from megatron_align.rollout.kept_replies import KeptReplies
from megatron_align.storage.atomic_write import require_writable, write_file
from megatron_align.storage.folder_lock import FolderLock

CHUNK = 256  # prompts whose complements are written at a time
DATA, REPORT, REJECTED, REPLIES = "data.jsonl", "report.json", "rejected.jsonl", "replies"
NO_CRITIC = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """Prompts, models and bounds of a build.

    Args:
        prompts: file, folder or glob pattern of raw prompts
        out: folder to write
        examples: file of good pairs {prompt, complement, category}
        generator: URL#NAME, FILE.py:FUNCTION, or a model
        critic: as generator; None: the generator; none: no critique
        quality: column:NAME, FILE.py:FUNCTION, a reward model, URL#NAME or a language model; None: not scored
        min_quality: prompts below it are dropped; None: none are
        labels: column:NAME, FILE.py:FUNCTION, a classifier, URL#NAME or a language model; None: column:category
        duplicates: similarity from which a prompt is a near duplicate of an earlier one; 1: equal prompts only
        embeddings: column:NAME, FILE.py:FUNCTION or a Hugging Face folder, whose cosines are compared; None: the
            Jaccard similarities of shingles are
        tokenizer: model whose tokenizer measures samples; None: they are not measured
        context: longest sample, in tokens of this tokenizer
        template: file of the template that is trained; None: ours
        failures: requests that may fail after all their tries
        writer: how complements are written
        chat: how models are reached
    """

    prompts: str
    out: str
    examples: str
    generator: str
    critic: str | None = None
    quality: str | None = None
    min_quality: float | None = None
    labels: str | None = None
    duplicates: float = 0.7
    embeddings: str | None = None
    tokenizer: str | None = None
    context: int = 4096
    template: str | None = None
    failures: int = 10
    writer: WriterOptions = field(default_factory=WriterOptions)
    chat: ChatOptions = field(default_factory=ChatOptions)

    def __post_init__(self) -> None:
        require(
            self.min_quality is None or self.quality is not None,
            f"min_quality needs quality, which scores the prompts, got {self.min_quality} without",
        )
        require(
            self.embeddings is None or self.duplicates < 1,
            f"duplicates must be below 1 with embeddings, which it compares, got {self.duplicates:g}",
        )
        require(0 < self.duplicates <= 1, f"duplicates must be in (0, 1], got {self.duplicates}")
        require(self.failures >= 0, f"failures must not be negative, got {self.failures}")
        least = {
            "context": (self.context, 1),
            "shots": (self.writer.shots, 1),
            "tries": (self.writer.tries, 1),
        }
        least |= {"max_words": (self.writer.max_words, 1), "max_tokens": (self.writer.max_tokens, 1)}
        require(
            self.tokenizer is None or self.context > self.writer.max_tokens,
            f"context must hold a prompt and a complement of {self.writer.max_tokens} tokens, got {self.context}",
        )
        least |= {"critic_tokens": (self.writer.critic_tokens, 1)}
        least |= {"regenerations": (self.writer.regenerations, 0)}
        for name, (value, lowest) in least.items():
            require(value >= lowest, f"{name} must be at least {lowest}, got {value}")
        require(
            0 <= self.writer.temperature < float("inf"),
            f"temperature must be 0 (greedy) or a positive number, got {self.writer.temperature}",
        )


@dataclass(slots=True)
class BuildCounts:
    """Counts of every step, in order.

    Attributes:
        made, reused: requests of this process, and replies of earlier ones; not in the report, which is the same
            however often the build was interrupted.
    """

    selection: SelectionCounts = field(default_factory=SelectionCounts)
    writer: WriterCounts = field(default_factory=WriterCounts)
    prompts: Counter[str] = field(default_factory=Counter)  # by category, selected
    pairs: Counter[str] = field(default_factory=Counter)  # by category
    made: int = 0
    reused: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the counts for JSON."""
        return {
            **self.selection.to_dict(),
            "prompts": self.prompts.total(),
            **self.writer.to_dict(),
            "pairs": self.pairs.total(),
            "categories": {
                name: {"prompts": count, "pairs": self.pairs[name]}
                for name, count in sorted(self.prompts.items())
            },
        }


def build(options: BuildOptions) -> BuildCounts:
    """Build the data of a prompt-augmenting model; a killed build continues.

    Raises:
        InputError: bad options, prompts or models; an endpoint fails too often; or no pair is left.
    """
    out = Path(options.out)
    require(not out.exists() or out.is_dir(), f"out must be a folder, found a file at {out}")
    require(
        not (out / DATA).exists(), f"out holds data already: delete it, or name another folder: {out / DATA}"
    )
    require_writable(out / DATA)
    with ExitStack() as opened:
        setup = _Build(options, opened)  # checked before anything is written
        (out / REPLIES).mkdir(parents=True, exist_ok=True)
        lock = FolderLock(
            out / ".lock", f"another process is building {out}", "wait until it ends, or name another folder"
        )
        lock.acquire()
        opened.callback(lock.release)
        require(not (out / DATA).exists(), f"another process has finished it: {out / DATA}")
        return setup.run()


class _Build:
    """A checked build; what it opens is closed with ``opened``."""

    def __init__(self, options: BuildOptions, opened: ExitStack) -> None:
        self._options, self._out, self._opened = options, Path(options.out), opened
        self._template = load_template(options.template)
        self._examples = read_examples(options.examples)
        template = options.chat.chat_template
        self._length = SampleLength(options.tokenizer, template) if options.tokenizer else None
        self._near: Duplicates | None = None
        if options.duplicates < 1:
            self._near = open_duplicates(options.embeddings, options.duplicates)
        self._budget, self._askers = FailureBudget(options.failures), list[Asker]()
        self._models: dict[str, ChatModel] = {}
        self._counts = BuildCounts()
        critic = options.critic or options.generator
        self._generator = self._open(options.generator, "generator", "generate")
        self._critic = None if critic == NO_CRITIC else self._open(critic, "critic", "critique")
        replies, tries = self._out / REPLIES, options.writer.tries
        self._quality: Scorer[float] | None = None
        if options.quality is not None:
            self._quality = open_quality(options.quality, self._open, replies, tries)
            opened.callback(self._quality.close)
        categories = [category for category in self._examples if category is not None]
        self._labels: Scorer[str] = open_labels(options.labels, self._open, replies, tries, categories)
        opened.callback(self._labels.close)

    def run(self) -> BuildCounts:
        """Write replies, rejected answers, report and data."""
        counts, options = self._counts, self._options
        with open(self._out / REJECTED, "w", encoding="utf-8") as rejected:

            def log(row: dict[str, Any]) -> None:
                rejected.write(json.dumps(row, ensure_ascii=False) + "\n")
                rejected.flush()

            selection = Selection(counts.selection, log)
            distinct = selection.distinct(options.prompts, self._near, self._excess)
            good = selection.good(distinct, self._quality, options.min_quality)
            selected = selection.labelled(
                good, self._labels, self._examples, required=options.labels is not None
            )
            writer = ComplementWriter(self._generator, self._critic, options.writer, counts.writer, log)
            lines = self._write(selected, writer)
        counts.made = sum(asker.made for asker in self._askers)
        counts.reused = sum(asker.reused for asker in self._askers)
        report = json.dumps(counts.to_dict(), indent=2, ensure_ascii=False)
        write_file(self._out / REPORT, f"{report}\n")
        require(
            bool(lines),
            f"no pair is left of {counts.selection.records} records: {self._out / REPORT} counts what each step "
            f"dropped, {self._out / REJECTED} has the reasons",
        )
        write_file(self._out / DATA, "".join(f"{line}\n" for line in lines))
        return counts

    def _write(self, selected: Sequence[Selected], writer: ComplementWriter) -> list[str]:
        """Return the lines of the data."""
        lines = []
        with progress("writing complements", len(selected)) as advance:
            for start in range(0, len(selected), CHUNK):
                chunk = selected[start : start + CHUNK]
                for (labelled, _), complement in zip(chunk, writer.write(chunk), strict=True):
                    category = labelled.category or "none"
                    self._counts.prompts[category] += 1
                    if complement is not None:
                        self._counts.pairs[category] += 1
                        lines.append(json.dumps(self._row(labelled, complement), ensure_ascii=False))
                advance(len(chunk), 0)
        return lines

    def _row(self, labelled: LabelledPrompt, complement: str) -> dict[str, Any]:
        turns = (("user", filled(self._template, labelled.prompt.text)), ("assistant", complement))
        row: dict[str, Any] = {"messages": [{"role": role, "content": text} for role, text in turns]}
        more = {"category": labelled.category, "quality": labelled.quality, "source": labelled.prompt.where}
        return row | {name: value for name, value in more.items() if value is not None}

    def _excess(self, prompt: RawPrompt) -> str | None:
        """Return by how much a prompt leaves no room for a complement; None: it leaves room, or is not measured."""
        if self._length is None:
            return None
        room = self._options.context - self._options.writer.max_tokens
        tokens = self._length(filled(self._template, prompt.text), "", prompt.where)
        return f"{tokens} tokens with the template, room for {room}" if tokens > room else None

    def _open(self, model: str, option: str, name: str) -> Asker:
        """Return a model with the file of its replies; roles of the same model share it."""
        if model not in self._models:
            self._models[model] = open_chat(model, option, self._options.chat)
        self._askers.append(
            Asker(self._models[model], KeptReplies(self._out / REPLIES / f"{name}.jsonl"), self._budget)
        )
        self._opened.callback(self._askers[-1].close)
        return self._askers[-1]
