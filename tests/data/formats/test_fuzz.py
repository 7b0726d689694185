"""Whatever is in a file, it is read or refused in one line: no other exception, whatever the bytes or the fields."""

import gzip
import json

import pyarrow as pa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from megatron_align.data.formats.files import read_file
from megatron_align.data.formats.recognise import FIELDS, SHAPES
from megatron_align.errors import InputError
from megatron_align.records import Completion, Conversation, Preference

SETTINGS = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 10**40),
    st.floats(),
    st.sampled_from(["user", "assistant", "system", "tool", "gpt", "human", "function_call", "", "q", "a"]),
    st.sampled_from(
        ['{"name": "f", "arguments": "{}"}', "[", "{", '[{"role": "user"}]', "\n\nHuman: q\n\nAssistant: a"]
    ),
    st.text(max_size=5),
)
NAMES = st.sampled_from(
    [
        *FIELDS,
        "role",
        "content",
        "from",
        "value",
        "name",
        "arguments",
        "function",
        "type",
        "text",
        "train",
        "images",
    ]
)


def objects(inner):
    turn = st.fixed_dictionaries(
        {"role": LEAVES, "content": LEAVES | inner}, optional={"tool_calls": inner, "train": LEAVES}
    )
    return (
        st.dictionaries(NAMES, inner, max_size=4) | st.lists(inner, max_size=3) | st.lists(turn, max_size=3)
    )


VALUES = st.recursive(LEAVES, objects, max_leaves=12)


@st.composite
def records(draw):
    """A record with the fields of one of the shapes, or of none."""
    shape = draw(st.sampled_from(SHAPES))
    fields = {name: draw(VALUES) for name in shape.needs}
    return {**fields, **draw(st.dictionaries(NAMES, VALUES, max_size=3))}


def read_or_refuse(path, shape=None):
    bad = []
    try:
        for record in read_file(path, shape, on_bad=bad.append)[1]:
            assert isinstance(record, (Conversation, Completion, Preference))
    except InputError as error:
        bad.append(error)
    for error in bad:
        assert isinstance(error, InputError)
        assert "\n" not in str(error)
        assert len(str(error)) < 3000


@SETTINGS
@given(
    rows=st.lists(records(), min_size=1, max_size=3),
    shape=st.sampled_from([None, "chat", "messages", "pair_text"]),
)
def test_records(rows, shape, tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    read_or_refuse(str(path), shape)


@SETTINGS
@given(
    text=st.one_of(
        st.binary(max_size=40),
        st.text('{}[]",:\n\r\t 0aé\\', max_size=40).map(str.encode),
        st.lists(records(), max_size=2).map(lambda rows: json.dumps({"data": rows}, indent=1).encode()),
    ),
    cut=st.integers(0, 300),
    suffix=st.sampled_from(["jsonl", "json", "csv", "tsv", "parquet", "jsonl.gz", "json.gz"]),
)
def test_bytes(text, cut, suffix, tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / f"data.{suffix}"
    content = text[: len(text) - cut] if cut < len(text) else text
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") and cut % 2 else content)
    read_or_refuse(str(path))


@SETTINGS
@given(rows=st.lists(records(), min_size=1, max_size=2))
def test_parquet_rows(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "data.parquet"
    try:
        parquet.write_table(pa.Table.from_pylist(rows), path)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):  # no column has values of several types
        return
    read_or_refuse(str(path))


def test_deep_nesting(tmp_path):
    """Between what the tool's templates take and what Python's JSON decoder takes: 100 to about 990 levels."""
    for depth in (99, 101, 300, 500, 700, 900, 970, 990, 2000, 100_000):
        for opening, inner, closing in (("[", "1", "]"), ('{"a": ', "null", "}")):
            value = opening * depth + inner + closing * depth
            for record in (
                '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", '
                '"tool_calls": [{"name": "f", "arguments": {"x": %s}}]}]}',
                '{"messages": [{"role": "user", "content": "q", "x": %s}, {"role": "assistant", "content": "a"}]}',
                '{"prompt": "p", "completion": "c", "x": %s}',
                '{"messages": [{"role": "user", "content": "q"}], "tools": [%s]}',
                '{"prompt": %s, "completion": "c"}',
            ):
                for suffix in ("jsonl", "json"):
                    path = tmp_path / f"data.{suffix}"
                    path.write_text(record % value)
                    read_or_refuse(str(path))
