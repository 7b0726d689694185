"""Law 13 for commands: every option of every tool changes what the tool does, or is refused in that combination.

A tool is run with the function that does its work replaced by one that records how it is called; the function itself
has tests of its own. Options are those that the tools' parsers declare.
"""

import importlib
import io
import re
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from types import SimpleNamespace
from unittest import mock

import pytest
import yaml
from jsonargparse import ArgumentParser

from megatron_align.errors import InputError
from megatron_align.merge.methods import METHODS
from megatron_align.tools import main
from megatron_align.tools.command import Parser
from tests.harness.options import without_one_entry
from tests.harness.sizes import write_config


class Done(Exception):
    """The work of a tool would begin: its call is recorded."""


SAMPLING = {
    "--max-tokens": ["7"],
    "--temperature": ["0.3"],
    "--top-p": ["0.5"],
    "--top-k": ["9"],
    "--stop": ["."],
    "--seed": ["7"],
}
CHAT = {
    "--workers": ["3"],
    "--timeout": ["9"],
    "--request-tries": ["2"],
    "--chat-template": ["t.jinja"],
    "--precision": ["fp32"],
}
VLLM = {
    "--vllm": ["http://x"],
    "--vllm-python": ["python"],
    "--vllm-options": (["--max-model-len 9"], ["--vllm-python", "python"]),
}
TEXT = {"--of": ["record"], "--on-bad-record": ["skip"]}
DATA = {"--data": ["other"], "--out": ["other"]}
ADAPTED = {
    "megatron_align.checkpoint.folder:find_checkpoint": "c",
    "megatron_align.convert.open_adapter:holds_adapter": True,
    "megatron_align.convert.export_adapter:export_adapter": Done,
    "megatron_align.convert.verify_adapter:verify_adapter": Done,
}
FINDINGS = SimpleNamespace(lines=lambda: [], equal=True, to_json=lambda: {})
RUN_CONFIG = {
    "model": {"path": "model"},
    "data": {"train": "nowhere.jsonl", "sequence_length": 256},
    "train": {"steps": 3},
    "checkpoint": {"dir": "run"},
}
EVALUATION = {"model": "m", "out": "o", "tasks": [{"name": "a", "kind": "generate", "data": "d"}]}
ENGINE = "megatron_align.evaluation.engines:open_engine"

# A command: arguments with which it works; what is called, with the answer or Done; of each option a value off its
# default, and with it further arguments (a list), other arguments (a tuple), the refusal (a text), or other answers (a
# mapping, "": further arguments).
COMMANDS = {
    "adapter merge": (
        ["--base", "b", "--adapter", "a", "--out", "o"],
        {"megatron_align.merge.adapter:merge_adapter": Done},
        {"--base": ["x"], "--adapter": ["x"], "--out": ["x"], "--dtype": ["bfloat16"]},
    ),
    "adapter extract": (
        ["--base", "b", "--model", "m", "--rank", "2", "--out", "o"],
        {"megatron_align.merge.adapter:extract_adapter": Done},
        {
            "--base": ["x"],
            "--model": ["x"],
            "--rank": ["3"],
            "--targets": ["q_proj"],
            "--out": ["x"],
            "--modules-to-save": ["all"],
        },
    ),
    "chat": (
        ["m"],
        {
            ENGINE: "engine",
            "megatron_align.evaluation.adapters:attach_adapters": "adapters",
            "megatron_align.data.tokenize.chat_template:load_chat_template": "template",
            "megatron_align.tools.chat:Chat": Done,
        },
        {
            "model": ["x"],
            "--system": ["s"],
            "--chat-template": ["t"],
            "--precision": ["fp32"],
            "--adapter": ["a"],
            **SAMPLING,
        },
    ),
    "convert import": (
        ["--hf", "h", "--out", "o"],
        {"megatron_align.convert.import_hf:import_hf": Done},
        {"--hf": ["x"], "--out": ["x"], "--dtype": ["bfloat16"]},
    ),
    "convert export": (
        ["--checkpoint", "c", "--out", "o"],
        {"megatron_align.convert.export_hf:export_hf": Done},
        {
            "--checkpoint": ["x"],
            "--out": ["x"],
            "--dtype": ["bfloat16"],
            "--critic": [],
            "--base": (["b"], ADAPTED),
        },
    ),
    "convert verify": (
        ["--hf", "h", "--checkpoint", "c"],
        {"megatron_align.convert.verify:verify": FINDINGS},
        {
            "--hf": ["x"],
            "--checkpoint": ["x"],
            "--data": ["d.jsonl"],
            "--tolerance": ["0.1"],
            "--deep": [],
            "--json": ["report.json"],
            "--base": (["b"], ADAPTED),
        },
    ),
    "data dedup": (
        ["--data", "d", "--out", "o"],
        {"megatron_align.curation.dedup:dedup": Done},
        {**DATA, **TEXT, "--duplicates": ["0.9"], "--embeddings": ["column:e"]},
    ),
    "data label": (
        ["--data", "d", "--out", "o", "--quality", "f.py:f"],
        {"megatron_align.curation.label:label": Done},
        {
            **DATA,
            **TEXT,
            **CHAT,
            "--quality": ["f.py:g"],
            "--labels": ["f.py:f"],
            "--categories": ["a", "b"],
            "--tries": ["1"],
            "--failures": ["1"],
        },
    ),
    "data select": (
        ["--data", "d", "--out", "o", "--difficulty", "d", "--easiest", "1", "--embeddings", "column:e"],
        {"megatron_align.curation.select:select": Done},
        {
            **DATA,
            **TEXT,
            "--difficulty": ["x"],
            "--easiest": ["2"],
            "--hardest": ["9"],
            "--embeddings": ["column:x"],
            "--layers": ["0.5"],
            "--per-cluster": ["2"],
            "--best": ["x"],
            "--max-tokens": ["9"],
        },
    ),
    "data mix": (
        ["--data", "d", "--out", "o", "--by", "c"],
        {"megatron_align.curation.mixture:split": Done},
        {**DATA, "--by": ["x"], "--share": ["a=0.5"], "--weight": ["a=2"]},
    ),
    "evaluate": (
        ["--config", "eval.yaml"],
        {"megatron_align.evaluation.run:evaluate": Done},
        {
            "--config": ["other.yaml"],
            "--model": ["x"],
            "--out": ["x"],
            "--adapter": ["a"],
            "--precision": ["fp32"],
            "--sequence_length": ["9"],
            "--template_date": ["2024-07-26"],
            "--augment": ["f.py:f"],
            "--augment_template": (["t"], ["--augment", "f.py:f"]),
            "--rollout.engine": (["vllm"], ["--rollout.url", "http://x"]),
            "--rollout.url": (["http://y"], ["--rollout.engine", "vllm", "--rollout.url", "http://x"]),
            "--rollout.vllm_python": (["p"], ["--rollout.engine", "vllm", "--rollout.vllm_python", "q"]),
            "--rollout.vllm_options": (
                ["--max-model-len 9"],
                ["--rollout.engine", "vllm", "--rollout.vllm_python", "q"],
            ),
        },
    ),
    "evaluate compare": (
        ["a", "b"],
        {"megatron_align.evaluation.compare:compare": Done},
        {"first": ["x", "b"], "second": ["a", "x"]},
    ),
    "generate": (
        ["--model", "m", "--prompts", "p", "--out", "o"],
        {"megatron_align.evaluation.generation:generate_file": Done},
        {
            "--model": ["x"],
            "--prompts": ["x"],
            "--out": ["x"],
            "--completions": ["2"],
            "--chat": [],
            "--chat-template": ["t"],
            "--template-date": ["2024-07-26"],
            "--precision": ["fp32"],
            "--too-long": ["skip"],
            "--limit": ["3"],
            "--tokens": [],
            "--adapter": ["a"],
            "--augment": ["f.py:f"],
            "--augment-template": (["t"], ["--augment", "f.py:f"]),
            **VLLM,
            **SAMPLING,
        },
    ),
    "pas augment": (
        ["m"],
        {
            "megatron_align.tools.lines:arriving": "batches",
            "megatron_align.augmentation.augment:augment_lines": Done,
            "megatron_align.augmentation.augment:augment_file": Done,
        },
        {
            "model": ["x"],
            "--prompts": (["p"], ["--prompts", "q", "--out", "o"]),
            "--out": (["p"], ["--prompts", "q", "--out", "o"]),
            "--template": ["t"],
            "--max-tokens": ["9"],
            "--unusable": ["keep"],
            "--failures": ["1"],
            "--batch": ["2"],
            **CHAT,
        },
    ),
    "pas build": (
        ["--prompts", "p", "--out", "o", "--examples", "e", "--generator", "g"],
        {"megatron_align.augmentation.build:build": Done},
        {
            "--prompts": ["x"],
            "--out": ["x"],
            "--examples": ["x"],
            "--generator": ["x"],
            "--critic": ["none"],
            "--quality": ["column:q"],
            "--min-quality": (["0.5"], ["--quality", "column:q"]),
            "--labels": ["column:l"],
            "--duplicates": ["0.9"],
            "--embeddings": ["column:e"],
            "--tokenizer": ["t"],
            "--context": ["99"],
            "--template": ["t"],
            "--shots": ["1"],
            "--regenerations": ["1"],
            "--tries": ["1"],
            "--max-words": ["9"],
            "--max-tokens": ["9"],
            "--critic-tokens": ["9"],
            "--temperature": ["0"],
            "--failures": ["1"],
            **CHAT,
        },
    ),
    "plan": (
        ["--config", "run.yaml", "--gpus", "8", "--gpu-memory", "80"],
        {},
        {
            "--config": ["other.yaml"],
            "--gpus": ["4"],
            "--gpu-memory": ["40"],
            "--chip": ["a100"],
            "--efficiency": ["0.1"],
            "--count": ["1"],
            "--write": ["planned.yaml"],
            "--rehearse": ([], {"megatron_align.tools.plan_rehearsal:rehearsal": Done}),
        },
    ),
    "prepare": (
        ["--tokenizer", "t", "--data", "d", "--sequence-length", "64", "--cache", "c", "--report", "r"],
        {
            "megatron_align.data.tokenize.prepare:prepare": "store",
            "megatron_align.data.store:TokenStore": range(30),
            "megatron_align.tools.prepare:_counts": "",
            "megatron_align.tools.prepare:_report": Done,
        },
        {
            "--config": (["run.yaml"], "--config already names the data"),
            "--tokenizer": ["x"],
            "--data": ["x"],
            "--sequence-length": ["32"],
            "--cache": ["x"],
            "--shape": ["pair"],
            "--columns": ["prompt=question"],
            "--chat-template": ["t"],
            "--template-date": ["2024-07-26"],
            "--train-turns": ["last"],
            "--drop-fields": ["name"],
            "--too-long": ["drop"],
            "--on-bad-record": ["skip"],
            "--processes": ["2"],
            "--check": [],
            "--report": ["x"],
            "--ranks": ["2"],
            "--pack-length": ["99"],
            "--global-batch-size": ["4"],
            "--sample": ["3"],
            "--random-samples": ["2"],
            "--seed": (["3"], ["--random-samples", "3"]),
        },
    ),
    "report": (
        ["runs"],
        {
            "megatron_align.tools.report_runs:read_runs": [SimpleNamespace(name="run")],
            "megatron_align.tools.report_charts:charts_of": [],
            "megatron_align.tools.report_page:write_page": Done,
        },
        {"runs": ["x"], "--out": ["x"], "--title": ["x"]},
    ),
    "sample": (
        ["--models", "m", "--prompts", "p", "--out", "o", "--check", "exact_match"],
        {
            "megatron_align.evaluation.sample:require_language_models": None,
            "megatron_align.evaluation.sample:sample": Done,
        },
        {
            "--models": ["x", "y"],
            "--prompts": ["x"],
            "--out": ["x"],
            "--completions": ["2"],
            "--reward-model": (
                ["r"],
                ("--models", "m", "--prompts", "p", "--out", "o", "--reward-model", "s"),
            ),
            "--check": ["math"],
            "--extract": ["(.*)"],
            "--format": ["pair"],
            "--duplicates": ["0.9"],
            "--all-above": ["1"],
            "--tied": ["0.5"],
            "--threshold": (["0.5"], ["--format", "unpaired", "--threshold", "0.1"]),
            "--chat": [],
            "--template-date": ["2024-07-26"],
            "--precision": ["fp32"],
            **VLLM,
            **SAMPLING,
        },
    ),
}
ADAPTERS = {
    "megatron_align.merge.adapters:are_adapters": True,
    "megatron_align.merge.adapters:merge_adapters": Done,
    "megatron_align.merge.adapters:merge_adapted_models": Done,
}
FOLDERS = {"--base": ["x"], "--models": ["x", "y"], "--out": ["x"], "--dtype": ["float32"]}
FOLDERS |= {"--merged": ([], ADAPTERS), "--combination": (["svd"], {**ADAPTERS, "": ["--rank", "2"]})}
FOLDERS |= {"--rank": (["3"], {**ADAPTERS, "": ["--combination", "svd", "--rank", "2"]})}
FORMULA = {
    "--weights": ["0.3", "0.7"],
    "--scale": ["2"],
    "--density": ["0.5"],
    "--seed": ["3"],
    "--t": ["0.3"],
}
OF_METHOD = {
    "linear": ("--weights",),
    "task_arithmetic": ("--weights", "--scale"),
    "model_stock": (),
    "slerp": ("--t",),
    "ties": ("--weights", "--scale", "--density"),
    "dare": ("--weights", "--scale", "--density", "--seed"),
}
for method, names in OF_METHOD.items():
    COMMANDS[f"merge {method}"] = (
        ["--base", "b", "--models", "m", "n", "--out", "o"],
        {"megatron_align.merge.merge:merge": Done},
        {**FOLDERS, **{name: FORMULA[name] for name in names}},
    )


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder to work in, with the configurations that commands name."""
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path / "model", "qwen2_7b")
    other = {**RUN_CONFIG, "train": {"steps": 3, "global_batch_size": 24}}
    for name, content in (("run", RUN_CONFIG), ("other", other)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return tmp_path


def observe(command, arguments, called, folder):
    """Run a tool; return how its work was called, what it printed, and what it wrote; or the line of its refusal."""
    calls, output, errors, before = [], io.StringIO(), io.StringIO(), set(folder.rglob("*"))

    def recorded(place, answer):
        def call(*given, **options):
            calls.append((place, re.sub(r" at 0x\w+", "", f"{given} {sorted(options.items())}")))
            if answer is Done:
                raise Done
            return answer

        return call

    tool, *rest = command.split()
    with ExitStack() as stack:
        for place, answer in called.items():
            module, _, name = place.partition(":")
            stack.enter_context(
                mock.patch.object(importlib.import_module(module), name, recorded(place, answer))
            )
        stack.enter_context(redirect_stdout(output))
        stack.enter_context(redirect_stderr(errors))
        try:
            if importlib.import_module(f"megatron_align.tools.{tool}").run([*rest, *arguments]) == 2:
                return errors.getvalue()
        except Done:
            pass
        except InputError as error:
            return str(error)
        wrote = sorted(set(folder.rglob("*")) - before)
        for path in reversed(wrote):
            path.rmdir() if path.is_dir() else path.unlink()
    return calls, output.getvalue(), wrote


def declared(command):
    """Return the options and positional arguments that a command's parser declares."""
    tool, *rest = command.split()
    found = []

    def stop(parser, *_, **__):
        found.extend(action for action in parser._actions if action.dest not in ("help", "print_config"))
        raise Done

    with (
        mock.patch.object(Parser, "parse", stop),
        mock.patch.object(ArgumentParser, "parse_args", stop),
        pytest.raises(Done),
    ):
        importlib.import_module(f"megatron_align.tools.{tool}").run(rest)
    return [max(action.option_strings, key=len, default=action.dest) for action in found]


def commands_of(tool):
    """Return a tool's commands, as its module names them, or the tool itself."""
    module = importlib.import_module(f"megatron_align.tools.{tool}")
    inner = getattr(module, "METHODS" if tool == "merge" else "COMMANDS", None)
    if tool == "evaluate":
        return ["evaluate", "evaluate compare"]
    return [f"{tool} {name}" for name in inner] if isinstance(inner, dict) else [tool]


def test_every_command_has_entries():
    assert sorted(COMMANDS) == sorted(each for tool in main.TOOLS for each in commands_of(tool))
    assert set(OF_METHOD) == set(METHODS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_changes_what_the_command_does_or_is_refused(command, place):
    arguments, called, options = COMMANDS[command]
    (place / "eval.yaml").write_text(yaml.safe_dump(EVALUATION))
    if command == "evaluate":
        (place / "other.yaml").write_text(yaml.safe_dump({**EVALUATION, "precision": "fp32"}))
    assert without_one_entry(declared(command), options) == []
    plain = observe(command, arguments, called, place)
    assert not isinstance(plain, str), plain
    assert plain == observe(command, arguments, called, place)
    for option, entry in options.items():
        values, needs = entry if isinstance(entry, tuple) else (entry, [])
        stubs = {**called, **needs} if isinstance(needs, dict) else called
        beside = list(needs) if isinstance(needs, tuple) else arguments
        more = stubs.pop("", []) if isinstance(needs, dict) else needs if isinstance(needs, list) else []
        beside = [*beside, *more]
        base = observe(command, beside, stubs, place)
        given = values if not option.startswith("-") else [*beside, option, *values]
        changed = observe(command, given, stubs, place)
        if isinstance(needs, str):
            assert isinstance(changed, str), (option, changed)
            assert needs in changed, option
        else:
            assert not isinstance(changed, str), (option, changed)
            assert changed != base, f"{command} {option} changes nothing"


def test_an_option_that_is_dropped_or_has_no_entry_is_found(place):
    """Without it no test above could fail."""
    arguments, called, options = COMMANDS["adapter merge"]
    with mock.patch("megatron_align.merge.adapter.merge_adapter", return_value=1):
        plain = observe("adapter merge", arguments, {}, place)
        assert observe("adapter merge", [*arguments, "--dtype", "float32"], {}, place) == plain
    assert without_one_entry([*options, "--new"], options) == ["--new needs an entry"]
    assert without_one_entry(["--base"], {"--base": 1, "--gone": 2}, {"--base": 3}) == [
        "--base has several entries",
        "--gone is no option",
    ]
