"""Convert preference records: raw fields to a prompt and its judged completions (pair, triple, ranked list, single)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from megatron_align.data.formats.chat import alpaca_prompt
from megatron_align.data.formats.fields import (
    RawRecord,
    bad_field,
    nonempty_list,
    nonempty_text,
    number,
    require_renderable,
    text,
    weight,
)
from megatron_align.data.formats.turns import (
    messages,
    require_content,
    sharegpt,
    sharegpt_turn,
    tools_of,
    wrapped_tools,
)
from megatron_align.errors import InputError, shown
from megatron_align.records import Message, Preference

Turns = tuple[Message, ...]
Tools = tuple[Any, ...] | None

PAIR = ("chosen", "rejected")
GOLD = "reference"  # the third answer of a triple: TRL's name
SCORES = (("chosen_score", "rejected_score"), ("score_chosen", "score_rejected"))
_HH_SPEAKER = re.compile(r"\n\n(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


# Pairs.
def pair_of_text(record: RawRecord, where: str) -> Preference:
    """Convert ``prompt``, ``chosen``, ``rejected``: plain text."""
    prompt = nonempty_text(record, "prompt", where)
    answers = [nonempty_text(record, name, where) for name in PAIR]
    return _pair(record, where, prompt, answers, _tools(record, where, prompt))


def pair_of_messages(record: RawRecord, where: str) -> Preference:
    """Convert ``prompt``, ``chosen``, ``rejected``: message lists; a string is one assistant turn."""
    prompt = messages(record["prompt"], where, "prompt")
    answers = [_answer(record[name], where, name) for name in PAIR]
    return _pair(record, where, prompt, answers, tools_of(record, where))


def pair_of_conversations(record: RawRecord, where: str) -> Preference:
    """Convert two complete conversations; their common start is the prompt, as in TRL."""
    prompt, answers = _split_common_start([messages(record[name], where, name) for name in PAIR], where)
    return _pair(record, where, prompt, answers, tools_of(record, where))


def pair_of_hh_rlhf(record: RawRecord, where: str) -> Preference:
    r"""Convert two texts of the form ``\n\nHuman: ...\n\nAssistant: ...`` with a common start (hh-rlhf)."""
    prompt, answers = _split_common_start([_hh_turns(record, name, where) for name in PAIR], where)
    return _pair(record, where, prompt, answers, tools_of(record, where))


def pair_of_sharegpt(record: RawRecord, where: str) -> Preference:
    """Convert ``conversations`` and one turn each in ``chosen`` and ``rejected``."""
    prompt, tools = sharegpt(record, where)
    answers = [_answer_turn(sharegpt_turn(record[name], where, name), where, name) for name in PAIR]
    return _pair(record, where, prompt, answers, tools)


def pair_of_alpaca(record: RawRecord, where: str) -> Preference:
    """Convert ``instruction`` and two answers in ``chosen`` and ``rejected``."""
    answers = [(Message("assistant", nonempty_text(record, name, where)),) for name in PAIR]
    return _pair(record, where, alpaca_prompt(record, where), answers, wrapped_tools(record, where))


def _pair(
    record: RawRecord,
    where: str,
    prompt: Turns | str,
    answers: Sequence[Turns | str],
    tools: Tools = None,
) -> Preference:
    chosen, rejected = answers
    _require_different(chosen, rejected, where)
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


def _require_different(chosen: Turns | str, rejected: Turns | str, where: str) -> None:
    if _key(chosen) == _key(rejected):
        raise InputError(f"{where}: field 'rejected' must differ from 'chosen', got the same")


def _pair_scores(record: RawRecord, where: str) -> tuple[float | None, ...]:
    given = [names for names in SCORES if any(record.get(name) is not None for name in names)]
    if not given:
        return ()
    if len(given) > 1:
        raise InputError(f"{where}: fields '{SCORES[0][0]}' and '{SCORES[1][0]}' must not both be given")
    return tuple(None if record.get(name) is None else number(record[name], where, name) for name in given[0])


# Pairs with a gold answer.
def triple(record: RawRecord, where: str) -> Preference:
    """Convert ``prompt``, ``chosen``, ``rejected``, ``reference``: text, or messages where the prompt is messages."""
    prompt = _prompt(record, where)
    chosen, rejected, gold = (_completion(record[name], where, name, prompt) for name in (*PAIR, GOLD))
    _require_different(chosen, rejected, where)
    return Preference(
        kind="triple",
        prompt=prompt,
        completions=(chosen, rejected, gold),
        where=where,
        tools=_tools(record, where, prompt),
        weight=weight(record, where),
    )


# Ranked lists.
def ranked(record: RawRecord, where: str) -> Preference:
    """Convert ``prompt`` and ``completions: [{content, score}]``: text, or messages where the prompt is messages."""
    prompt = _prompt(record, where)
    listed = nonempty_list(record["completions"], where, "completions")
    if len(listed) < 2:
        raise InputError(f"{where}: field 'completions' must hold at least 2 completions, got {len(listed)}")
    answers: list[Any] = []
    scores: list[float] = []
    seen: dict[Any, int] = {}
    for i, item in enumerate(listed):
        name = f"completions[{i}]"
        if not isinstance(item, dict):
            raise bad_field(where, name, "an object with content and score", item)
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
        tools=_tools(record, where, prompt),
        scores=tuple(scores),
        weight=weight(record, where),
    )


# Single completions, good or bad.
def unpaired(record: RawRecord, where: str) -> Preference:
    """Convert ``prompt``, ``completion``, ``label``: text, or messages where the prompt is messages."""
    prompt = _prompt(record, where)
    answer = _completion(record["completion"], where, "completion", prompt)
    tools = _tools(record, where, prompt)
    return _unpaired(record, where, prompt, answer, tools)


def unpaired_conversation(record: RawRecord, where: str) -> Preference:
    """Convert ``messages`` and ``label`` (or ``kto_tag``): the last turn is the judged one."""
    turns = messages(record["messages"], where, "messages")
    prompt, answer = _split_last_turn(turns, where, "messages")
    return _unpaired(record, where, prompt, answer, tools_of(record, where))


def unpaired_sharegpt(record: RawRecord, where: str) -> Preference:
    """Convert ``conversations`` and ``label`` (or ``kto_tag``): the last turn is the judged one."""
    turns, tools = sharegpt(record, where)
    prompt, answer = _split_last_turn(turns, where, "conversations")
    return _unpaired(record, where, prompt, answer, tools)


def unpaired_alpaca(record: RawRecord, where: str) -> Preference:
    """Convert ``instruction``, ``output`` and ``label`` (or ``kto_tag``)."""
    answer = (Message("assistant", nonempty_text(record, "output", where)),)
    return _unpaired(record, where, alpaca_prompt(record, where), answer, wrapped_tools(record, where))


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
        raise InputError(f"{where}: fields 'label' and 'kto_tag' must not both be given")
    name = names[0] if names else ("label" if "label" in record else "kto_tag")
    value = record.get(name)
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    raise bad_field(where, name, "true or false", value)


def _split_last_turn(turns: Turns, where: str, name: str) -> tuple[Turns, Turns]:
    if len(turns) < 2:
        raise InputError(
            f"{where}: field '{name}' must have turns before the judged one, got {len(turns)} turns"
        )
    return turns[:-1], _answer_turn(turns[-1], where, f"{name}[-1]")


# Fields that several kinds have.
def _prompt(record: RawRecord, where: str) -> Turns | str:
    value = record.get("prompt")
    return (
        messages(value, where, "prompt")
        if isinstance(value, list)
        else nonempty_text(record, "prompt", where)
    )


def _completion(value: Any, where: str, name: str, prompt: Turns | str) -> Turns | str:
    if not isinstance(prompt, str):
        return _answer(value, where, name)
    return nonempty_text({name: value}, name, where)


def _answer(value: Any, where: str, name: str) -> Turns:
    """Return the turns of one completion; a string is one assistant turn."""
    if isinstance(value, str):
        turn = Message("assistant", require_renderable(value, where, name))
        return (require_content(turn, where, name),)
    return _require_answer(messages(value, where, name), where, name)


def _answer_turn(turn: Message, where: str, name: str) -> Turns:
    return _require_answer((turn,), where, name)


def _require_answer(turns: Turns, where: str, name: str, shared: int = 0) -> Turns:
    """Return the turns if they start with the assistant's and one of them is trained."""
    if turns[0].role != "assistant":
        raise InputError(
            f"{where}: field '{name}' must continue with an assistant turn after the prompt, "
            f"got one of the {turns[0].role}{f' at {name}[{shared}]' if shared else ''}"
        )
    if not any(turn.train for turn in turns if turn.role == "assistant"):
        raise InputError(f"{where}: field '{name}' must have a turn to train on, got 'train': false in all")
    return turns


def _split_common_start(conversations: list[Turns], where: str) -> tuple[Turns, list[Turns]]:
    """Split two conversations into their longest common start and the rest of each."""
    chosen, rejected = ([turn.for_template() for turn in turns] for turns in conversations)
    if chosen == rejected:
        raise InputError(f"{where}: field 'rejected' must differ from 'chosen', got the same")
    both = min(len(chosen), len(rejected))
    shared = next((i for i in range(both) if chosen[i] != rejected[i]), both)
    if not shared:
        raise InputError(
            f"{where}: fields 'chosen' and 'rejected' must start with the same turns (the prompt), "
            f"got {shown(chosen[0]['content'])} and {shown(rejected[0]['content'])}"
        )
    for name, turns in zip(PAIR, conversations, strict=True):
        if len(turns) == shared:
            raise InputError(
                f"{where}: field '{name}' must continue after the turns that both share, got none"
            )
    rests = [
        _require_answer(turns[shared:], where, name, shared)
        for name, turns in zip(PAIR, conversations, strict=True)
    ]
    return conversations[0][:shared], rests


def _hh_turns(record: RawRecord, name: str, where: str) -> Turns:
    value = text(record, name, where)
    before, *parts = _HH_SPEAKER.split(value)
    if before.strip() or not parts:
        raise InputError(
            f"{where}: field '{name}' must have the form '\\n\\nHuman: ...\\n\\nAssistant: ...' "
            f"(or come with a 'prompt'), got {shown(value)}"
        )
    spoken = zip(parts[::2], parts[1::2], strict=True)
    return tuple(
        require_content(Message(_HH_ROLES[speaker], content.strip()), where, f"{name} turn {i}")
        for i, (speaker, content) in enumerate(spoken, start=1)
    )


def _tools(record: RawRecord, where: str, prompt: Turns | str) -> Tools:
    """Return the record's tools; plain text has none."""
    tools = tools_of(record, where)
    if not isinstance(prompt, str):
        return tools
    if tools:
        raise InputError(f"{where}: field 'tools' needs a prompt of messages, got a plain text prompt")
    return None


def _key(answer: Turns | str) -> str:
    """Return what distinguishes two completions (whether a turn is trained does not)."""
    return answer if isinstance(answer, str) else repr([turn.for_template() for turn in answer])
