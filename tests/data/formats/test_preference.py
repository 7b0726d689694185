"""Pairs, ranked lists and labelled completions are read as written; any error is one line with file, line and field."""

import copy
import json
from contextlib import suppress

import pyarrow as pa
import pytest
from pyarrow import parquet

from megatron_align.data.formats.files import read_file
from megatron_align.errors import InputError
from megatron_align.records import Message, Preference
from tests.data.reading import read_records

ASK, GOOD, POOR = (
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "good"},
    {"role": "assistant", "content": "poor"},
)
TOOL = {"type": "function", "function": {"name": "f"}}
HH = "\n\nHuman: q\n\nAssistant: a\n\nHuman: q2\n\nAssistant:"


def turns(*messages):
    return tuple(Message(m["role"], m["content"]) for m in messages)


def said(*pairs):
    return [{"from": speaker, "value": value} for speaker, value in pairs]


TEXT = {"prompt": "q", "chosen": "good", "rejected": "poor"}
CHAT = {"prompt": [ASK], "chosen": [GOOD], "rejected": [POOR]}
WHOLE = {"chosen": [ASK, GOOD], "rejected": [ASK, POOR]}
HUMAN = {"chosen": f"{HH} good", "rejected": f"{HH} poor"}
SHAREGPT = {
    "conversations": said(("human", "q")),
    "chosen": {"from": "gpt", "value": "good"},
    "rejected": {"from": "gpt", "value": "poor"},
}
ALPACA = {"instruction": "q", "chosen": "good", "rejected": "poor"}
TRIPLE = {**TEXT, "reference": "gold"}
TRIPLE_CHAT = {**CHAT, "reference": [GOOD]}
RANKED = {
    "prompt": "q",
    "completions": [{"content": c, "score": s} for c, s in (("a", 1), ("b", 0.5), ("c", -2))],
}
RANKED_CHAT = {
    "prompt": [ASK],
    "completions": [{"content": [GOOD], "score": 1.0}, {"content": [POOR], "score": 0}],
}
JUDGED = {"prompt": "q", "completion": "good", "label": True}
JUDGED_CHAT = {"prompt": [ASK], "completion": [POOR], "label": False}
JUDGED_TALK = {"messages": [ASK, GOOD], "label": True}
JUDGED_SHAREGPT = {"conversations": said(("human", "q"), ("gpt", "poor")), "kto_tag": False}
JUDGED_ALPACA = {"instruction": "q", "output": "good", "kto_tag": True}

BOTH = (turns(GOOD), turns(POOR))
READ = {
    "pair_text": (TEXT, "q", ("good", "poor")),
    "pair_messages": (CHAT, turns(ASK), BOTH),
    "pair_conversations": (WHOLE, turns(ASK), BOTH),
    "pair_hh_rlhf": (
        HUMAN,
        turns(ASK, {**GOOD, "content": "a"}, {**ASK, "content": "q2"}),
        BOTH,
    ),
    "pair_sharegpt": (SHAREGPT, turns(ASK), BOTH),
    "pair_alpaca": (ALPACA, turns(ASK), BOTH),
    "triple_text": (TRIPLE, "q", ("good", "poor", "gold")),
    "triple_messages": (TRIPLE_CHAT, turns(ASK), (*BOTH, BOTH[0])),
    "ranked_text": (RANKED, "q", ("a", "b", "c")),
    "ranked_messages": (RANKED_CHAT, turns(ASK), BOTH),
    "unpaired_text": (JUDGED, "q", ("good",)),
    "unpaired_messages": (JUDGED_CHAT, turns(ASK), BOTH[1:]),
    "unpaired_conversation": (JUDGED_TALK, turns(ASK), BOTH[:1]),
    "unpaired_sharegpt": (JUDGED_SHAREGPT, turns(ASK), BOTH[1:]),
    "unpaired_alpaca": (JUDGED_ALPACA, turns(ASK), BOTH[:1]),
}


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_every_shape(name, suffix, jsonl, tmp_path):
    raw, prompt, completions = READ[name]
    if suffix == "jsonl":
        path = jsonl([raw, {**raw, "weight": 2}])
    else:
        path = str(tmp_path / "rows.parquet")
        parquet.write_table(pa.Table.from_pylist([{**raw, "weight": w} for w in (None, 2)]), path)
    shape, records = read_file(path)
    kind = name.split("_")[0]
    assert (shape.name, shape.kind) == (name, kind)
    record, heavy = records
    assert isinstance(record, Preference)
    assert (record.kind, record.prompt, record.completions) == (kind, prompt, completions)
    assert (record.weight, heavy.weight) == (1.0, 2.0)
    assert record.label == raw.get("label", raw.get("kto_tag"))
    assert record.scores == tuple(float(c["score"]) for c in raw.get("completions", ()))
    assert record.margin is None
    assert [r.prompt for r in read_file(path, name)[1]] == [r.prompt for r in read_file(path, kind)[1]]


@pytest.mark.parametrize("names", [("chosen_score", "rejected_score"), ("score_chosen", "score_rejected")])
def test_scores_and_margin(names, jsonl):
    one, half, none = read_records(
        jsonl(
            [
                {**TEXT, names[0]: 4, names[1]: 2.5, "margin": 1},
                {**TEXT, names[1]: 2},
                {**TEXT, names[0]: None},
            ]
        )
    )
    assert (one.scores, one.margin) == ((4.0, 2.5), 1.0)
    assert (half.scores, half.margin) == ((None, 2.0), None)
    assert none.scores == ()


def test_a_string_answers_messages_as_one_turn(jsonl):
    answers = [{"content": "good", "score": 1}, {"content": [POOR], "score": 0}]
    for i, raw in enumerate(({**CHAT, "chosen": "good"}, {"prompt": [ASK], "completions": answers})):
        (record,) = read_records(jsonl([raw], f"{i}.jsonl"))
        assert record.completions == BOTH


def test_ultrafeedback(jsonl):
    record = {
        "prompt": "q",
        "prompt_id": "7",
        "messages": [ASK, GOOD],
        **WHOLE,
        "score_chosen": 8,
        "score_rejected": 6,
    }
    shape, (read,) = read_file(jsonl([record]))
    assert shape.name == "pair_conversations"
    assert (read.prompt, read.completions, read.scores) == (turns(ASK), BOTH, (8.0, 6.0))


def test_two_conversations_part_at_their_first_different_turn(jsonl):
    system = {"role": "system", "content": "s"}
    start = [system, ASK, GOOD, ASK]
    (record,) = read_records(jsonl([{"chosen": [*start, POOR, ASK, GOOD], "rejected": [*start, GOOD]}]))
    assert record.prompt == turns(*start)
    assert record.completions == (turns(POOR, ASK, GOOD), turns(GOOD))


def test_hh_rlhf_keeps_neighbouring_turns_apart_and_line_breaks_within(jsonl):
    odd = "\n\nHuman: q\n\nAssistant: a\n\nAssistant:  b\n\nc\nHuman: d"
    (record,) = read_records(jsonl([{"chosen": odd, "rejected": "\n\nHuman: q\n\nAssistant: a2"}]))
    assert [(m.role, m.content) for m in record.prompt] == [("user", "q")]
    assert [m.content for m in record.completions[0]] == ["a", "b\n\nc\nHuman: d"]
    assert [m.content for m in record.completions[1]] == ["a2"]


def test_tools_and_untrained_turns(jsonl):
    quiet = {**GOOD, "train": False}
    chat = {**CHAT, "chosen": [quiet, ASK, GOOD], "tools": json.dumps([TOOL])}
    (record,) = read_records(jsonl([chat]))
    assert record.tools == (TOOL,)
    assert [m.train for m in record.completions[0]] == [False, True, True]
    (record,) = read_records(jsonl([{**SHAREGPT, "tools": [{"name": "f"}], "system": "s"}], "b.jsonl"))
    assert record.tools == (TOOL,)
    assert record.prompt[0] == Message("system", "s")


def but(record, **more):
    return [{**copy.deepcopy(record), **more}]


def ranked(*completions, prompt="q"):
    return [{"prompt": prompt, "completions": list(completions)}]


ONE, TWO = {"content": "a", "score": 1}, {"content": "b", "score": 2}
BAD = {
    # nothing said, or the same twice
    "empty chosen": (but(TEXT, chosen=""), "field 'chosen' must not be empty, got ''"),
    "blank rejected": (but(TEXT, rejected=" \n"), "field 'rejected' must not be empty, got ' .n'"),
    "empty prompt": (but(TEXT, prompt=""), "field 'prompt' must not be empty"),
    "equal": (but(TEXT, rejected="good"), "field 'rejected' must differ from 'chosen', got the same"),
    "equal messages": (but(CHAT, rejected=[{**GOOD, "train": True}]), "'rejected' must differ from 'chosen'"),
    "equal conversations": (but(WHOLE, rejected=[ASK, GOOD]), "'rejected' must differ from 'chosen'"),
    "equal hh": (but(HUMAN, rejected=f"{HH} good "), "'rejected' must differ from 'chosen'"),
    "equal sharegpt": (but(SHAREGPT, rejected=SHAREGPT["chosen"]), "'rejected' must differ from 'chosen'"),
    "empty message": (
        but(CHAT, chosen=[{**GOOD, "content": ""}]),
        "'chosen\\[0\\].content' must not be empty",
    ),
    "empty hh turn": (
        but(HUMAN, chosen=f"{HH} "),
        "'chosen turn 4' must not be empty in a turn of the assistant",
    ),
    "empty sharegpt": (
        but(SHAREGPT, chosen={"from": "gpt", "value": ""}),
        "'chosen.value' must not be empty",
    ),
    "empty list": (but(CHAT, chosen=[]), "field 'chosen' must be a non-empty list"),
    "empty string to messages": (but(CHAT, chosen=" "), "field 'chosen' must not be empty"),
    "empty judged": (but(JUDGED, completion=""), "field 'completion' must not be empty"),
    "empty ranked": (
        ranked(ONE, {"content": "", "score": 0}),
        "'completions\\[1\\].content' must not be empty",
    ),
    "duplicate": (
        ranked(ONE, TWO, {**ONE, "score": 3}),
        "'completions\\[2\\].content' must differ from completions\\[0\\]",
    ),
    "duplicate messages": (
        ranked({"content": [GOOD], "score": 1}, {"content": "good", "score": 2}, prompt=[ASK]),
        "'completions\\[1\\].content' must differ from completions\\[0\\]",
    ),
    "one completion": (ranked(ONE), "field 'completions' must hold at least 2 completions, got 1"),
    "no completion": (ranked(), "field 'completions' must be a non-empty list"),
    # scores and labels
    "score nan": (
        ['{"prompt": "q", "completions": [{"content": "a", "score": NaN}, {}]}'],
        "score' .* finite .* nan",
    ),
    "score infinite": (
        ranked(ONE, {**TWO, "score": -1e999}),
        "'completions\\[1\\].score' must be a finite number",
    ),
    "score text": (ranked(ONE, {**TWO, "score": "2"}), "score' must be a finite number, got '2'"),
    "score boolean": (ranked(ONE, {**TWO, "score": True}), "score' must be a finite number, got true"),
    "no score": (
        ranked(ONE, {"content": "b"}),
        "'completions\\[1\\].score' must be a finite number, got nothing",
    ),
    "chosen_score": (but(TEXT, chosen_score="8"), "field 'chosen_score' must be a finite number, got '8'"),
    "score_rejected": (
        but(TEXT, score_rejected=1e999),
        "field 'score_rejected' must be a finite number, got inf",
    ),
    "both scores": (
        but(TEXT, chosen_score=1, score_chosen=1),
        "'chosen_score' and 'score_chosen' must not both",
    ),
    "margin": (but(TEXT, margin="large"), "field 'margin' must be a finite number, got 'large'"),
    "margin nan": (
        ['{"prompt": "q", "chosen": "a", "rejected": "b", "margin": NaN}'],
        "'margin' must be a finite",
    ),
    "label number": (but(JUDGED, label=2), "field 'label' must be true or false, got 2"),
    "label text": (but(JUDGED_TALK, label="true"), "field 'label' must be true or false, got 'true'"),
    "label null": (but(JUDGED_CHAT, label=None), "field 'label' must be true or false, got nothing"),
    "kto_tag": (but(JUDGED_SHAREGPT, kto_tag=-1), "field 'kto_tag' must be true or false, got -1"),
    "two labels": (but(JUDGED, kto_tag=False), "'label' and 'kto_tag' must not both be given"),
    # text that no tokenizer takes
    "NUL": (but(TEXT, chosen="a\0"), "field 'chosen' must not contain NUL"),
    "NUL in hh": (but(HUMAN, chosen=f"{HH} \0"), "field 'chosen' must not contain NUL"),
    "NUL in ranked": (
        ranked(ONE, {**TWO, "content": "\0"}),
        "'completions\\[1\\].content' must not contain NUL",
    ),
    "surrogate": (
        ['{"prompt": "q", "chosen": "\\udfff", "rejected": "b"}'],
        "'chosen' must be valid Unicode",
    ),
    "surrogate in a turn": (
        [
            '{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "\\ud800"}], "label": true}'
        ],
        "'conversations\\[1\\].value' must be valid Unicode",
    ),
    # wrong types
    "prompt of wrong type": (but(TEXT, prompt=5), "field 'prompt' must be a string, got 5"),
    "prompt null": (but(TEXT, prompt=None), "field 'prompt' must be a string, got nothing"),
    "chosen of wrong type": (but(TEXT, chosen=["a"]), "field 'chosen' must be a string, got \\['a'\\]"),
    "rejected null": (but(TEXT, rejected=None), "field 'rejected' must be a string, got nothing"),
    "message of wrong type": (
        but(CHAT, rejected=["a"]),
        "'rejected\\[0\\]' must be an object with role and content",
    ),
    "conversation of wrong type": (
        but(WHOLE, rejected="a"),
        "field 'rejected' must be a non-empty list, got 'a'",
    ),
    "turn of wrong type": (but(SHAREGPT, chosen="good"), "'chosen' must be an object with from and value"),
    "ranked item": (ranked(ONE, "b"), "'completions\\[1\\]' must be an object with content and score"),
    "ranked content": (
        ranked(ONE, {"score": 1}),
        "'completions\\[1\\].content' must be a string, got nothing",
    ),
    "ranked messages to text": (
        ranked(ONE, {**TWO, "content": [GOOD]}),
        "'completions\\[1\\].content' must be a str",
    ),
    "completions of wrong type": (
        [{"prompt": "q", "completions": {}}],
        "'completions' must be a non-empty list",
    ),
    "tools to text": (but(TEXT, tools=[TOOL]), "field 'tools' needs a prompt of messages"),
    "weight": (but(TEXT, weight=0), "field 'weight' must be positive"),
    "template options": (
        but(CHAT, chat_template_kwargs={"a": 1}),
        "'chat_template_kwargs' is not supported yet",
    ),
    # what is prompt and what is answer
    "nothing shared": (
        but(WHOLE, rejected=[{**ASK, "content": "other"}, POOR]),
        "must start with the same turns",
    ),
    "hh nothing shared": (
        but(HUMAN, rejected="\n\nHuman: x\n\nAssistant: y"),
        "must start with the same turns",
    ),
    "answers only": (but(WHOLE, chosen=[GOOD], rejected=[POOR]), "must start with the same turns"),
    "triple, no choice": (but(TRIPLE, rejected="good"), "'rejected' must differ from 'chosen'"),
    "gold of wrong type": (
        but(TRIPLE_CHAT, reference=7),
        "field 'reference' must be a non-empty list, got 7",
    ),
    "no more after the start": (
        but(WHOLE, rejected=[ASK]),
        "field 'rejected' must continue after the turns that both",
    ),
    "users differ": (
        but(WHOLE, chosen=[ASK, GOOD, ASK, GOOD], rejected=[ASK, GOOD, {**ASK, "content": "x"}, POOR]),
        "'chosen' must continue with an assistant turn after the prompt, got one of the user at chosen\\[2\\]",
    ),
    "user answers": (
        but(CHAT, chosen=[ASK, GOOD]),
        "'chosen' must continue with an assistant turn after the prompt",
    ),
    "user is judged": (
        but(JUDGED_TALK, messages=[ASK, GOOD, ASK]),
        "'messages\\[-1\\]' must continue with an assistant",
    ),
    "no prompt": (
        but(JUDGED_TALK, messages=[GOOD]),
        "'messages' must have turns before the judged one, got 1",
    ),
    "untrained": (but(CHAT, chosen=[{**GOOD, "train": False}]), "'chosen' must have a turn to train on"),
    "not hh": (but(HUMAN, chosen="good"), "'chosen' must have the form .* got 'good'"),
    "text before hh": (but(HUMAN, chosen="x\n\nHuman: q\n\nAssistant: a"), "'chosen' must have the form"),
    # fields
    "no rejected": ([{"prompt": "q", "chosen": "a"}], "must have the fields of a known shape"),
}


@pytest.mark.parametrize("lines, expected", BAD.values(), ids=list(BAD))
def test_bad_records_are_named_and_may_be_skipped(jsonl, lines, expected):
    path = jsonl(lines)
    with pytest.raises(InputError, match=expected) as error:
        list(read_file(path)[1])
    message = str(error.value)
    assert message.startswith(f"{path}:1: ")
    assert "\n" not in message
    told = []
    with suppress(InputError):  # of a file without one well-formed record
        assert not list(read_file(path, on_bad=told.append)[1])
    assert [str(error) for error in told] == [message]


def test_a_bad_pair_among_good_ones_is_left_out(jsonl):
    told = []
    records = read_file(jsonl([TEXT, {**TEXT, "rejected": "good"}, TEXT]), on_bad=told.append)[1]
    assert [record.where.rsplit(":", 1)[1] for record in records] == ["1", "3"]
    assert len(told) == 1


@pytest.mark.parametrize(
    "first, second, found",
    [
        (TEXT, CHAT, "pair_messages"),
        (TEXT, JUDGED, "unpaired_text"),
        (JUDGED_TALK, {"messages": [ASK, GOOD]}, "messages"),
    ],
)
def test_mixed_shapes_are_an_error(first, second, found, jsonl):
    path = jsonl([first, second])
    with pytest.raises(InputError, match=f"{path}:2: must be of shape .* got '{found}'"):
        list(read_file(path, on_bad=pytest.fail)[1])


def test_a_named_shape_tells_what_is_wrong_with_its_fields(jsonl):
    path = jsonl([CHAT])
    with pytest.raises(InputError, match=f"{path}:1: field 'prompt' must be a string, got"):
        list(read_file(path, "pair_text")[1])
