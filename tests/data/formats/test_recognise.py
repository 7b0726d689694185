"""Chat records are read as written, in every documented shape; any error is one line with file, line and field."""

import json

import pytest

from megatron_align.data.formats.files import read_file
from megatron_align.data.formats.recognise import SHAPES, shapes_named
from megatron_align.errors import InputError
from megatron_align.records import Completion
from tests.data.reading import read_records

ASK, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def turns(record):
    return [(m.role, m.content) for m in record.messages]


def only(path):
    (record,) = read_records(path)
    return record


def test_messages(jsonl):
    messages = [
        {"role": "system", "content": ""},
        ASK,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "", "name": "f"},
        ANSWER,
    ]
    record = only(jsonl([{"messages": messages, "tools": [{"name": "f"}], "id": 7}]))
    assert turns(record) == [
        ("system", ""),
        ("user", "q"),
        ("assistant", ""),
        ("tool", ""),
        ("assistant", "a"),
    ]
    assert record.messages[2].for_template()["tool_calls"] == [CALL]
    assert record.messages[3].extra == {"name": "f"}
    assert record.tools == ({"name": "f"},)
    assert record.prompt_messages is None


def test_trailing_user_turns_are_context(jsonl):
    assert turns(only(jsonl([{"messages": [ASK, ANSWER, ASK]}])))[-1] == ("user", "q")


def test_sharegpt(jsonl):
    said = [
        ("human", "q"),
        ("function_call", '{"name": "f", "arguments": {"x": 1}}'),
        ("observation", "{}"),
        ("gpt", "a"),
    ]
    conversations = [{"from": speaker, "value": value} for speaker, value in said]
    tool = {"name": "f", "parameters": {}}
    record = only(jsonl([{"conversations": conversations, "system": "s", "tools": json.dumps([tool])}]))
    assert turns(record) == [
        ("system", "s"),
        ("user", "q"),
        ("assistant", ""),
        ("tool", "{}"),
        ("assistant", "a"),
    ]
    assert record.messages[2].extra == {"tool_calls": [CALL]}
    assert record.tools == ({"type": "function", "function": tool},)


def test_alpaca(jsonl):
    records = [
        {"instruction": "q", "input": "", "output": "a"},
        {"instruction": "q", "input": "i", "output": "a", "system": "s", "history": [["q0", "a0"]]},
        {"instruction": "q", "output": "a", "history": None},
    ]
    plain, full, short = read_records(jsonl(records))
    assert turns(plain) == turns(short) == [("user", "q"), ("assistant", "a")]
    assert turns(full) == [
        ("system", "s"),
        ("user", "q0"),
        ("assistant", "a0"),
        ("user", "q\ni"),
        ("assistant", "a"),
    ]


def test_prompt_and_completion(jsonl):
    path = jsonl([{"prompt": "p", "completion": " c"}])
    assert only(path) == Completion("p", " c", f"{path}:1")
    record = only(jsonl([{"prompt": [ASK], "completion": [ANSWER]}], "chat.jsonl"))
    assert (turns(record), record.prompt_messages) == ([("user", "q"), ("assistant", "a")], 1)


def test_the_shape_has_a_name(jsonl):
    shape, records = read_file(jsonl([{"messages": [ASK, ANSWER]}]))
    assert shape.name == "messages"
    assert len(list(records)) == 1


def said(*pairs, **more):
    return {"conversations": [{"from": speaker, "value": value} for speaker, value in pairs], **more}


GOOD = {"messages": [ASK, ANSWER]}
BAD = {
    "broken line": ([GOOD, '{"messages": ['], ":2: must be a line of JSON"),
    "not an object": ([GOOD, [1]], ":2: a record must be a JSON object, got list"),
    "deep": (["[" * 100_000], ":1: must be a line of JSON, got one nested too deep"),
    "unknown shape": ([{"text": "t"}], ":1: must have the fields of a known shape .* got \\['text'\\]"),
    "two shapes": ([{**GOOD, "conversations": []}], ":1: .* got those of 'messages', 'sharegpt'"),
    "shape changes": ([GOOD, {"prompt": "p", "completion": "c"}], ":2: .* 'messages' .* 'prompt_completion'"),
    "no assistant": ([{"messages": [ASK]}], ":1: the conversation must have an assistant turn"),
    "no turns": ([{"messages": []}], ":1: field 'messages' must be a non-empty list"),
    "turns of wrong type": ([{"messages": "hi"}], ":1: field 'messages' must be a non-empty list, got 'hi'"),
    "turn of wrong type": ([{"messages": ["hi"]}], "field 'messages\\[0\\]' must be an object"),
    "unknown role": (
        [{"messages": [{"role": "asistant", "content": "a"}]}],
        "messages\\[0\\].role.*must be one of system, .* got 'asistant'; did you mean 'assistant'",
    ),
    "no role": ([{"messages": [{"content": "a"}]}], "'messages\\[0\\].role' must be a string, got nothing"),
    "empty user": (
        [{"messages": [{**ASK, "content": " "}, ANSWER]}],
        "must not be empty in a turn of the user",
    ),
    "empty assistant": (
        [{"messages": [ASK, {**ANSWER, "content": ""}]}],
        "'messages\\[1\\].content' must not be empty in a turn of the assistant",
    ),
    "empty calls": ([{"messages": [ASK, {**ANSWER, "content": "", "tool_calls": []}]}], "must not be empty"),
    "no content": ([{"messages": [{"role": "user"}, ANSWER]}], "'messages\\[0\\].content' must be a string"),
    "content of wrong type": (
        [{"messages": [{"role": "user", "content": {"text": "q"}}, ANSWER]}],
        "'messages\\[0\\].content' must be a string, got {",
    ),
    "calls of wrong type": (
        [{"messages": [ASK, {**ANSWER, "tool_calls": "f"}]}],
        "tool_calls' must be a list",
    ),
    "user calls": (
        [{"messages": [{**ASK, "tool_calls": [CALL]}, ANSWER]}],
        "must belong to an assistant turn",
    ),
    "tools of wrong type": ([{**GOOD, "tools": {"name": "f"}}], "field 'tools' must be a list of objects"),
    "tools not JSON": ([{**GOOD, "tools": "[f"}], "field 'tools' must be JSON"),
    "half a surrogate": (
        ['{"prompt": "p", "completion": "\\ud800"}'],
        "field 'completion' must be valid Unicode",
    ),
    "unknown speaker": ([said(("bot", "a"))], "'conversations\\[0\\].from' must be one of human"),
    "value of wrong type": ([said(("human", 1))], "'conversations\\[0\\].value' must be a string, got 1"),
    "empty value": ([said(("human", ""), ("gpt", "a"))], "'conversations\\[0\\].value' must not be empty"),
    "call not JSON": (
        [said(("human", "q"), ("function_call", "f()"))],
        "'conversations\\[1\\].value' must be JSON",
    ),
    "call without name": ([said(("human", "q"), ("function_call", "{}"))], "JSON with name and arguments"),
    "two systems": (
        [said(("system", "s"), ("gpt", "a"), system="s")],
        "field 'system' must not be given with",
    ),
    "empty instruction": ([{"instruction": "", "output": "a"}], "field 'instruction' must not be empty"),
    "empty output": ([{"instruction": "q", "output": ""}], "field 'output' must not be empty"),
    "output of wrong type": ([{"instruction": "q", "output": 3}], "field 'output' must be a string, got 3"),
    "history of wrong type": (
        [{"instruction": "q", "output": "a", "history": [["q"]]}],
        "field 'history\\[0\\]' must be a \\[question, answer\\] pair",
    ),
    "empty completion": ([{"prompt": "p", "completion": ""}], "field 'completion' must not be empty"),
    "completion of wrong type": ([{"prompt": "p", "completion": [ANSWER]}], "'completion' must be a string"),
    "chat completion of wrong type": (
        [{"prompt": [ASK], "completion": "a"}],
        "'completion' must be a non-empty",
    ),
    "no assistant in completion": (
        [{"prompt": [ASK, ANSWER], "completion": [ASK]}],
        "the completion must have",
    ),
    "template options": (
        [{**GOOD, "chat_template_kwargs": {"a": 1}}],
        "'chat_template_kwargs' is not supported yet",
    ),
}


@pytest.mark.parametrize("lines, expected", BAD.values(), ids=list(BAD))
def test_bad_records_are_named(jsonl, lines, expected):
    path = jsonl(lines)
    with pytest.raises(InputError, match=expected) as error:
        list(read_records(path))
    message = str(error.value)
    assert message.startswith(f"{path}:{len(lines)}: ")
    assert "\n" not in message


# What is trained on, and how much it weighs.
def test_turns_and_samples_may_weigh(jsonl):
    talk = [
        ASK,
        {**ANSWER, "train": False},
        ASK,
        {**ANSWER, "weight": 0},
        ASK,
        {**ANSWER, "weight": 1, "train": True},
        {**ASK, "train": False},
    ]
    record = only(jsonl([{"messages": talk, "weight": 2}]))
    assert [m.train for m in record.messages] == [True, False, True, False, True, True, False]
    assert all(not m.extra for m in record.messages)  # the chat template does not see the flags
    assert record.weight == 2.0
    others = [
        {"prompt": "p", "completion": "c", "weight": 0.5},
        {"instruction": "q", "output": "a", "weight": 0.5},
        said(("human", "q"), ("gpt", "a"), weight=0.5),
        {"prompt": [ASK], "completion": [ANSWER], "weight": 0.5},
    ]
    for i, other in enumerate(others):
        assert only(jsonl([other], f"{i}.jsonl")).weight == 0.5
    assert only(jsonl([{"prompt": "p", "completion": "c", "weight": None}], "none.jsonl")).weight == 1.0
    turn = {"from": "gpt", "value": "a", "train": False}
    record = only(jsonl([{"conversations": [*said(("human", "q"), ("gpt", "a"))["conversations"], turn]}]))
    assert [m.train for m in record.messages] == [True, True, False]


def with_turn(**more):
    return [{"messages": [ASK, ANSWER, ASK, {**ANSWER, **more}]}]


BAD_WEIGHTS = {
    "train of wrong type": (with_turn(train=0), "'messages\\[3\\].train' must be true or false, got 0"),
    "turn weight": (with_turn(weight=0.5), "'messages\\[3\\].weight' must be 0 or 1, got 0.5"),
    "turn weight of wrong type": (
        with_turn(weight=True),
        "'messages\\[3\\].weight' must be 0 or 1, got true",
    ),
    "both": (with_turn(weight=1, train=False), "'messages\\[3\\].weight' must agree with 'train'"),
    "trained user": (
        [{"messages": [{**ASK, "train": True}, ANSWER]}],
        "'messages\\[0\\].train' must belong to an assistant turn, got 'user'",
    ),
    "nothing trained": (
        [{"messages": [ASK, {**ANSWER, "train": False}]}],
        "must have an assistant turn to train on, got 'train': false .* in all 1",
    ),
    "nothing trained in the completion": (
        [{"prompt": [ASK, ANSWER, ASK], "completion": [{**ANSWER, "train": False}]}],
        "the completion must have an assistant turn to train on",
    ),
    "zero weight": ([{**GOOD, "weight": 0}], "field 'weight' must be positive, got 0"),
    "negative weight": ([{**GOOD, "weight": -1.5}], "field 'weight' must be positive, got -1.5"),
    "weight not a number": (
        ['{"prompt": "p", "completion": "c", "weight": NaN}'],
        "a finite number, got nan",
    ),
    "infinite weight": ([{**GOOD, "weight": 1e999}], "field 'weight' must be a finite number, got inf"),
    "huge weight": ([{**GOOD, "weight": 10**400}], "field 'weight' must be a finite number, got 1000"),
    "weight of wrong type": ([{**GOOD, "weight": "2"}], "field 'weight' must be a finite number, got '2'"),
    "weight a boolean": ([{**GOOD, "weight": True}], "field 'weight' must be a finite number, got true"),
    "NUL": (
        ['{"prompt": "p", "completion": "a\\u0000b"}'],
        "field 'completion' must not contain NUL, got one at 1",
    ),
    "NUL in a turn": (with_turn(content="\0"), "'messages\\[3\\].content' must not contain NUL"),
    "NUL in a call": (
        with_turn(tool_calls=[{"function": {"name": "f", "arguments": {"x": "\0"}}}]),
        "'messages\\[3\\].tool_calls\\[0\\].function.arguments.x' must not contain NUL",
    ),
    "NUL in tools": ([{**GOOD, "tools": [{"name": "\0"}]}], "'tools\\[0\\].name' must not contain NUL"),
    "surrogate in a turn": (
        ['{"messages": [{"role": "user", "content": "\\udc00"}]}'],
        "'messages\\[0\\].content' must be valid Unicode",
    ),
    "surrogate in a name": (
        ['{"messages": [{"role": "user", "content": "q", "name": "\\udc00"}]}'],
        "'messages\\[0\\].name' must be valid Unicode",
    ),
}


@pytest.mark.parametrize("lines, expected", BAD_WEIGHTS.values(), ids=list(BAD_WEIGHTS))
def test_bad_weights_and_texts_are_named(jsonl, lines, expected):
    test_bad_records_are_named(jsonl, lines, expected)


# The name of the shape.
def test_a_named_shape_is_taken_where_several_would_fit(jsonl):
    both = {**GOOD, **said(("human", "other"), ("gpt", "a")), "label": "music"}
    path = jsonl([both, both])
    assert {record.messages[0].content for record in read_file(path, "messages")[1]} == {"q"}
    assert {record.messages[0].content for record in read_file(path, "sharegpt")[1]} == {"other"}
    judged = jsonl([{"prompt": "p", "completion": "c", "label": False}], "judged.jsonl")
    assert read_file(judged, "prompt_completion")[0].kind == "chat"
    assert read_file(judged)[0].kind == "unpaired"


def test_a_kind_may_be_named(jsonl):
    path = jsonl([{**GOOD, "label": True}])
    for kind, name in (("chat", "messages"), ("unpaired", "unpaired_conversation")):
        shape, records = read_file(path, kind)
        assert (shape.name, shape.kind) == (name, kind)
        assert len(list(records)) == 1


def test_another_shape_than_the_named_one_is_an_error(jsonl):
    path = jsonl([GOOD])
    for name in ("pair", "pair_text", "prompt_completion"):
        with pytest.raises(InputError, match=f"{path}:1: must be of shape '{name}.* got 'messages'"):
            read_file(path, name, on_bad=lambda error: None)
    with pytest.raises(
        InputError, match="data.shape must be one of .* got 'mesages'; did you mean 'messages'"
    ):
        read_file(path, "mesages")


def test_shape_names_are_one_word_each_and_no_kind():
    names = [shape.name for shape in SHAPES]
    assert len(set(names)) == len(names)
    assert not set(names) & {"pair", "ranked", "unpaired", "chat"}
    assert all(len(shapes_named(name)) == 1 for name in names)
