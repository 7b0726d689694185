"""README and docs say what is so: their commands are understood, their links lead somewhere, their keys exist.

Every block of commands is run by bash with stand-ins that note what they were called with; what they noted is then
parsed by the real parsers. A block that begins with ```` ```bash run ```` is run in earnest.
"""

import re
import subprocess
import sys
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from megatron_align.config.run import SECTIONS
from megatron_align.kernels import PackedLayout
from megatron_align.objectives.configuration import parse
from megatron_align.objectives.registry import OBJECTIVES
from megatron_align.tools import command, main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
STAND_INS = ("torchrun", "megatron-align", "python", "make", "pip", "unzip", "pytest", "docker", "sbatch")
_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FIRST_WORD = re.compile(r"^(?:\w+=\S*\s+)*([\w-]+)", re.MULTILINE)
_NOTE = '#!/bin/sh\n{ printf \'%s\\037\' "${0##*/}" "$@"; echo; } >> "$NOTES"\n'


def blocks():
    """Yield ``(page:line, how it is marked, text)`` of every fenced block."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for found in _FENCE.finditer(text):
            line = text.count("\n", 0, found.start()) + 1
            yield f"{page.relative_to(ROOT)}:{line}", found[1].strip(), found[2]


def is_commands(mark, text):
    if mark in ("bash", "bash run"):
        return True
    lines = "\n".join(line for line in text.splitlines() if line and not line.startswith("#"))
    first = _FIRST_WORD.match(lines)
    return mark == "" and first is not None and first[1] in (*STAND_INS, "for", "mkdir", "DATA")


COMMANDS = {where: text for where, mark, text in blocks() if is_commands(mark, text)}
RUN = {where: text for where, mark, text in blocks() if mark == "bash run"}


class Parsed(BaseException):
    """The arguments were understood."""


@pytest.fixture
def understand(monkeypatch, tmp_path):
    """``understand(argv)``: the real parser of a noted command takes its arguments."""
    whole = command.Parser.parse

    def parse_only(self, arguments):
        whole(self, arguments)
        raise Parsed

    monkeypatch.setattr(command.Parser, "parse", parse_only)
    monkeypatch.chdir(ROOT)
    some_run = tmp_path / "run.yaml"
    some_run.write_text(
        yaml.safe_dump({"model": {"path": "m"}, "data": {"train": "d"}, "train": {"steps": 1000},
                        "checkpoint": {"dir": "c"}})
    )  # fmt: skip

    def check(argv):
        program, *rest = argv
        if program == "make":
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert set(rest) <= set(targets)
        elif program == "megatron-align":
            with pytest.raises(Parsed):
                assert main.main(rest) == 0
        elif "megatron_align.train" in rest:
            arguments = rest[rest.index("megatron_align.train") + 1 :]
            arguments = [str(some_run) if a == "run.yaml" else a for a in arguments]
            with suppress(SystemExit):  # after --help
                parse(arguments)
        elif program == "python" and rest[0] == "-m":
            assert (ROOT / f"{rest[1].replace('.', '/')}.py").is_file()
        elif program == "python":
            script = (ROOT / rest[0]).read_text(encoding="utf-8")
            assert [o for o in rest if o.startswith("--") and f'"{o}"' not in script] == []
        elif program == "pytest":
            assert [path for path in rest if path.startswith("tests") and not (ROOT / path).exists()] == []

    return check


@pytest.mark.parametrize("where", COMMANDS)
def test_commands_are_understood(where, understand, tmp_path):
    stand_ins, notes = tmp_path / "bin", tmp_path / "notes"
    stand_ins.mkdir()
    for name in STAND_INS:
        (stand_ins / name).write_text(_NOTE)
        (stand_ins / name).chmod(0o755)
    (tmp_path / "here").mkdir()
    done = subprocess.run(
        ["bash", "-euc", COMMANDS[where]],
        cwd=tmp_path / "here",
        env={"PATH": f"{stand_ins}:/usr/bin:/bin", "NOTES": str(notes), "DATA": "data"},
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 0, done.stderr
    calls = [line.split("\037")[:-1] for line in notes.read_text().splitlines()]
    assert calls
    for argv in calls:
        understand([_without_brackets(argument) for argument in argv])


def _without_brackets(argument):
    """Take the brackets off that mean "may be left out"."""
    if argument.startswith("[--"):
        argument = argument[1:]
    return argument[:-1] if argument.endswith("]") and "[" not in argument else argument


@pytest.mark.parametrize("where", RUN)
def test_marked_commands_run(where, tmp_path):
    (tmp_path / "python").symlink_to(sys.executable)
    done = subprocess.run(
        ["bash", "-euc", RUN[where]],
        cwd=ROOT,
        env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_commands_are_found():
    """A pattern that finds nothing would make the tests above vain."""
    assert {where.partition(":")[0] for where in COMMANDS} >= {
        "README.md",
        "docs/conversion.md",
        "docs/data.md",
    }
    assert RUN


def without_blocks(page):
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_exist(page):
    text = without_blocks(page)
    links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
    files = re.findall(
        r"`((?:megatron_align|kernels|tools|tests|docs|benchmarks|examples)/[\w./]+\.\w+)", text
    )
    assert [file for file in files if not (ROOT / file).exists()] == []


KEYS = {
    f"{section}.{option.name}"
    for section, kinds in {
        **{s: [k] for s, k in SECTIONS.items()},
        "objective": [o.Options for o in OBJECTIVES.values()],
    }.items()
    for kind in kinds
    for option in fields(kind)
}
_FILES = ("py", "json", "jsonl", "yaml", "md", "safetensors", "gz", "index")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_configuration_keys_exist(page):
    spans = re.findall(r"`([^`\n]+)`", without_blocks(page))
    pattern = rf"(?<![\w./*])((?:{'|'.join((*SECTIONS, 'objective'))})\.(\w+))"
    named = {key for span in spans for key, last in re.findall(pattern, span) if last not in _FILES}
    modules = {key for key in named if (ROOT / "megatron_align" / f"{key.replace('.', '/')}.py").is_file()}
    assert named - KEYS - modules == set()


def test_quoted_errors_are_those_of_the_code():
    """A heading of the troubleshooting page that quotes an error has the code's words; <...> is what varies."""
    code = "\n".join(p.read_text(encoding="utf-8") for p in sorted((ROOT / "megatron_align").rglob("*.py")))
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^### `(.+)`$", page, re.MULTILINE)
    assert len(quoted) > 8
    missing = [
        part
        for text in quoted
        for part in text.split("<...>")
        if part.strip("' ") and part.strip() not in code
    ]
    assert missing == []


def test_the_picture_of_a_pack_is_that_of_the_code():
    """docs/concepts.md draws an attention layout: its keys and intervals are those of ``PackedLayout``."""
    page = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^ *(\d+) (\w+) +((?:[x.] )+) *\[(\d+), (\d+)\) +\[(\d+), (\d+)\)$", page, re.MULTILINE
    )
    layout = PackedLayout.from_groups([(4, [3, 2]), (0, [2])], total=12)
    names = ["prompt"] * 4 + ["chosen"] * 3 + ["rejected"] * 2 + ["document"] * 2 + ["padding"]
    intervals = zip(
        layout.prefix_start_Q, layout.prefix_end_Q, layout.own_start_Q, layout.own_end_Q, strict=True
    )
    assert rows == [
        (str(q), names[q], "".join("x " if seen else ". " for seen in keys), *(str(int(i)) for i in ends))
        for q, (keys, ends) in enumerate(zip(layout.mask_QT(), intervals, strict=True))
    ]
