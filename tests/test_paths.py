"""``~`` is a home folder in every path of a configuration and of every command; no folder is ever named ``~``."""

import argparse
import dataclasses
import importlib
from pathlib import Path

import pytest

from megatron_align.config import DataSource, RunConfig
from megatron_align.config.paths import expand_home
from megatron_align.config.run import SECTIONS
from megatron_align.errors import InputError
from megatron_align.objectives.configuration import load_config
from megatron_align.objectives.user_file import load
from megatron_align.tools.command import PATHS, Parser
from megatron_align.tools.main import TOOLS


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Every option that is a path; the test below finds those that this list lacks.
OPTIONS = {
    "model": {"path": "~/m"},
    "data": {
        "train": ["~/a.jsonl", {"path": "~/b", "weight": 2.0}],
        "validation": "~/v",
        "chat_template": "~/t.jinja",
        "cache": "~/c",
    },
    "reference": {"path": "~/r"},
    "checkpoint": {"dir": "~/run"},
}
OF_PPO = {"critic": {"path": "~/critic"}}


def paths_of(config: RunConfig):
    return {
        f"{section}.{key}": getattr(getattr(config, section), key)
        for section in OPTIONS
        for key in OPTIONS[section]
    }


def test_every_path_of_a_configuration(home):
    config = load_config({**OPTIONS, "train": {"steps": 1}, "objective": {"name": "dpo"}})
    assert paths_of(config) == {
        "model.path": f"{home}/m",
        "data.train": [f"{home}/a.jsonl", DataSource(path=f"{home}/b", weight=2.0)],
        "data.validation": f"{home}/v",
        "data.chat_template": f"{home}/t.jinja",
        "data.cache": f"{home}/c",
        "reference.path": f"{home}/r",
        "checkpoint.dir": f"{home}/run",
    }


def test_the_path_of_a_critic(home):
    rollouts = {"objective": {"name": "ppo"}, "rollout": {"engine": "data"}, "train": {"steps": 1}}
    given = {"model": {"path": "m"}, "data": {"train": "d"}, "checkpoint": {"dir": "c"}}
    assert load_config({**given, **rollouts, **OF_PPO}).critic.path == f"{home}/critic"


def test_no_path_is_missing_in_the_list_above():
    words = ("file", "folder", "glob")
    for section, kind in SECTIONS.items():
        helps = {
            line.split(":")[0].strip(): line for line in (kind.__doc__ or "").splitlines() if ": " in line
        }
        for field in dataclasses.fields(kind):
            text = helps.get(field.name, "").partition(": ")[2].lower()
            if field.type.startswith("str") and text.startswith(("a hugging face folder", *words)):
                listed = (OPTIONS | OF_PPO).get(section, {})
                assert field.name in listed, f"{section}.{field.name} is a path"


def test_the_file_of_a_configuration_and_of_an_objective(home):
    (home / "run.yaml").write_text(
        "model: {path: ~/m}\ndata: {train: ~/d}\ncheckpoint: {dir: ~/r}\ntrain: {steps: 1}"
    )
    assert load_config("~/run.yaml").data.train == f"{home}/d"
    assert load_config("~/run.yaml", ["checkpoint.dir=~/other"]).checkpoint.dir == f"{home}/other"
    (home / "mine.py").write_text("x = 1")
    with pytest.raises(InputError, match=f"no class 'Mine' in {home}/mine.py"):
        load("~/mine.py:Mine")


def test_an_unknown_user(home):
    with pytest.raises(InputError, match="no home folder is known for '~nobody_here'"):
        expand_home("~nobody_here/m")
    assert expand_home("a/~/b") == "a/~/b"


def parsers(monkeypatch):
    """Yield the parser of every tool and sub-command, as its ``run`` builds it."""
    found = []

    def parse(self, arguments):
        found.append(self)
        raise InputError("stop")

    monkeypatch.setattr(Parser, "parse", parse)
    commands = {
        "adapter": [["merge"], ["extract"]],
        "chat": [[]],
        "data": [["dedup"], ["label"], ["select"], ["mix"]],
        "pas": [["build"], ["augment"]],
        "convert": [["import"], ["export"], ["verify"]],
        "evaluate": [["compare"]],
        "generate": [[]],
        "merge": [["linear"], ["slerp"], ["ties"]],
        "plan": [[]],
        "prepare": [[]],
        "report": [[]],
        "sample": [[]],
    }
    assert commands.keys() == TOOLS.keys()
    for tool, of_tool in commands.items():
        for command in of_tool:
            with pytest.raises(InputError, match="stop"):
                importlib.import_module(f"megatron_align.tools.{tool}").run(command)
    return found


def test_every_path_of_every_command(monkeypatch, home):
    actions = [action for parser in parsers(monkeypatch) for action in parser._actions]
    of_paths = [a for a in actions if a.metavar in PATHS]
    assert len(of_paths) > 20
    assert all(action.type("~/x") == f"{home}/x" for action in of_paths)
    with pytest.raises(argparse.ArgumentTypeError):
        of_paths[0].type("~nobody_here/x")
    for action in actions:
        if any(
            word in (action.help or "").lower().split(" ")
            for word in ("file", "folder", "folders", "checkpoint")
        ):
            known = action.metavar in PATHS or action.choices or action.nargs == 0
            assert known or action.type is not None, f"{action.dest}: is it a path?"
    assert not Path("~").exists()
