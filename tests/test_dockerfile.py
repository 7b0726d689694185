"""The image's recipe, as far as it can be judged without building it.

Every RUN is a shell line that parses; the giants are installed only if asked for; everything is pinned; what passes the
tests, and nothing else, becomes the image, and it does not run as root.
"""

import re
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "docker" / "constraints.txt"


def instructions():
    """Return ``(word, rest)`` of every instruction, its lines joined as docker joins them."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    joined = re.sub(r"\\\n", " ", lines)
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


INSTRUCTIONS = instructions()
RUNS = [rest for word, rest in INSTRUCTIONS if word == "RUN"]
ARGS = dict(re.fullmatch(r'(\w+)="?([^"]*)"?', rest).groups() for word, rest in INSTRUCTIONS if word == "ARG")


def pins():
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if not line.startswith("#")]
    return {_plain(name): version for name, version in (line.split("==") for line in lines)}


def _plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("run", RUNS)
def test_a_run_line_parses(run):
    done = subprocess.run(["bash", "-n", "-c", run], capture_output=True, text=True, timeout=10)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "asked, installed",
    [
        ({}, []),
        ({"TRANSFORMER_ENGINE": "2.9.0"}, ["transformer-engine[pytorch]==2.9.0"]),
        ({"FLASH_ATTN": "2.8.3", "APEX": "25.07"}, ["flash-attn==2.8.3", "apex @ git+https://github.com/NVIDIA/apex@25.07"]),
    ],
    ids=["nothing", "te", "flash_and_apex"],
)  # fmt: skip
def test_the_giants_come_when_asked_for(tmp_path, asked, installed):
    [run] = [run for run in RUNS if "TRANSFORMER_ENGINE" in run]
    (tmp_path / "pip").write_text('#!/bin/sh\nfor last; do :; done; echo "$last"\n')
    (tmp_path / "pip").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", **ARGS, **asked}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", run], env=environment, capture_output=True, text=True, timeout=10
    )
    assert (done.returncode, done.stdout.splitlines()) == (0, installed)


def test_everything_is_pinned():
    bases = [rest.split()[0] for word, rest in INSTRUCTIONS if word == "FROM"]
    stages = {rest.split(" AS ")[1] for word, rest in INSTRUCTIONS if word == "FROM"}
    outside = [base for base in bases if base not in stages]
    assert outside == ["${BASE}"]
    assert re.fullmatch(r"[\w./]+:\d[\w.-]+", ARGS["BASE"])
    assert any(word == "ENV" and "PIP_CONSTRAINT=/opt/constraints.txt" in rest for word, rest in INSTRUCTIONS)
    pinned = pins()
    assert pinned["torch"] == re.search(r"torch==([\d.]+)", " ".join(RUNS))[1]
    for text in _requirements():
        requirement = Requirement(text)
        assert requirement.specifier.contains(pinned[_plain(requirement.name)]), text
    tested = (ROOT / "tests" / "constraints" / "python3.12.txt").read_text().splitlines()
    assert {line for line in tested if not line.startswith("#")} <= set(CONSTRAINTS.read_text().splitlines())


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_each_python_has_constraints_for_all_that_is_installed(python):
    """``make constraints`` was run after setup.py changed; Triton is torch's, or the Makefile's with a CPU build."""
    lines = (ROOT / "tests" / "constraints" / f"python{python}.txt").read_text(encoding="utf-8").splitlines()
    pinned = {_plain(name): number for name, number in (line.split("==") for line in lines[1:])}
    for text in _requirements():
        requirement = Requirement(text)
        if requirement.name != "triton":
            assert requirement.specifier.contains(pinned[_plain(requirement.name)]), text


def test_the_local_build_parses():
    script = ROOT / "docker" / "build_local.sh"
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True, timeout=10)
    assert done.returncode == 0, done.stderr


def _requirements():
    """Return what setup.py asks for, with what the tests need."""
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    needed = text.split("install_requires=[")[1].split("],")[0]
    tests = text.split('"test": [')[1].split("],")[0]
    found = re.findall(r'^\s*"([^"]+)"', needed, re.MULTILINE) + re.findall(r'"([^"]+)"', tests)
    assert len(found) > 15
    return found


def test_what_failed_its_tests_is_no_image():
    [check] = [run for run in RUNS if "pytest" in run]
    assert re.search(r"pytest [^|;]*&& [^|;]*> /opt/tests_passed$", check)
    assert ("COPY", "--from=check /opt/tests_passed /opt/tests_passed") in INSTRUCTIONS


def test_the_image_does_not_run_as_root():
    after = [rest for word, rest in INSTRUCTIONS if word == "USER"]
    assert after == ["align"]
    order = [word for word, _ in INSTRUCTIONS]
    assert "RUN" not in order[order.index("USER") :]
    assert "ADD" not in order


def test_apt_leaves_nothing_behind():
    for run in RUNS:
        if "apt-get install" in run:
            assert "--no-install-recommends" in run
            assert "rm -rf /var/lib/apt/lists/*" in run


def test_the_image_gets_what_is_named_and_nothing_else():
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"
    named = {line[1:] for line in lines if line.startswith("!")}
    assert {name for name in named if not (ROOT / name).exists()} == set()
    copied = {rest.split()[0] for word, rest in INSTRUCTIONS if word == "COPY" and "--from" not in rest}
    assert {Path(source).parts[0] for source in copied if source != "."} <= named
