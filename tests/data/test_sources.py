"""Records are read as written, in the shapes people have; whatever is wrong is one line with its place."""

import gzip
import json
import os
from pathlib import Path

import pytest

from megatron_align.data.sources import read_conversations, read_file
from megatron_align.errors import InputError
from megatron_align.records import Completion

DATA = Path(os.environ.get("MEGATRON_ALIGN_DATA") or Path(__file__).parents[2].parent / "shared" / "data")
ASK, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def turns(record):
    return [(m.role, m.content) for m in record.messages]


def only(path):
    (record,) = read_conversations(path)
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
    plain, full, short = read_conversations(jsonl(records))
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


def test_every_container_gives_the_same_records(jsonl, tmp_path):
    records = [{"prompt": "é\u2028 ", "completion": str(i)} for i in range(3)]
    lines = jsonl(records, "lines.jsonl")
    jsonl(["\ufeff" + json.dumps(records[0]), "", *map(json.dumps, records[1:])], "bom.jsonl")
    jsonl(records, "lines.json")
    for name, text in (("array.json", json.dumps(records)), ("pretty.json", json.dumps(records, indent=1))):
        (tmp_path / name).write_text(f"\n {text}\n")
    with gzip.open(tmp_path / "lines.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(Path(lines).read_text(encoding="utf-8"))
    names = ("lines.jsonl", "bom.jsonl", "lines.json", "array.json", "pretty.json", "lines.jsonl.gz")
    read = {n: [(r.prompt, r.completion) for r in read_conversations(str(tmp_path / n))] for n in names}
    assert all(value == [("é\u2028 ", str(i)) for i in range(3)] for value in read.values()), read


def test_places(jsonl, tmp_path):
    lines = jsonl(["", json.dumps({"prompt": "p", "completion": "c"})])
    array = tmp_path / "array.json"
    array.write_text(json.dumps([{"prompt": "p", "completion": "c"}] * 2))
    places = [record.where for record in read_conversations([lines, str(array)])]
    assert places == [f"{lines}:2", f"{array}: record 1", f"{array}: record 2"]


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
        [{"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ANSWER]}],
        "'messages\\[0\\].content' must be a string, got \\[",
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
        "field 'system' must not stand beside",
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
        list(read_conversations(path))
    message = str(error.value)
    assert message.startswith(f"{path}:{len(lines)}: ")
    assert "\n" not in message


BAD_FILES = {
    "empty.jsonl": (b"\n\n", "must hold at least one record"),
    "empty.json": (b"[]", "must hold at least one record"),
    "cut.json": (b'[{"prompt": "p", "completion": "c"},\n {"a"', ":2: record 2 must be JSON"),
    "open.json": (b'[{"prompt": "p", "completion": "c"}', "record 1: must be followed by ',' or '\\]', got"),
    "more.json": (b'[{"prompt": "p", "completion": "c"}] x', "must end after its JSON array"),
    "not_gzip.jsonl.gz": (b"{}", "could not be read"),
    "cut.jsonl.gz": (gzip.compress(b"{}" * 1000)[:-12], "could not be read"),
    "latin.jsonl": (b'{"prompt": "\xe9"}', "must be UTF-8 text"),
    "data.csv": (b"a,b", "must end in one of .jsonl"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_named(tmp_path, name):
    content, expected = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=expected) as error:
        list(read_conversations(str(tmp_path / name)))
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path / 'no.jsonl'}: must be a data file, found nothing"):
        list(read_conversations(str(tmp_path / "no.jsonl")))
    with pytest.raises(InputError, match=f"{tmp_path}: must be a data file, found a folder"):
        read_file(str(tmp_path))
    with pytest.raises(InputError, match="at least one file"):
        read_conversations([])


@pytest.mark.parametrize(
    "name, shape, count",
    [
        ("alpaca_en_demo", "alpaca", 999),
        ("alpaca_zh_demo", "alpaca", 1000),
        ("glaive_toolcall_en_demo", "sharegpt", 300),
    ],
)
def test_real_files(name, shape, count):
    path = DATA / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"{path.name} is not on this machine")
    found, records = read_file(str(path))
    records = list(records)
    assert (found.name, len(records)) == (shape, count)
    assert all(record.messages[-1].role == "assistant" for record in records)
