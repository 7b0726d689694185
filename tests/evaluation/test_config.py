"""A configuration that is wrong is one line that names task, key and what would be right; nothing has run then."""

import importlib.util
import re

import pytest

from megatron_align.errors import InputError
from megatron_align.evaluation.config import GenerateTask, load_evaluation, parse


def config(**changes):
    task = {"name": "a", "kind": "loss", "data": "x.jsonl"}
    return {"model": "m", "out": "o", "tasks": [task], **changes}


def task(**changes):
    return config(tasks=[{"name": "a", "kind": "generate", "data": "x.jsonl", **changes}])


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (config(tasks=[]), "at least one task"),
        (config(tasks=None), "tasks must be a list"),
        (config(modle="m"), "unknown configuration key 'modle'; did you mean 'model'?"),
        (config(model=None), "model must be given"),
        (config(precision="fp64"), "precision"),
        (config(sequence_length="long"), "sequence_length"),
        (
            config(parallel={"tensors": 2}),
            "parallel: unknown configuration key 'tensors'; did you mean 'tensor'?",
        ),
        (config(tasks=[{"name": "a", "kind": "losss", "data": "x"}]), "got 'losss'; did you mean 'loss'?"),
        (
            config(tasks=[{"name": "a", "data": "x"}]),
            "kind must be one of loss, preference, choice, generate, judge, got None",
        ),
        (config(tasks=[{"name": "a", "kind": "loss"}]), r"tasks\[0\] \(a\): data must be given"),
        (config(tasks=[{"name": "a/b", "kind": "loss", "data": "x"}]), "name of a file, got 'a/b'"),
        (config(tasks=config()["tasks"] * 2), "'a' twice"),
        (config(tasks=["loss"]), r"tasks\[0\] must be a mapping"),
        (config(tasks=[{"name": "a", "kind": "loss", "data": "x", "score": "reward"}]), "unknown .* 'score'"),
        (
            config(tasks=[{"name": "a", "kind": "preference", "data": "x", "score": "implicit_reward"}]),
            "needs it",
        ),
        (
            config(
                tasks=[{"name": "a", "kind": "preference", "data": "x", "score": "logprob", "reference": "r"}]
            ),
            "belongs",
        ),
        (task(temperature="hot"), "temperature"),
        (task(top_p=0.5), "no effect with temperature 0"),
        (task(extract="("), "must be a regular expression"),
        (task(check="ifeval", extract="x"), "does not apply"),
        (task(kind="judge", judge="j"), "url must be given"),
        (task(kind="judge", judge="j", url="localhost:1"), "like http://host:port"),
        (task(kind="judge", judge="j", url="http://x", tries=0), "tries must be at least 1"),
        (task(limit=0), "limit must be at least 1"),
        (task(check="math"), r"math-verify.* pip install 'megatron-align\[eval\]'"),
    ],
)
def test_wrong_configurations_are_one_line(content, line, monkeypatch):
    if "math-verify" in line:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # it is not installed
    with pytest.raises(InputError) as error:
        load_evaluation(content)
    assert re.search(line, str(error.value)), error.value
    assert "\n" not in str(error.value)


def test_the_command_line_wins_over_the_file(tmp_path):
    file = tmp_path / "eval.yaml"
    file.write_text(
        'model: {path: m}\nout: o\ntasks:\n- {name: a, kind: generate, data: [x, y], stop: ["\\n"], seed: 3}\n'
    )
    loaded = parse(["--config", str(file), "--out=elsewhere", "--precision", "fp32"], "evaluate")
    assert (loaded.model, loaded.out, loaded.precision) == ("m", "elsewhere", "fp32")
    [asked] = loaded.tasks
    assert isinstance(asked, GenerateTask)
    assert (asked.sources, asked.check) == (("x", "y"), "exact_match")
    assert (asked.sampling().stop, asked.sampling().seed, asked.sampling().temperature) == (("\n",), 3, 0)
    with pytest.raises(InputError, match="no option --presicion; did you mean '--precision'"):
        parse(["--config", str(file), "--presicion", "fp32"], "evaluate")
    with pytest.raises(InputError, match="needs --config"):
        parse([], "evaluate")
    with pytest.raises(InputError, match="found none at 'absent.yaml'"):
        parse(["--config", "absent.yaml"], "evaluate")
