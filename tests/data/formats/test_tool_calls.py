"""A tool call is the same object however it is written, and a null means the same in every file format."""

import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from megatron_align.data.formats.files import read_file
from megatron_align.errors import InputError
from tests.data.reading import read_records

ASK, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
ARGUMENTS = {"harbour": "Brest", "day": 3, "list": [1, None], "deep": {"a": [{"b": "é"}]}}


def call(arguments, *, bare=False, name="tide"):
    function = {"name": name, "arguments": arguments}
    return function if bare else {"type": "function", "function": function}


def turn(*calls):
    return {"role": "assistant", "content": None, "tool_calls": list(calls)}


def function_call(value):
    return {"from": "function_call", "value": json.dumps(value)}


HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
SHAPES = {  # a record with the arguments, and where its message with the call is
    "messages": (lambda a: {"messages": [ASK, turn(call(a))]}, lambda r: r.messages[1]),
    "bare": (lambda a: {"messages": [ASK, turn(call(a, bare=True))]}, lambda r: r.messages[1]),
    "calls as text": (
        lambda a: {"messages": [ASK, {**turn(), "tool_calls": json.dumps([call(a)])}]},
        lambda r: r.messages[1],
    ),
    "messages as text": (
        lambda a: {"messages": json.dumps([ASK, turn(call(a))])},
        lambda r: r.messages[1],
    ),
    "sharegpt": (
        lambda a: {"conversations": [HUMAN, function_call({"name": "tide", "arguments": a})]},
        lambda r: r.messages[1],
    ),
    "sharegpt, list": (
        lambda a: {"conversations": [HUMAN, function_call([call(a)])]},
        lambda r: r.messages[1],
    ),
    "sharegpt with tool_calls": (
        lambda a: {"conversations": [HUMAN, {"from": "gpt", "value": "", "tool_calls": [call(a)]}]},
        lambda r: r.messages[1],
    ),
    "sharegpt, in tool_calls alone": (
        lambda a: {
            "conversations": [HUMAN, {"from": "function_call", "value": None, "tool_calls": [call(a)]}]
        },
        lambda r: r.messages[1],
    ),
    "sharegpt, twice": (
        lambda a: {
            "conversations": [
                HUMAN,
                {**function_call({"name": "tide", "arguments": a}), "tool_calls": [call(a)]},
            ]
        },
        lambda r: r.messages[1],
    ),
    "conversations with roles": (lambda a: {"conversations": [ASK, turn(call(a))]}, lambda r: r.messages[1]),
    "prompt and completion": (
        lambda a: {"prompt": [ASK], "completion": [turn(call(a))]},
        lambda r: r.messages[1],
    ),
    "in the prompt": (
        lambda a: {"prompt": [ASK, turn(call(a))], "chosen": [ANSWER], "rejected": "b"},
        lambda r: r.prompt[1],
    ),
    "chosen": (
        lambda a: {"prompt": [ASK], "chosen": [turn(call(a))], "rejected": [ANSWER]},
        lambda r: r.completions[0][0],
    ),
    "rejected conversation": (
        lambda a: {"chosen": [ASK, ANSWER], "rejected": [ASK, turn(call(a))]},
        lambda r: r.completions[1][0],
    ),
    "ranked": (
        lambda a: {
            "prompt": [ASK],
            "completions": [{"content": [turn(call(a))], "score": 1}, {"content": "b", "score": 0}],
        },
        lambda r: r.completions[0][0],
    ),
    "labelled": (lambda a: {"messages": [ASK, turn(call(a))], "label": 1}, lambda r: r.completions[0][0]),
}


@pytest.mark.parametrize("name", SHAPES)
def test_arguments_are_an_object_in_every_shape(name, jsonl):
    make, found = SHAPES[name]
    given = {
        "object": ARGUMENTS,
        "text": json.dumps(ARGUMENTS),
        "empty text": "",
        "blank text": " \n",
        "nothing": None,
    }
    for kind, arguments in given.items():
        (record,) = read_records(jsonl([make(arguments)], f"{kind}.jsonl"))
        (made,) = found(record).extra["tool_calls"]
        expected = ARGUMENTS if kind in ("object", "text") else {}
        assert made.get("function", made)["arguments"] == expected, kind
        assert ("function" in made) == (name != "bare")


def test_a_call_is_never_dropped_for_another_one(jsonl):
    twice = {**function_call({"name": "tide", "arguments": {}}), "tool_calls": [call({"day": 3})]}
    with pytest.raises(
        InputError, match="tool_calls' must be left out or give the calls of 'conversations.1..value'"
    ):
        list(read_records(jsonl([{"conversations": [HUMAN, twice]}])))


@pytest.mark.parametrize("form", [HUMAN, ASK], ids=["sharegpt", "messages"])
def test_a_turn_of_reasoning_only_may_have_null_content_and_null_reasoning_is_none(jsonl, form):
    """Arrow writes nulls for what other turns have."""
    key = next(key for key, value in form.items() if value == "q")
    speaker = {"from": "gpt"} if key == "value" else {"role": "assistant"}
    thinks = {**speaker, key: None, "reasoning_content": "hm", "reasoning": None}
    (record,) = read_records(jsonl([{"conversations": [form, thinks]}]))
    assert (record.messages[1].content, record.messages[1].extra) == ("", {"reasoning_content": "hm"})
    silent = {**thinks, "reasoning_content": None}
    with pytest.raises(InputError, match=f"{key}' must be a string"):
        list(read_records(jsonl([{"conversations": [form, silent]}])))


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ("{", "arguments' must be JSON, got Expecting"),
        ("[1]", "arguments' must be a JSON object, got '\\[1\\]'"),
        ('"{}"', "arguments' must be a JSON object"),
        ("null", "arguments' must be a JSON object"),
        ("7", "arguments' must be a JSON object"),
        ([1], "arguments' must be an object, or its JSON text, got \\[1\\]"),
        (7, "arguments' must be an object, or its JSON text, got 7"),
        ('{"a": 1, "a": 2}', "arguments' must not repeat a key of an object, got 'a' twice"),
        ('{"a": NaN}', "arguments.a' must be a finite number, got nan"),
        ('{"a": [-Infinity]}', "arguments.a\\[0\\]' must be a finite number, got -inf"),
        ({"a": float("inf")}, "arguments.a' must be a finite number, got inf"),
        ('{"a": ' + "[" * 101 + "]" * 101 + "}", "must be nested at most 100 levels deep"),
        ('{"a": ' + "[" * 9999 + "]" * 9999 + "}", "got one nested too deeply"),
        ('{"a": "\\u0000"}', "arguments.a' must not contain NUL"),
    ],
)
@pytest.mark.parametrize("bare", [False, True])
def test_other_arguments_are_an_error_with_their_place(arguments, expected, bare, jsonl):
    path = jsonl([{"messages": [ASK, ANSWER]}, {"messages": [ASK, turn(call(arguments, bare=bare))]}])
    function = "" if bare else ".function"
    with pytest.raises(InputError, match=expected) as error:
        list(read_records(path))
    assert str(error.value).startswith(f"{path}:2: field 'messages[1].tool_calls[0]{function}")


@pytest.mark.parametrize(
    "bad", [{"arguments": {}}, {"function": "f"}, {"function": {"name": None}}, {"type": "custom"}]
)
def test_a_call_needs_a_name(bad, jsonl):
    with pytest.raises(InputError, match="tool_calls\\[0\\].* must be (a string|an object)"):
        list(read_records(jsonl([{"messages": [ASK, turn(bad)]}])))


def test_tools_and_their_schemas_may_be_text(jsonl):
    schema = {"type": "object", "properties": {"x": {"type": "string", "default": None}}}
    tools = [
        {"type": "function", "function": {"name": "f", "parameters": schema}},
        {"name": "g", "parameters": schema},
    ]
    texts = [
        {**tools[0], "function": {"name": "f", "parameters": json.dumps(schema)}},
        {"name": "g", "parameters": json.dumps(schema)},
    ]
    for i, given in enumerate([json.dumps(tools), [json.dumps(tool) for tool in tools], texts]):
        (record,) = read_records(jsonl([{"messages": [ASK, ANSWER], "tools": given}], f"{i}.jsonl"))
        assert list(record.tools) == tools
    with pytest.raises(InputError, match="field 'tools\\[1\\].parameters' must be JSON"):
        list(read_records(jsonl([{"messages": [ASK, ANSWER], "tools": [tools[0], {"parameters": "{"}]}])))


def aligned_rows():
    def row(tool, argument, arguments):
        schema = {"type": "object", "properties": {argument: {"type": "string"}}}
        function = {"name": tool, "parameters": schema}
        return {
            "tools": [{"type": "function", "function": function}],
            "messages": [ASK, turn(call(arguments, name=tool)), {"role": "tool", "content": "ok"}, ANSWER],
        }

    return [row("tide", "harbour", {"harbour": "Brest"}), row("bus", "line", {"line": "7"})]


def test_nulls_mean_the_same_in_every_format(jsonl, tmp_path):
    rows = aligned_rows()
    table = pa.Table.from_pylist(rows)
    assert table.to_pylist() != rows  # Arrow gives both tools both arguments
    parquet.write_table(table, tmp_path / "aligned.parquet")
    plain = list(read_records(jsonl(rows, "plain.jsonl")))
    array = tmp_path / "aligned.json"
    array.write_text(json.dumps(table.to_pylist(), indent=1))
    others = (str(tmp_path / "aligned.parquet"), jsonl(table.to_pylist(), "aligned.jsonl"), str(array))
    for path in others:
        for record, expected in zip(read_records(path), plain, strict=True):
            assert (record.tools, record.messages) == (expected.tools, expected.messages), path


def test_a_meant_null_is_kept_in_text_and_in_lists(jsonl, tmp_path):
    rows = [{"messages": [ASK, turn(call(json.dumps({"line": None, "stops": [None]})))]}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "text.parquet")
    for path in (jsonl(rows), str(tmp_path / "text.parquet")):
        (record,) = read_records(path)
        function = record.messages[1].extra["tool_calls"][0]["function"]
        assert function["arguments"] == {"line": None, "stops": [None]}


def test_unused_fields_may_hold_anything(jsonl):
    deep = "[" * 900 + "]" * 900
    record = (
        '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "x": %s}'
    )
    shape, records = read_file(
        jsonl([record % deep, record % "NaN", record % ('{"a": ' * 400 + "1" + "}" * 400)])
    )
    assert shape.name == "messages"
    assert len(list(records)) == 3
