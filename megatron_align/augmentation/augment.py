"""Augment prompts: a model writes their complements, which are appended to them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from megatron_align.augmentation.texts import complement_of, filled, joined, load_template
from megatron_align.curation.asking import Asker
from megatron_align.curation.chat_models import ChatOptions, NoReply, Request, open_chat
from megatron_align.data.formats.files import expand, read_fields
from megatron_align.data.store import sha256
from megatron_align.errors import InputError, require
from megatron_align.evaluation.generation import CHUNK, given_prompt
from megatron_align.evaluation.progress import progress
from megatron_align.rollout.endpoint import FailureBudget
from megatron_align.rollout.kept_replies import KeptReplies
from megatron_align.rollout.prompts import TEXT_FIELDS, PromptRecord, prompt_record
from megatron_align.storage.resumable_lines import ResumableLines

COMPLEMENT = "complement"  # field of an augmented record
Unusable = Literal["error", "keep"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AugmentOptions:
    """The model that writes complements, and what happens to prompts that it has no room for.

    Args:
        model: URL#NAME, FILE.py:FUNCTION, or a model
        template: file of the template that it was trained on; None: ours
        max_tokens: longest complement
        unusable: records without a prompt and prompts that do not fit the model: error, or keep them as they are
        failures: requests to an endpoint that may fail after all tries; their prompts are kept as they are
        chat: how the model is reached
    """

    model: str
    template: str | None = None
    max_tokens: int = 128
    unusable: Unusable = "error"
    failures: int = 0
    chat: ChatOptions = field(default_factory=ChatOptions)

    def __post_init__(self) -> None:
        require(self.max_tokens >= 1, f"max_tokens must be at least 1, got {self.max_tokens}")
        require(self.failures >= 0, f"failures must not be negative, got {self.failures}")


class Augmenter:
    """Writes complements of prompts and appends them. Greedy: a prompt has one complement.

    Args:
        options: of the model.
        kept: file of replies that an earlier process has received; None: they are kept in memory only.

    Attributes:
        counts: prompts by what became of them: ``augmented``, of them ``cut`` at the longest complement; and those that
            are kept as they are: ``empty`` complement, ``too_long``, ``failed``, ``no_user_turn``, ``unusable`` record.
        earlier: rows of a file that an earlier process has written; they are not counted.

    Raises:
        InputError: there is no such model, or it has no chat template.
    """

    def __init__(self, options: AugmentOptions, kept: Path | None = None) -> None:
        self._options, self.counts, self.earlier = options, Counter[str](), 0
        self._template = load_template(options.template)
        self._model = open_chat(options.model, "augment", options.chat)
        self._asker = Asker(self._model, KeptReplies(kept), FailureBudget(options.failures))
        self.identity = [self._model.identity, self._template, options.max_tokens]

    def complements(self, records: Sequence[PromptRecord]) -> list[str | None]:
        """Return the complement of each prompt; None: the prompt is kept as it is, for a reason that is counted.

        Raises:
            InputError: a prompt does not fit the model, or a request failed, and that is not allowed.
        """
        texts = [_user_text(record) for record in records]
        asked = [i for i, text in enumerate(texts) if text is not None]
        requests = [self._request(records[i], texts[i] or "") for i in asked]
        results: list[str | None] = [None] * len(records)
        self.counts["no_user_turn"] += len(records) - len(asked)
        for i, reply in zip(asked, self._asker.replies(requests), strict=True):
            if isinstance(reply, NoReply):
                refused = reply.reason == "too_long" and self._options.unusable == "error"
                require(
                    not refused,
                    f"augment: a prompt must fit the model that writes its complement: {reply.line}",
                )
                self.counts[reply.reason] += 1
            elif not (text := complement_of(reply.text)):
                self.counts["empty"] += 1
            else:
                results[i] = text
                self.counts["augmented"] += 1
                self.counts["cut"] += reply.finish_reason == "length"
        return results

    def augmented(self, records: Sequence[PromptRecord]) -> list[PromptRecord]:
        """Return the records with augmented prompts and the field ``complement``; raises as :meth:`complements`."""
        return [
            replace(record, prompt=_with_complement(record, text), raw={**record.raw, COMPLEMENT: text})
            for record, text in zip(records, self.complements(records), strict=True)
        ]

    def rows(self, items: Sequence[tuple[str, dict[str, Any] | InputError]]) -> list[dict[str, Any]]:
        """Return raw records, their prompts augmented in the fields that hold them; raises as :meth:`complements`.

        Args:
            items: place and fields of each record, or why it has none.
        """
        records: list[PromptRecord | None] = []
        for where, raw in items:
            try:
                records.append(_usable(raw, where))
            except InputError:
                require_kept = self._options.unusable == "keep" and not isinstance(raw, InputError)
                if not require_kept:
                    raise
                records.append(None)
                self.counts["unusable"] += 1
        made = iter(self.complements([record for record in records if record is not None]))
        rows = []
        for (_, raw), record in zip(items, records, strict=True):
            assert not isinstance(raw, InputError), "raised above"
            text = None if record is None else next(made)
            changed = raw if text is None else in_place(raw, text)
            rows.append({**changed, COMPLEMENT: text})
        return rows

    def close(self) -> None:
        """Free the model's memory."""
        self._asker.close()

    def summary(self) -> str:
        """Return the counts as one line."""
        kept = ("empty", "too_long", "failed", "no_user_turn", "unusable")
        others = [f"{self.counts[name]:,} {name}" for name in kept if self.counts[name]]
        cut = f" ({self.counts['cut']:,} of the complements cut by length)" if self.counts["cut"] else ""
        left = f"; without complement: {', '.join(others)}" if others else ""
        before = f" after {self.earlier:,} rows of an earlier process" if self.earlier else ""
        return f"{self.counts['augmented']:,} prompts augmented{before}{cut}{left}"

    def _request(self, record: PromptRecord, text: str) -> Request:
        return Request(
            task="augment",
            content=filled(self._template, text),
            fields={"prompt": text},
            max_tokens=self._options.max_tokens,
            where=record.where,
        )


@contextmanager
def augmenter(
    model: str,
    template: str | None = None,
    *,
    unusable: Unusable = "error",
    now: datetime | None = None,
    kept: Path | None = None,
) -> Iterator[Augmenter]:
    """Give an augmenter within a with-block, which frees its model; arguments as of :class:`AugmentOptions`."""
    options = AugmentOptions(model=model, template=template, unusable=unusable, chat=ChatOptions(now=now))
    opened = Augmenter(options, kept)
    try:
        yield opened
    finally:
        opened.close()


def augment(
    model: str | Path,
    prompts: Sequence[str | Sequence[Mapping[str, Any]]],
    *,
    template: str | None = None,
    max_tokens: int = 128,
    **chat: Any,
) -> list[str | list[dict[str, Any]]]:
    """Return augmented prompts: ``augment("runs/pas/hf", ["Write a poem"])``.

    Args:
        model: Hugging Face folder, checkpoint, run folder, ``URL#NAME`` or ``FILE.py:FUNCTION``.
        prompts: texts, or lists of messages ``{role, content}``, whose last turn is augmented if it is the user's.
        template: file of the template that the model was trained on; None: ours.
        max_tokens: longest complement.
        chat: of :class:`.ChatOptions`.

    Raises:
        InputError: bad prompts, model or options.
    """
    records = [given_prompt(prompt, f"prompts[{i}]") for i, prompt in enumerate(prompts)]
    options = AugmentOptions(
        model=str(model), template=template, max_tokens=max_tokens, chat=ChatOptions(**chat)
    )
    opened = Augmenter(options)
    try:
        return [record.prompt_field() for record in opened.augmented(records)]
    finally:
        opened.close()


def augment_file(options: AugmentOptions, prompts: str, out: str) -> Augmenter:
    """Augment the prompts of a file, in its order, into a JSONL file that a killed process continues.

    A row is the record with the augmented prompt in its own field, and ``complement``.

    Returns:
        The augmenter, closed, with its counts: of this process.

    Raises:
        InputError: bad prompts, model or output.
    """
    items = [item for file in expand(prompts) for item in read_fields(file)]
    require(bool(items), f"{prompts}: must hold at least one prompt, got none")
    opened = Augmenter(options)
    key = {
        "augment": opened.identity,
        "unusable": options.unusable,
        "data": [sha256(file) for file in expand(prompts)],
    }
    try:
        with ResumableLines(Path(out), key) as output, progress("augmenting", len(items)) as advance:
            opened.earlier = output.done
            advance(output.done, 0)
            for start in range(output.done, len(items), CHUNK):
                rows = opened.rows(items[start : start + CHUNK])
                output.append([json.dumps(row, ensure_ascii=False) for row in rows])
                advance(len(rows), 0)
            output.finish()
    finally:
        opened.close()
    return opened


def augment_lines(
    options: AugmentOptions, batches: Iterator[list[tuple[str, str]]], write: Callable[[str], object]
) -> Augmenter:
    """Augment lines of JSON as they come, for a pipe.

    Args:
        options: of the model.
        batches: places and lines that are augmented together.
        write: is called with each line of the output.

    Returns:
        The augmenter, closed, with its counts.

    Raises:
        InputError: bad lines or model.
    """
    opened = Augmenter(options)
    try:
        for batch in batches:
            for row in opened.rows([(where, _decoded(line, where)) for where, line in batch]):
                write(json.dumps(row, ensure_ascii=False))
    finally:
        opened.close()
    return opened


def in_place(raw: Mapping[str, Any], complement: str) -> dict[str, Any]:
    """Return a record whose prompt is augmented in the field that holds it."""
    name = next((name for name in TEXT_FIELDS if isinstance(raw.get(name), str)), None)
    if (
        name is None
        and "instruction" in raw
        and not any(n in raw for n in ("prompt", "messages", "conversations"))
    ):
        name = "input" if str(raw.get("input") or "").strip() else "instruction"
    if name is not None:
        return {**raw, name: joined(str(raw[name]), complement)}
    name = next(name for name in ("prompt", "messages", "conversations") if name in raw)
    turns = [dict(turn) for turn in raw[name]]
    role, content = ("from", "value") if "from" in turns[-1] else ("role", "content")
    last = max(i for i, turn in enumerate(turns) if turn.get(role) in ("user", "human"))
    turns[last][content] = joined(_text_of(turns[last][content]), complement)
    return {**raw, name: turns}


def _usable(raw: dict[str, Any] | InputError, where: str) -> PromptRecord:
    if isinstance(raw, InputError):
        raise raw
    return prompt_record(raw, where)


def _decoded(line: str, where: str) -> dict[str, Any] | InputError:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return InputError(f"{where}: must be a JSON object, got {error}")
    return (
        value if isinstance(value, dict) else InputError(f"{where}: must be a JSON object, got another value")
    )


def _user_text(record: PromptRecord) -> str | None:
    """Return the text of a prompt; of messages the last turn, if it is the user's, else None."""
    if isinstance(record.prompt, str):
        return record.prompt
    last = record.prompt[-1]
    return last.content if last.role == "user" and last.content.strip() else None


def _with_complement(record: PromptRecord, complement: str | None) -> Any:
    if complement is None:
        return record.prompt
    if isinstance(record.prompt, str):
        return joined(record.prompt, complement)
    last = record.prompt[-1]
    return (*record.prompt[:-1], replace(last, content=joined(last.content, complement)))


def _text_of(content: Any) -> str:
    """Return the text of a turn's content, which may be a list of text parts."""
    return content if isinstance(content, str) else "".join(str(part["text"]) for part in content)
