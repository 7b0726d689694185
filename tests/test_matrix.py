"""The matrix runs what it names: each test of each law exists, and its supported range is the one of setup.py."""

import ast
from pathlib import Path

from packaging.requirements import Requirement

from tests import matrix
from tests.constraints import generate

ROOT = Path(__file__).parent.parent


def test_each_named_test_exists():
    for law, names in matrix.LAWS.items():
        assert names, law
        for name in names:
            file, _, test = name.partition("::")
            functions = {node.name for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body
                         if isinstance(node, ast.FunctionDef)}  # fmt: skip
            assert not test or test.partition("[")[0] in functions, name


def test_the_ends_are_those_of_the_package():
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    [line] = [line.split('"')[1] for line in text.splitlines() if '"megatron-core>=' in line]
    specifier = Requirement(line).specifier
    assert specifier.contains(matrix.LOWEST)
    assert specifier.contains(matrix.NEWEST)
    assert set(matrix.PYTHONS) == set(generate.CHOSEN)
    for python, chosen in generate.CHOSEN.items():
        newest = matrix.NEWEST if python in ("3.12", "3.13") else matrix.LOWEST
        assert chosen["megatron-core"] == newest


def test_what_is_not_found_is_left_out(monkeypatch, tmp_path):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert matrix.interpreters() == {}
    shim = tmp_path / "python3.12"
    shim.write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    assert matrix.interpreters() == {}  # a shim without an interpreter
    shim.write_text("#!/bin/sh\nexit 0\n")
    assert matrix.interpreters() == {"3.12": shim}
