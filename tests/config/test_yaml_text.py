"""YAML that people wrote is read as YAML, or refused in one line with its place; no text makes that slow or large."""

import pytest

from megatron_align.config import yaml_text
from megatron_align.config.yaml_text import parse_yaml, read_yaml
from megatron_align.errors import InputError


@pytest.mark.parametrize(
    "text, value",
    [
        ("a: 1e6", 1e6),
        ("a: -1.5E-3", -1.5e-3),
        ("a: 1e-5", 1e-5),
        ("a: .5e1", 5.0),
        ("a: 2020-13-45", "2020-13-45"),
        ("a: 2020-01-01", "2020-01-01"),
        ("a: e5", "e5"),
        ("d: &d {x: 1}\na: {<<: *d, y: 2}", {"x": 1, "y": 2}),
        ("d: &d {x: 1}\na: {<<: *d, x: 2}", {"x": 2}),
        ("b: &b [1]\na: [*b, *b]", [[1], [1]]),
    ],
)
def test_values(text, value):
    assert parse_yaml(text, "f.yaml")["a"] == value


BAD = {
    "repeated": ("a: 1\nb: 2\na: 3", "line 3: the key 'a' is given twice"),
    "repeated inside": ("a: {b: 1, b: 2}", "line 1: the key 'b' is given twice"),
    "deep": ("[" * 100_000, "nested deeper than 30 levels"),
    "deep mappings": ("{a: " * 5_000, "nested deeper than 30 levels"),
    "deep blocks": ("\n".join(" " * i + "a:" for i in range(300)), "nested deeper than 30 levels"),
    "own alias": ("a: &x [*x]", "line 1: an alias holds itself"),
    "unknown alias": ("a: *x", "line 1: found undefined alias 'x'"),
    "digits": ("a: " + "9" * 5_000, "digits"),
    "python": ("a: !!python/object/apply:os.system [ls]", "the tag !!python/object/apply:os.system is not read"),
    "own tag": ("a: !x 1", "the tag !x is not read"),
    "timestamp": ("a: !!timestamp x", "the tag !!timestamp is not read"),
    "no integer": ("a: !!int x", "'x' is no !!int"),
    "empty integer": ("a: !!int", "'' is no !!int"),
    "no boolean": ("a: !!bool 7", "'7' is no !!bool"),
    "a list as key": ("[a]: 1", "unhashable key"),
    "tab": ("a:\n\tb: 1", "line 2"),
    "control": ("a: \x00", "special characters are not allowed"),
    "two documents": ("a: 1\n---\nb: 1", "expected a single document"),
}  # fmt: skip


@pytest.mark.parametrize("text, reason", BAD.values(), ids=list(BAD))
def test_refused_in_one_line(text, reason):
    with pytest.raises(InputError) as error:
        parse_yaml(text, "f.yaml")
    assert str(error.value).startswith("f.yaml is not valid YAML")
    assert reason in str(error.value)
    assert len(str(error.value)) < 300


def test_aliases_that_expand_exponentially():
    laughs = "\n".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]" for i in range(1, 12))
    with pytest.raises(InputError, match="aliases expand to more than 500,000 values"):
        parse_yaml(f"l0: &l0 [ha, ha]\n{laughs}", "f.yaml")


def test_files(tmp_path, monkeypatch):
    file = tmp_path / "run.yaml"
    file.write_bytes(b"\xef\xbb\xbfmodel: {path: m}\n")  # written by a Windows editor
    assert read_yaml(str(file)) == {"model": {"path": "m"}}
    for content, reason in (
        (b"", "must hold a mapping of sections .*, got nothing"),
        (b"- a", "got a list"),
        (b"model", "got text"),
        ("model: ü".encode("latin-1"), "must be text in UTF-8"),
        (b"\x1f\x8b\x08\x00", "must be text in UTF-8"),
    ):
        file.write_bytes(content)
        with pytest.raises(InputError, match=reason):
            read_yaml(str(file))
    monkeypatch.setattr(yaml_text, "MOST_BYTES", 10)
    file.write_text("x" * 11)
    with pytest.raises(InputError, match="got 11 bytes: is .*run.yaml a data file"):
        read_yaml(str(file))
    for path in ("absent", str(tmp_path), "a\0b", "x" * 5000, ""):
        with pytest.raises(InputError, match="needs a YAML file, found none at"):
            read_yaml(path)
