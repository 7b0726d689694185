"""Preference records: raw fields to a prompt and its judged completions (a pair, a ranked list, a single one)."""

from __future__ import annotations

import re
from typing import Any

from megatron_align.data.formats.chat import alpaca_prompt
from megatron_align.data.formats.fields import (
    RawRecord,
    clean,
    items,
    number,
    said,
    short,
    text,
    weight,
    wrong,
)
from megatron_align.data.formats.turns import functions, messages, offered, saying, sharegpt, sharegpt_turn
from megatron_align.errors import InputError
from megatron_align.records import Message, Preference

Turns = tuple[Message, ...]
Tools = tuple[Any, ...] | None

PAIR = ("chosen", "rejected")
GOLD = "reference"  # the third answer of a triple: TRL's name
_SCORES = (("chosen_score", "rejected_score"), ("score_chosen", "score_rejected"))
_HH_SPEAKER = re.compile(r"\n\n(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


# Pairs.
def pair_of_text(record: RawRecord, where: str) -> Preference:
    """Convert ``prompt``, ``chosen``, ``rejected``: plain text."""
    prompt, answers = said(record, "prompt", where), [said(record, name, where) for name in PAIR]
    return _pair(record, where, prompt, answers, _no_tools(record, where))


def pair_of_messages(record: RawRecord, where: str) -> Preference:
    """Convert ``prompt``, ``chosen``, ``rejected``: message lists; a string is one assistant turn."""
    prompt = messages(record["prompt"], where, "prompt")
    answers = [_answer(record[name], where, name) for name in PAIR]
    return _pair(record, where, prompt, answers, offered(record, where))


def pair_of_conversations(record: RawRecord, where: str) -> Preference:
    """Convert two whole conversations; what they share at the start is the prompt, as in TRL."""
    prompt, answers = _shared([messages(record[name], where, name) for name in PAIR], where)
    return _pair(record, where, prompt, answers, offered(record, where))


def pair_of_hh_rlhf(record: RawRecord, where: str) -> Preference:
    r"""Convert two texts of the form ``\n\nHuman: ...\n\nAssistant: ...`` with a shared start (hh-rlhf)."""
    prompt, answers = _shared([_hh_turns(record, name, where) for name in PAIR], where)
    return _pair(record, where, prompt, answers, offered(record, where))


def pair_of_sharegpt(record: RawRecord, where: str) -> Preference:
    """Convert ``conversations`` and one turn each in ``chosen`` and ``rejected``."""
    prompt, tools = sharegpt(record, where)
    answers = [_spoken(sharegpt_turn(record[name], where, name), where, name) for name in PAIR]
    return _pair(record, where, prompt, answers, tools)


def pair_of_alpaca(record: RawRecord, where: str) -> Preference:
    """Convert ``instruction`` and two answers in ``chosen`` and ``rejected``."""
    answers = [(Message("assistant", said(record, name, where)),) for name in PAIR]
    return _pair(record, where, alpaca_prompt(record, where), answers, functions(record, where))


def _pair(
    record: RawRecord,
    where: str,
    prompt: Turns | str,
    answers: list[Turns] | list[str],
    tools: Tools = None,
) -> Preference:
    _require_apart(*answers, where)
    margin = record.get("margin")
    return Preference(
        kind="pair",
        prompt=prompt,
        completions=tuple(answers),
        where=where,
        tools=tools,
        scores=_pair_scores(record, where),
        margin=None if margin is None else number(margin, where, "margin"),
        weight=weight(record, where),
    )


def _require_apart(chosen: Turns | str, rejected: Turns | str, where: str) -> None:
    if _key(chosen) == _key(rejected):
        raise InputError(f"{where}: field 'rejected' must differ from 'chosen', got the same")


def _pair_scores(record: RawRecord, where: str) -> tuple[float | None, ...]:
    given = [names for names in _SCORES if any(record.get(name) is not None for name in names)]
    if not given:
        return ()
    if len(given) > 1:
        raise InputError(f"{where}: fields '{_SCORES[0][0]}' and '{_SCORES[1][0]}' must not both be there")
    return tuple(None if record.get(name) is None else number(record[name], where, name) for name in given[0])


# Pairs with a gold answer besides.
def triple(record: RawRecord, where: str) -> Preference:
    """Convert ``prompt``, ``chosen``, ``rejected``, ``reference``: text, or messages where the prompt is messages."""
    prompt = _prompt(record, where)
    chosen, rejected, gold = (_completion(record[name], where, name, prompt) for name in (*PAIR, GOLD))
    _require_apart(chosen, rejected, where)
    return Preference(
        kind="triple",
        prompt=prompt,
        completions=(chosen, rejected, gold),
        where=where,
        tools=_no_tools(record, where) if isinstance(prompt, str) else offered(record, where),
        weight=weight(record, where),
    )


# Ranked lists.
def ranked(record: RawRecord, where: str) -> Preference:
    """Convert ``prompt`` and ``completions: [{content, score}]``: text, or messages where the prompt is messages."""
    prompt = _prompt(record, where)
    listed = items(record["completions"], where, "completions")
    if len(listed) < 2:
        raise InputError(f"{where}: field 'completions' must hold at least 2 completions, got {len(listed)}")
    answers: list[Any] = []
    scores: list[float] = []
    seen: dict[Any, int] = {}
    for i, item in enumerate(listed):
        name = f"completions[{i}]"
        if not isinstance(item, dict):
            raise wrong(where, name, "an object with content and score", item)
        answer = _completion(item.get("content"), where, f"{name}.content", prompt)
        first = seen.setdefault(_key(answer), i)
        if first != i:
            raise InputError(
                f"{where}: field '{name}.content' must differ from completions[{first}], got the same"
            )
        answers.append(answer)
        scores.append(number(item.get("score"), where, f"{name}.score"))
    return Preference(
        kind="ranked",
        prompt=prompt,
        completions=tuple(answers),
        where=where,
        tools=_no_tools(record, where) if isinstance(prompt, str) else offered(record, where),
        scores=tuple(scores),
        weight=weight(record, where),
    )


# Single completions, good or bad.
def unpaired(record: RawRecord, where: str) -> Preference:
    """Convert ``prompt``, ``completion``, ``label``: text, or messages where the prompt is messages."""
    prompt = _prompt(record, where)
    answer = _completion(record["completion"], where, "completion", prompt)
    tools = _no_tools(record, where) if isinstance(prompt, str) else offered(record, where)
    return _unpaired(record, where, prompt, answer, tools)


def unpaired_conversation(record: RawRecord, where: str) -> Preference:
    """Convert ``messages`` and ``label`` (or ``kto_tag``): the last turn is what was judged."""
    turns = messages(record["messages"], where, "messages")
    prompt, answer = _last_apart(turns, where, "messages")
    return _unpaired(record, where, prompt, answer, offered(record, where))


def unpaired_sharegpt(record: RawRecord, where: str) -> Preference:
    """Convert ``conversations`` and ``label`` (or ``kto_tag``): the last turn is what was judged."""
    turns, tools = sharegpt(record, where)
    prompt, answer = _last_apart(turns, where, "conversations")
    return _unpaired(record, where, prompt, answer, tools)


def unpaired_alpaca(record: RawRecord, where: str) -> Preference:
    """Convert ``instruction``, ``output`` and ``label`` (or ``kto_tag``)."""
    answer = (Message("assistant", said(record, "output", where)),)
    return _unpaired(record, where, alpaca_prompt(record, where), answer, functions(record, where))


def _unpaired(
    record: RawRecord, where: str, prompt: Turns | str, answer: Turns | str, tools: Tools = None
) -> Preference:
    return Preference(
        kind="unpaired",
        prompt=prompt,
        completions=(answer,),
        where=where,
        tools=tools,
        label=_label(record, where),
        weight=weight(record, where),
    )


def _label(record: RawRecord, where: str) -> bool:
    names = [name for name in ("label", "kto_tag") if record.get(name) is not None]
    if len(names) > 1 and record["label"] is not record["kto_tag"]:
        raise InputError(f"{where}: fields 'label' and 'kto_tag' must not both be there")
    name = names[0] if names else ("label" if "label" in record else "kto_tag")
    value = record.get(name)
    if not isinstance(value, bool):
        raise wrong(where, name, "true or false", value)
    return value


def _last_apart(turns: Turns, where: str, name: str) -> tuple[Turns, Turns]:
    if len(turns) < 2:
        raise InputError(
            f"{where}: field '{name}' must have turns before the judged one, got {len(turns)} in all"
        )
    return turns[:-1], _spoken(turns[-1], where, f"{name}[-1]")


# Parts of all of them.
def _prompt(record: RawRecord, where: str) -> Turns | str:
    value = record.get("prompt")
    return messages(value, where, "prompt") if isinstance(value, list) else said(record, "prompt", where)


def _completion(value: Any, where: str, name: str, prompt: Turns | str) -> Turns | str:
    if not isinstance(prompt, str):
        return _answer(value, where, name)
    return said({name: value}, name, where)


def _answer(value: Any, where: str, name: str) -> Turns:
    """Return the turns of one completion; a string is one assistant turn."""
    if isinstance(value, str):
        turn = Message("assistant", clean(value, where, name))
        return (saying(turn, where, name),)
    return _follows(messages(value, where, name), where, name)


def _spoken(turn: Message, where: str, name: str) -> Turns:
    return _follows((turn,), where, name)


def _follows(turns: Turns, where: str, name: str, shared: int = 0) -> Turns:
    """Return the turns if they can answer a prompt, and something in them is to be trained on."""
    if turns[0].role != "assistant":
        raise InputError(
            f"{where}: field '{name}' must go on with an assistant turn after the prompt, "
            f"got one of the {turns[0].role}{f' at {name}[{shared}]' if shared else ''}"
        )
    if not any(turn.train for turn in turns if turn.role == "assistant"):
        raise InputError(f"{where}: field '{name}' must have a turn to train on, got 'train': false in all")
    return turns


def _shared(conversations: list[Turns], where: str) -> tuple[Turns, list[Turns]]:
    """Split two conversations into their longest common start and the rest of each."""
    chosen, rejected = ([turn.for_template() for turn in turns] for turns in conversations)
    if chosen == rejected:
        raise InputError(f"{where}: field 'rejected' must differ from 'chosen', got the same")
    both = min(len(chosen), len(rejected))
    shared = next((i for i in range(both) if chosen[i] != rejected[i]), both)
    if not shared:
        raise InputError(
            f"{where}: fields 'chosen' and 'rejected' must start with the same turns (the prompt), "
            f"got {short(chosen[0]['content'])} and {short(rejected[0]['content'])}"
        )
    for name, turns in zip(PAIR, conversations, strict=True):
        if len(turns) == shared:
            raise InputError(f"{where}: field '{name}' must go on after the turns that both share, got none")
    rests = [
        _follows(turns[shared:], where, name, shared) for name, turns in zip(PAIR, conversations, strict=True)
    ]
    return conversations[0][:shared], rests


def _hh_turns(record: RawRecord, name: str, where: str) -> Turns:
    value = text(record, name, where)
    before, *parts = _HH_SPEAKER.split(value)
    if before.strip() or not parts:
        raise InputError(
            f"{where}: field '{name}' must have the form '\\n\\nHuman: ...\\n\\nAssistant: ...' "
            f"(or stand beside a 'prompt'), got {short(value)}"
        )
    spoken = zip(parts[::2], parts[1::2], strict=True)
    return tuple(
        saying(Message(_HH_ROLES[speaker], content.strip()), where, f"{name} turn {i}")
        for i, (speaker, content) in enumerate(spoken, start=1)
    )


def _no_tools(record: RawRecord, where: str) -> None:
    if offered(record, where):
        raise InputError(f"{where}: field 'tools' must stand beside messages, got a plain text prompt")


def _key(answer: Turns | str) -> str:
    """Return what tells two completions apart (whether a turn is trained on does not)."""
    return answer if isinstance(answer, str) else repr([turn.for_template() for turn in answer])
