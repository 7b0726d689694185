"""Texts of prompt augmentation (PAS): the template that is trained, and what generators, critics and scorers read.

The system is that of the Baichuan Alignment report (arXiv:2410.14940, section 2.3) and of PAS (arXiv:2407.06027): a
small model writes a complement of a prompt, which is appended to it. The wording is ours.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_align.errors import InputError, require

PLACE = "{prompt}"
_REASONING = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
WORDS = 30  # that a complement should have
# What is wrong with a complement, as the critic names it.
FAULTS = {
    "intent_drift": "it changes what the user wants, or is about something else",
    "excess": "the prompt is detailed already, and it piles more onto it or repeats it",
    "answering": "it answers the prompt, in part or entirely, or gives the solution away",
    "over_demanding": "it requires more than this user would want, or what the prompt rules out",
    "language_mismatch": "it is not in the language of the prompt",
}

_RULES = f"""\
Complementary information states what the prompt leaves open and the answer needs: the purpose, the reader, the depth, \
the form, the limits. It only supplements. It never answers the prompt, never changes its intention, and requires \
nothing that this user would not want. It is written in the language of the prompt, in about {WORDS} words."""

TEMPLATE = f"""\
Write complementary information for the prompt of a user. It will be appended to the prompt, so that the assistant who \
answers it serves the user better.
{_RULES}

<User prompt>: {PLACE}
<Complementary information>:"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A prompt with good complementary information, written by a human.

    Args:
        prompt: of a user.
        complement: of the prompt.
        category: of the prompt; None: an example for categories that have none of their own.
    """

    prompt: str
    complement: str
    category: str | None = None


def load_template(file: str | None) -> str:
    """Return the template of a file, or ours.

    Raises:
        InputError: the file is unreadable, or does not hold ``{prompt}`` exactly once.
    """
    if file is None:
        return TEMPLATE
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InputError(f"{file}: the template could not be read: {reason}") from error
    found = text.count(PLACE)
    require(
        found == 1,
        f"{file}: a template must hold {PLACE} once, for the prompt of the user, got it {found} times",
    )
    return text.rstrip("\n")


def filled(template: str, prompt: str) -> str:
    """Return a template with a prompt in it: what the augmenting model reads."""
    return template.replace(PLACE, prompt)


def joined(prompt: str, complement: str) -> str:
    """Return the augmented prompt: the complement follows on a line of its own."""
    return f"{prompt}\n{complement}"


def complement_of(reply: str) -> str:
    """Return the complement in a reply, without the model's reasoning and the tag that the request ends with."""
    without = _REASONING.sub("", reply, count=1).strip()
    return without.removeprefix("<Complementary information>:").strip()


def generation_request(
    prompt: str, category: str | None, examples: Sequence[Example], faulty: str = ""
) -> str:
    """Return what a generator reads.

    Args:
        prompt: that needs a complement.
        category: of it; None: not known.
        examples: of its category, which show how.
        faulty: a note about an earlier complement; empty: there is none.
    """
    kind = f' Its category is "{category}".' if category else ""
    shown = "\n\n".join(_pair(example.prompt, example.complement) for example in examples)
    return (
        f"Write complementary information for the prompt of a user.{kind}\n{_RULES}\n\n"
        f"These are good examples:\n\n{shown}\n\n{faulty}"
        "Reply with the complementary information of this prompt and nothing else.\n\n"
        f"<User prompt>: {prompt}\n<Complementary information>:"
    )


def fault_note(complement: str, faults: Sequence[str], reason: str) -> str:
    """Return the note about a faulty complement, for the next request."""
    names = " and ".join(f"{name} ({FAULTS[name]})" if name in FAULTS else name for name in faults)
    why = f" The reviewer wrote: {reason}" if reason else ""
    return f"An earlier attempt was refused for {names}: {complement}\n{why}\nAvoid this fault.\n\n".replace(
        "\n\n\n", "\n\n"
    )


def critique_request(prompt: str, complement: str) -> str:
    """Return what a critic reads; it replies with the JSON that :func:`.verdicts.parse_verdict` reads."""
    faults = "\n".join(f"- {name}: {about}" for name, about in FAULTS.items())
    return (
        "Review complementary information that was written for the prompt of a user, to be appended to it.\n"
        f"{_RULES}\n\nIt is refused if it has one of these faults:\n{faults}\n\n{_pair(prompt, complement)}\n\n"
        "Do not answer the prompt. Reply with one JSON object and nothing else:\n"
        '{"Reason": "one or two sentences", "Faults": ["the names of its faults, if any"], "Is_correct": "Yes or No", '
        '"FinalAPE": "if No, complementary information without these faults, otherwise empty"}'
    )


def _pair(prompt: str, complement: str) -> str:
    return f"<User prompt>: {prompt}\n<Complementary information>: {complement}"
