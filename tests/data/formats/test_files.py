"""Every file format gives the same records, with file and line, in little memory; bad ones are named, or skipped."""

import gzip
import json
import tracemalloc

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from megatron_align.data.formats import json_files
from megatron_align.data.formats.files import expand, read_file
from megatron_align.errors import InputError
from tests.data.reading import read_records

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def pairs(records):
    return [(record.prompt, record.completion) for record in records]


def test_every_container_gives_the_same_records(jsonl, tmp_path):
    records = [{"prompt": "é\u2028 ", "completion": str(i)} for i in range(3)]
    lines = jsonl(records, "lines.jsonl")
    jsonl(["\ufeff" + json.dumps(records[0]), "", *map(json.dumps, records[1:])], "bom.jsonl")
    jsonl(records, "lines.json")
    for name, text in (("array.json", json.dumps(records)), ("pretty.json", json.dumps(records, indent=1))):
        (tmp_path / name).write_text(f"\n {text}\n")
    for name in ("lines.jsonl", "lines.json", "array.json"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    (tmp_path / "bom.json").write_text("\ufeff" + json.dumps(records), encoding="utf-8")
    parquet.write_table(pa.Table.from_pylist(records), tmp_path / "rows.parquet", row_group_size=2)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert len(files) == 10
    assert lines.endswith("lines.jsonl")
    read = {name: pairs(read_records(str(tmp_path / name))) for name in files}
    assert all(value == [("é\u2028 ", str(i)) for i in range(3)] for value in read.values()), read


def test_places(jsonl, tmp_path):
    lines = jsonl(["", json.dumps({"prompt": "p", "completion": "c"})])
    array = tmp_path / "array.json"
    array.write_text(json.dumps([{"prompt": "p", "completion": "c"}] * 2))
    rows = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"prompt": ["p"] * 600, "completion": ["c"] * 600}), rows)
    places = [record.where for record in read_records([lines, str(array), str(rows)])]
    assert places[:3] == [f"{lines}:2", f"{array}: record 1", f"{array}: record 2"]
    assert places[3:] == [f"{rows}: row {i}" for i in range(1, 601)]


@settings(max_examples=40, deadline=None)
@given(
    records=st.lists(st.dictionaries(st.sampled_from('ab"]},'), st.text(max_size=9)), min_size=1, max_size=6),
    size=st.integers(1, 20),
    indent=st.sampled_from([None, 1]),
)
def test_an_array_is_the_same_in_reads_of_any_size(records, size, indent, tmp_path_factory):
    path = tmp_path_factory.mktemp("array") / "array.json"
    path.write_text(json.dumps(records, indent=indent, ensure_ascii=False), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_files, "_READ_SIZE", size)
        assert [record for _, record in json_files.read_array(str(path))] == records


def test_lines_of_an_array_are_counted_in_reads_of_any_size(monkeypatch, tmp_path):
    monkeypatch.setattr(json_files, "_READ_SIZE", 7)
    path = tmp_path / "array.json"
    path.write_text("[\n" + '{"prompt": "p",\n "completion": "c"},\n' * 3 + '{"prompt": p')
    at = len(path.read_text()) - 1
    with pytest.raises(
        InputError, match=f"{path}:8: record 4 must be JSON, got Expecting value at character {at}"
    ):
        list(read_records(str(path)))


def test_parquet_messages_lose_the_nulls_of_their_neighbours(tmp_path):
    call, other = ({"type": "function", "function": {"name": "f", "arguments": {x: 1}}} for x in "xy")
    calls = [{"role": "assistant", "tool_calls": [c]} for c in (call, other)]
    rows = [{"messages": [*TURNS, *calls]}, {"messages": TURNS}]
    path = str(tmp_path / "rows.parquet")
    parquet.write_table(pa.Table.from_pylist(rows), path)
    first, second = read_records(path)
    assert first.messages[2].for_template() == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert [message.for_template() for message in second.messages] == TURNS


def test_folders_and_patterns(tmp_path):
    names = ("b.jsonl", "a/z.json.gz", "a/y.parquet", ".hidden.jsonl", ".git/x.json", "notes.txt", "a/c.txt")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    full = {name: str(tmp_path / name) for name in names}
    data = [full["a/y.parquet"], full["a/z.json.gz"], full["b.jsonl"]]
    assert expand(str(tmp_path)) == expand(str(tmp_path / "**")) == data
    assert expand(f"{tmp_path}/*") == data  # the folder a is one of the matches
    assert expand(f"{tmp_path}/*/?.parquet") == data[:1]
    assert expand(full["b.jsonl"]) == [full["b.jsonl"]]
    strange = tmp_path / "d[1].jsonl"
    strange.touch()
    assert expand(str(strange)) == [str(strange)]  # a name that looks like a pattern, but is there
    for path, found in ((f"{tmp_path}/x*", "found nothing"), (f"{tmp_path}/*.txt", "found 1 others")):
        with pytest.raises(InputError, match=f"must match a data file .*{found}"):
            expand(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="must hold a data file .* found none in the folder"):
        expand(str(tmp_path / "empty"))


def test_a_folder_is_read_like_its_files(jsonl, tmp_path):
    for i in (1, 0):
        jsonl([{"prompt": "p", "completion": str(i)}], f"{i}.jsonl")
    assert pairs(read_records(str(tmp_path))) == [("p", "0"), ("p", "1")]


GOOD = {"prompt": "p", "completion": "c"}


def test_bad_records_are_told_and_left_out(jsonl):
    path = jsonl(
        ["{", [1], {"text": "t"}, GOOD, {**GOOD, "completion": 3}, '{"prompt": ', {"prompt": "p"}, GOOD]
    )
    with open(path, "ab") as file:
        file.write(b'{"prompt": "\xff"}\n')
    told = []
    shape, records = read_file(path, on_bad=told.append)
    assert (shape.name, [record.where for record in records]) == (
        "prompt_completion",
        [f"{path}:4", f"{path}:8"],
    )
    assert [str(error).split(": ")[0] for error in told] == [f"{path}:{i}" for i in (1, 2, 3, 5, 6, 7, 9)]
    assert all(isinstance(error, InputError) and "\n" not in str(error) for error in told)
    assert "must be UTF-8 text" in str(told[-1])
    assert "must have the fields of 'prompt_completion' (prompt + completion), got ['prompt']" in str(
        told[-2]
    )


def test_an_array_is_read_on_after_what_is_json_and_no_further_than_what_is_not(tmp_path):
    good, path, told = json.dumps(GOOD), tmp_path / "array.json", []
    path.write_text(f'[3, {good}, {{"prompt": 1}}, null, {good}, [{good}]]')
    records = read_file(str(path), on_bad=told.append)[1]
    assert [record.where for record in records] == [f"{path}: record {i}" for i in (2, 5)]
    assert [str(error).split(":")[1] for error in told] == [f" record {i}" for i in (1, 3, 4, 6)]
    for broken in (f'[{good}, {{"prompt": p}}, {good}]', f"[{good}, {good} {good}]", f"[{good}, {good}"):
        path.write_text(broken)
        with pytest.raises(
            InputError, match="record 2.*got .*; later records of a JSON array cannot be found"
        ):
            list(read_file(str(path), on_bad=told.append)[1])
    assert len(told) == 4


@pytest.mark.parametrize("on_bad", [None, lambda error: None], ids=["error", "skip"])
def test_mixed_shapes_are_an_error_either_way(on_bad, jsonl):
    path = jsonl([GOOD, {"messages": TURNS}])
    with pytest.raises(InputError, match=f"{path}:2: must be of shape 'prompt_completion' .* got 'messages'"):
        list(read_file(path, on_bad=on_bad)[1])
    path = jsonl([{"messages": TURNS, "conversations": []}])
    with pytest.raises(InputError, match=f"{path}:1: must have the fields of one shape .*data.shape"):
        read_file(path, on_bad=on_bad)


def test_a_file_of_bad_records_only_is_an_error(jsonl):
    with pytest.raises(InputError, match="must hold at least one well-formed record, got 2 malformed ones"):
        read_file(jsonl(["{", {"text": "t"}]), on_bad=lambda error: None)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "jsonl.gz"])
def test_memory_does_not_grow_with_the_file(suffix, tmp_path):
    record = {"prompt": "p" * 10_000, "completion": "c" * 10_000}
    path, lines = tmp_path / f"data.{suffix}", [json.dumps({**record, "id": i}) for i in range(1000)]
    if suffix == "parquet":  # other text in every row: a dictionary of one value would be small anyway
        table = pa.table({name: [f"{i}{text}" for i in range(1000)] for name, text in record.items()})
        parquet.write_table(table, path, use_dictionary=False, compression="none", row_group_size=100)
    else:
        text = f"[{','.join(lines)}]" if suffix == "json" else "\n".join(lines)
        path.write_bytes(gzip.compress(text.encode(), 1) if suffix.endswith("gz") else text.encode())
        del text
    del lines
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_records(str(path))) == 1000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # the file has 20 MB; Parquet decodes 64 rows of 20 kB at a time, as Python strings beside Arrow's own
    assert peak < (5e6 if suffix == "parquet" else 3e6)


BAD_FILES = {
    "empty.jsonl": (b"\n\n", "must hold at least one record"),
    "empty.json": (b"[]", "must hold at least one record"),
    "cut.json": (b'[{"prompt": "p", "completion": "c"},\n {"a"', ":2: record 2 must be JSON"),
    "open.json": (b'[{"prompt": "p", "completion": "c"}', "record 1: must be followed by ',' or '\\]', got"),
    "more.json": (b'[{"prompt": "p", "completion": "c"}] x', "must end after its JSON array"),
    "not_gzip.jsonl.gz": (b"{}", "could not be read"),
    "cut.jsonl.gz": (gzip.compress(b"{}" * 1000)[:-12], "could not be read"),
    "latin.jsonl": (b'{"prompt": "\xe9"}', ":1: must be UTF-8 text"),
    "latin.json": (b'[{"prompt": "\xe9"}]', "must be UTF-8 text"),
    "digits.jsonl": (
        b'{"prompt": ' + b"1" * 5000 + b"}",
        ":1: must be a line of JSON, got Exceeds the limit",
    ),
    "digits.json": (b'[{"prompt": ' + b"1" * 5000 + b"}]", "record 1 must be JSON, got Exceeds the limit"),
    "deep.json": (b"[" * 100_000, "record 1 must be JSON, got one nested too deep"),
    "comma.json": (b'[{"prompt": "p", "completion": "c"},]', "record 2 must be JSON, got Expecting value"),
    "not.parquet": (b"PAR1 no", "could not be read"),
    "data.txt": (b"a,b", "must end in one of .jsonl.*parquet"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_named(tmp_path, name):
    content, expected = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=expected) as error:
        list(read_records(str(tmp_path / name)))
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path / 'no.jsonl'}: must be a data file, found nothing"):
        list(read_records(str(tmp_path / "no.jsonl")))
    with pytest.raises(InputError, match=f"{tmp_path}: must be a data file, found a folder"):
        read_file(str(tmp_path))
