"""Write the complements of prompts: generate, check, critique, correct or generate again, within bounds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_align.augmentation.texts import (
    FAULTS,
    Example,
    complement_of,
    critique_request,
    fault_note,
    generation_request,
)
from megatron_align.augmentation.verdicts import UNNAMED, parse_verdict
from megatron_align.curation.asking import Asker, Unreadable
from megatron_align.curation.chat_models import NoReply, Reply, Request
from megatron_align.curation.raw_prompts import RawPrompt
from megatron_align.evaluation.near_duplicates import words_of

# Faults that are found without a critic.
RULES = {
    "empty": "it is empty",
    "cut": "it was cut at the longest reply",
    "too_many_words": "it has too many words",
}
Log = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledPrompt:
    """A prompt that passed the filters.

    Args:
        prompt: of a user.
        category: None: it has none.
        quality: None: it was not scored.
    """

    prompt: RawPrompt
    category: str | None
    quality: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterOptions:
    """How complements are written.

    Args:
        shots: examples in a request for a complement
        regenerations: further complements of a prompt after a faulty one
        tries: replies of the critic to one request, until one has a verdict
        max_words: longest complement; each character of a script without spaces is a word
        max_tokens: longest reply of the generator
        critic_tokens: longest reply of the critic
        temperature: of the generator
    """

    shots: int = 4
    regenerations: int = 2
    tries: int = 3
    max_words: int = 80
    max_tokens: int = 256
    critic_tokens: int = 1024
    temperature: float = 0.7


@dataclass(slots=True)
class WriterCounts:
    """Complements, what was wrong with them, and prompts that were given up."""

    complements: int = 0
    regenerated: int = 0
    corrected: int = 0
    faults: Counter[str] = field(default_factory=Counter)  # of complements, by fault
    given_up: Counter[str] = field(default_factory=Counter)  # prompts, by reason

    def to_dict(self) -> dict[str, Any]:
        """Return the counts for JSON."""
        names = (*FAULTS, UNNAMED, *RULES)
        return {
            "complements": self.complements,
            "regenerated": self.regenerated,
            "corrected": self.corrected,
            "faults": {name: self.faults[name] for name in names},
            "given_up": dict(sorted(self.given_up.items())),
        }


@dataclass(slots=True)
class _Work:
    """A prompt on its way to a complement."""

    labelled: LabelledPrompt
    examples: Sequence[Example]
    complement: str = ""
    correction: str = ""  # the critic's, which is the next complement
    note: str = ""  # about the last faulty one
    seen: list[str] = field(default_factory=list)
    result: str | None = None
    given_up: str | None = None

    @property
    def is_open(self) -> bool:
        return self.result is None and self.given_up is None


class ComplementWriter:
    """Writes complements of prompts.

    Args:
        generator: writes them.
        critic: judges them; None: only the rules do.
        options: bounds.
        counts: are added to.
        log: called with a row for each faulty complement, and for each prompt that is given up.
    """

    def __init__(
        self, generator: Asker, critic: Asker | None, options: WriterOptions, counts: WriterCounts, log: Log
    ) -> None:
        self._generator, self._critic = generator, critic
        self._options, self._counts, self._log = options, counts, log

    def write(self, items: Sequence[tuple[LabelledPrompt, Sequence[Example]]]) -> list[str | None]:
        """Return the complement of each prompt, which comes with its examples; None: it was given up.

        Raises:
            InputError: more requests fail than is allowed.
        """
        works = [_Work(labelled, examples[: self._options.shots]) for labelled, examples in items]
        for attempt in range(self._options.regenerations + 1):
            if not (still := [work for work in works if work.is_open]):
                break
            judged = self._next_complements(still, attempt)
            self._critique(judged)
        for work in works:
            if work.is_open:
                self._give_up(work, "faulty", "")
        return [work.result for work in works]

    def _next_complements(self, works: Sequence[_Work], attempt: int) -> list[_Work]:
        """Give each prompt its next complement; return those whose complement passes the rules."""
        generated = [work for work in works if not work.correction]
        replies = self._generator.replies([self._generation(work, attempt) for work in generated])
        made = {id(work): reply for work, reply in zip(generated, replies, strict=True)}
        passed = []
        for work in works:
            reply = made.get(id(work), Reply(work.correction))
            if isinstance(reply, NoReply):
                self._give_up(work, reply.reason, reply.line)
                continue
            self._counts.complements += 1
            self._counts.corrected += bool(work.correction)
            self._counts.regenerated += bool(attempt and not work.correction)
            work.complement, work.correction = complement_of(reply.text), ""
            if rule := self._broken_rule(work.complement, reply.finish_reason):
                self._refuse(work, (rule,), RULES[rule])
            else:
                passed.append(work)
        return passed

    def _critique(self, works: Sequence[_Work]) -> None:
        if self._critic is None:
            for work in works:
                work.result = work.complement
            return
        requests = [self._criticism(work) for work in works]
        verdicts = self._critic.parsed(requests, parse_verdict, self._options.tries)
        for work, verdict in zip(works, verdicts, strict=True):
            if isinstance(verdict, NoReply):
                self._give_up(work, verdict.reason, verdict.line)
            elif isinstance(verdict, Unreadable):
                self._give_up(work, "unjudged", verdict.text)
            elif not verdict.faults:
                work.result = work.complement
            else:
                self._refuse(work, verdict.faults, verdict.reason)
                if verdict.correction not in work.seen:
                    work.correction = verdict.correction

    def _broken_rule(self, complement: str, finish_reason: str) -> str | None:
        if not complement:
            return "empty"
        if finish_reason == "length":
            return "cut"
        return "too_many_words" if len(words_of(complement)) > self._options.max_words else None

    def _refuse(self, work: _Work, faults: Sequence[str], reason: str) -> None:
        self._counts.faults.update(faults)
        work.seen.append(work.complement)
        work.note = fault_note(work.complement, faults, reason) if work.complement else ""
        self._log(_row(work, step="critique", faults=list(faults), reason=reason, complement=work.complement))

    def _give_up(self, work: _Work, reason: str, line: str) -> None:
        work.given_up = reason
        self._counts.given_up[reason] += 1
        self._log(_row(work, step="complement", given_up=reason, reason=line))

    def _generation(self, work: _Work, attempt: int) -> Request:
        prompt, category = work.labelled.prompt, work.labelled.category
        shown = [{"prompt": example.prompt, "complement": example.complement} for example in work.examples]
        return Request(
            task="generate",
            content=generation_request(prompt.text, category, work.examples, work.note),
            fields={
                "prompt": prompt.text,
                "category": category,
                "examples": shown,
                "refused": list(work.seen),
            },
            attempt=attempt,
            temperature=self._options.temperature,
            max_tokens=self._options.max_tokens,
            where=prompt.where,
        )

    def _criticism(self, work: _Work) -> Request:
        prompt = work.labelled.prompt
        return Request(
            task="critique",
            content=critique_request(prompt.text, work.complement),
            fields={
                "prompt": prompt.text,
                "category": work.labelled.category,
                "complement": work.complement,
            },
            max_tokens=self._options.critic_tokens,
            where=prompt.where,
        )


def _row(work: _Work, **more: Any) -> dict[str, Any]:
    prompt = work.labelled.prompt
    return {"where": prompt.where, "prompt": prompt.text, "category": work.labelled.category, **more}
