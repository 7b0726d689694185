"""Files are read as users expect: CSV, wrapped and pretty-printed JSON, any Parquet column that is not used."""

import datetime
import decimal
import gzip
import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from megatron_align.data.formats.files import read_file
from megatron_align.data.formats.rules_version import rules_version
from megatron_align.errors import InputError
from tests.data.reading import read_records

ASK, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CHAT = {"messages": [ASK, ANSWER]}
TEXT = [{"prompt": f"p{i}", "completion": f"c {{}} [{i}]", "data": [{"x": 1}]} for i in range(3)]


def written(tmp_path, name, text):
    content = text if isinstance(text, bytes) else text.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return str(tmp_path / name)


JSON_FORMS = {
    "lines": "\n".join(map(json.dumps, TEXT)),
    "array": json.dumps(TEXT),
    "pretty array": json.dumps(TEXT, indent=2),
    "pretty objects": "\n".join(json.dumps(record, indent=2) for record in TEXT),
    "pretty objects in a row": "".join(json.dumps(record, indent="\t") for record in TEXT),
    "wrapped": json.dumps({"data": TEXT}),
    "wrapped, pretty": json.dumps({"data": TEXT}, indent=2),
    "wrapped after metadata": json.dumps(
        {"version": 1.25, "info": {"a": ["b"]}, "train": TEXT, "n": 3}, indent=1
    ),
    "wrapped under another name": json.dumps({"my_set": TEXT, "version": "1"}),
    "concatenated files with byte order marks": "\ufeff" + "\n\ufeff".join(map(json.dumps, TEXT)),
    "CRLF": "\r\n".join(map(json.dumps, TEXT)),
}


@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
@pytest.mark.parametrize("form", JSON_FORMS)
@pytest.mark.parametrize("size", [3, 1 << 18])
def test_every_form_of_json(form, suffix, size, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_align.data.formats.json_files._READ_SIZE", size)
    path = written(tmp_path, f"data{suffix}", JSON_FORMS[form] + "\n")
    assert [(r.prompt, r.completion) for r in read_records(path)] == [
        (r["prompt"], r["completion"]) for r in TEXT
    ]


def test_one_pretty_record_is_a_record(tmp_path):
    (record,) = read_records(written(tmp_path, "one.json", json.dumps(CHAT, indent=4)))
    assert [m.content for m in record.messages] == ["q", "a"]


@pytest.mark.parametrize(
    "text, expected",
    [
        ('{"data": [{"prompt": "p", "completion": "c"}]', "field 'data' must be followed by ',' or '}'"),
        ('{"data": [{"prompt": "p", "completion": "c"}]} x', "must end after its JSON object"),
        ('{"data": [{"prompt": "p", "completion": "c"}], "train": []}', "got 'data' and 'train'"),
        ('{"data": [{"prompt": "p", "completion": "c"}], "messages": 1}', "got 'data' and 'messages'"),
        ('{"data": []}', "must have the fields of a known shape"),
        (
            '{\n"prompt": "p",\n"completion": "c"\n}\n{\n"prompt": p}',
            ":6: record 2 must be JSON, got Expecting",
        ),
        ('{"columns": ["prompt"], "data": [["p"]]}', "must have the fields of a known shape"),
        (
            '[{"prompt": "p", "completion": "c", "prompt": "d"}]',
            "record 1: an object must not repeat a key, got 'prompt'",
        ),
        (b"\xff\xfe{\x00", "must be UTF-8 text, got UTF-16"),
        ('{"prompt": "p", "completion": "c"}\r{"prompt": "p"}\r', "lines must end with a line feed"),
    ],
)
def test_other_json_is_an_error(text, expected, tmp_path):
    with pytest.raises(InputError, match=expected):
        list(read_records(written(tmp_path, "bad.json", text)))


def test_repeated_keys_are_named_and_may_be_skipped(jsonl):
    twice = '{"messages": [{"role": "user", "content": "a", "content": "b"}]}'
    bad = []
    path = jsonl([CHAT, twice, CHAT])
    assert len(list(read_file(path, on_bad=bad.append)[1])) == 2
    assert str(bad[0]) == f"{path}:2: an object must not repeat a key, got 'content' twice"


# CSV and TSV.
CSV = 'id,prompt,completion\n1,"a, ""b""\nc",é\n\n2, p ,c\n'


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.csv", CSV),
        ("a.csv.gz", CSV),
        ("bom.csv", "\ufeff" + CSV.replace("\n", "\r\n").replace('""\r\nc', '""\nc')),
        ("index.csv", CSV.replace("id", "", 1)),
        ("a.tsv", 'id\tprompt\tcompletion\n1\t"a, ""b""\nc"\té\n2\t p \tc\n'),
        ("semicolon.csv", 'id;prompt;completion\n1;"a, ""b""\nc";é\n2; p ;c\n'),
    ],
)
def test_csv(name, text, tmp_path):
    path = written(tmp_path, name, text)
    first, second = read_records(path)
    assert (first.prompt, first.completion) == ('a, "b"\nc', "é")
    assert (second.prompt, second.completion) == (" p ", "c")
    assert first.where == f"{path}:2"


def test_csv_cells_are_what_their_field_needs(tmp_path):
    path = written(tmp_path, "kto.csv", "prompt,completion,label,weight\np,c,True,2\np,d,0,\np,e,false,0.5\n")
    assert [(r.label, r.weight) for r in read_records(path)] == [(True, 2.0), (False, 1.0), (False, 0.5)]
    turns = json.dumps([ASK, ANSWER]).replace('"', '""')
    (record,) = read_records(written(tmp_path, "chat.csv", f'messages,n\n"{turns}",3\n'))
    assert [m.content for m in record.messages] == ["q", "a"]
    ask, answer = (json.dumps([m]).replace('"', '""') for m in (ASK, ANSWER))
    text = f'prompt,chosen,rejected,margin\n"{ask}","{answer}",[b],1.5\n'
    shape, (pair,) = read_file(written(tmp_path, "pair.csv", text))
    assert (shape.name, pair.margin, pair.completions[1][0].content) == ("pair_messages", 1.5, "[b]")
    renamed = written(tmp_path, "other.csv", "q,a,good\np,c,1\n")
    (labelled,) = read_file(renamed, columns={"prompt": "q", "completion": "a", "label": "good"})[1]
    assert labelled.label is True


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", "at least one record"),
        ("prompt,completion\n", "at least one record"),
        ("prompt,completion\np\n", ":2: must have 2 cells like the header, got 1"),
        ("prompt,completion\np,c,d\n", ":2: must have 2 cells like the header, got 3"),
        ('prompt,completion\np,"c\n', ":2: must be CSV, got unexpected end of data"),
        ("prompt,prompt\np,c\n", ":1: the header must not repeat a name, got prompt twice"),
        ("prompt,completion,label\np,c,good\n", ":2: field 'label' must be true or false, got 'good'"),
        ("prompt,chosen,rejected,margin\np,c,d,big\n", "'margin' must be a finite number, got 'big'"),
        ("prompt,completion\np,\n", "'completion' must not be empty"),
        (b"prompt,completion\n\xff,c\n", "must be UTF-8 text"),
        ("messages\n[{'role': 'user'}]\n", "'messages' must be JSON"),
    ],
)
def test_bad_csv_is_named(text, expected, tmp_path):
    path = written(tmp_path, "bad.csv", text)
    with pytest.raises(InputError, match=expected) as error:
        list(read_records(path))
    assert str(error.value).startswith(path)


# Parquet.
MESSAGES = pa.array(
    [CHAT["messages"]] * 2, pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
)
UNUSED = {
    "date of year 12000": pa.array([3_663_000, 1], pa.date32()),
    "timestamp of year 40000": pa.array([1_200_000_000_000, 1], pa.timestamp("s")),
    "nanoseconds": pa.array([1_700_000_000_000_000_001, 2], pa.timestamp("ns")),
    "unknown zone": pa.array([1, 2], pa.timestamp("us", tz="Mars/Base")),
    "duration": pa.array([1, 2], pa.duration("ns")),
    "time": pa.array([1, 2], pa.time64("ns")),
    "nested date": pa.array([{"day": [3_663_000]}] * 2, pa.struct([("day", pa.list_(pa.date32()))])),
    "decimal": pa.array([decimal.Decimal("1.5")] * 2),
    "binary": pa.array([b"\xff"] * 2),
    "map": pa.array([[("k", 1)]] * 2, pa.map_(pa.string(), pa.int32())),
    "not UTF-8": pa.array([b"\xff", b"a"], pa.binary()).view(pa.string()),
    "null": pa.nulls(2),
}


@pytest.mark.parametrize("name", UNUSED)
def test_unused_columns_may_be_of_any_type(name, tmp_path):
    parquet.write_table(pa.table({"messages": MESSAGES, "extra": UNUSED[name]}), tmp_path / "a.parquet")
    assert len(list(read_records(str(tmp_path / "a.parquet")))) == 2


def test_unreadable_cells_and_repeated_columns_are_errors_where_they_are_used(tmp_path):
    texts = pa.array([b"\xff", b"a"], pa.binary()).view(pa.string())
    parquet.write_table(pa.table({"prompt": texts, "completion": ["b", "c"]}), tmp_path / "a.parquet")
    bad = []
    records = list(read_file(str(tmp_path / "a.parquet"), on_bad=bad.append)[1])
    assert [record.completion for record in records] == ["c"]
    assert "row 1: field 'prompt' must be a string, got an unreadable cell ('utf-8'" in str(bad[0])
    twice = pa.table([MESSAGES, *[pa.array(["a", "b"])] * 2], names=["messages", "id", "id"])
    parquet.write_table(twice, tmp_path / "b.parquet")
    assert len(list(read_records(str(tmp_path / "b.parquet")))) == 2
    parquet.write_table(pa.table([MESSAGES, MESSAGES], names=["messages"] * 2), tmp_path / "c.parquet")
    with pytest.raises(InputError, match="'messages' must be .*several columns have this name"):
        list(read_records(str(tmp_path / "c.parquet")))


# What OpenAI's API and other tools write in a turn.
def test_text_parts_roles_and_labels(jsonl):
    parts = [{"type": "text", "text": "a\n"}, {"type": "text", "text": "b"}]
    turns = [
        {"role": "developer", "content": "d"},
        {**ASK, "content": parts},
        {**ANSWER, "content": parts[:1]},
    ]
    (record,) = read_records(jsonl([{"messages": turns}]))
    assert [(m.role, m.content) for m in record.messages] == [
        ("system", "d"),
        ("user", "a\nb"),
        ("assistant", "a\n"),
    ]
    judged = [{"prompt": "p", "completion": "c", "label": label} for label in (1, 0, 1.0, False)]
    assert [r.label for r in read_records(jsonl(judged))] == [True, False, True, False]


@pytest.mark.parametrize("name", ["margin", "chosen_score", "weight"])
def test_numbers_must_fit_float32(name, jsonl):
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    (record,) = read_records(jsonl([{**pair, name: 3e38}]))
    assert 3e38 in (record.margin, record.weight, *record.scores)
    for number in (1e39, 10**39):
        with pytest.raises(
            InputError, match=f"'{name}' must be a finite number in float32 .at most 3.4e38., got 1"
        ):
            list(read_records(jsonl([{**pair, name: number}])))
    with pytest.raises(InputError, match="'weight' must be at least 1.2e-38"):
        list(read_records(jsonl([{**pair, "weight": 1e-46}])))


def test_only_data_that_newer_rules_read_have_another_key(jsonl, tmp_path):
    calls = {"messages": [ASK, {**ANSWER, "tool_calls": [{"name": "f", "arguments": "{}"}]}]}
    assert [rules_version(jsonl([record])) for record in (CHAT, TEXT[0], calls)] == [1, 1, 2]
    text = {"messages": json.dumps(calls["messages"])}
    assert rules_version(written(tmp_path, "a.jsonl.gz", json.dumps(text))) == 2
    parquet.write_table(pa.Table.from_pylist([CHAT]), tmp_path / "plain.parquet")
    parquet.write_table(pa.Table.from_pylist([calls]), tmp_path / "calls.parquet")
    assert [rules_version(str(tmp_path / f"{n}.parquet")) for n in ("plain", "calls")] == [1, 2]
    named = [{"from": "human", "value": "q", "name": "Ann"}, {"from": "gpt", "value": "a"}]
    assert rules_version(jsonl([{"conversations": named}])) == 2  # the name goes to the template
    assert rules_version(jsonl([{"messages": [{**ASK, "name": "Ann"}, ANSWER]}])) == 1  # it always did
    day = pa.table({"messages": MESSAGES, "day": pa.array([datetime.date(2026, 1, 1)] * 2)})
    parquet.write_table(day, tmp_path / "day.parquet")
    assert rules_version(str(tmp_path / "day.parquet")) == 1
