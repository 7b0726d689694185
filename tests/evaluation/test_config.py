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
        (config(adapter={"../x": "a"}), r"an adapter must not be named '\.\./x'"),
        (config(adapter={"one": "a", ".two": "b"}), r"an adapter must not be named '\.two'"),
        (config(adapter={"base": "a"}), "an adapter must not be named 'base'"),
        (
            config(parallel={"tensors": 2}),
            "parallel: unknown configuration key 'tensors'; did you mean 'tensor'?",
        ),
        (config(tasks=[{"name": "a", "kind": "losss", "data": "x"}]), "got 'losss'; did you mean 'loss'?"),
        (
            config(tasks=[{"name": "a", "data": "x"}]),
            "kind must be one of loss, preference, choice, generate, judge, lm_eval, got null",
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


def test_files_are_read_as_configurations_of_training_are(tmp_path, monkeypatch):
    """One reader of YAML, one conversion, and ``~`` in every path."""
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "eval.yaml"
    tasks = "tasks: [{name: a, kind: generate, data: [~/a.jsonl, b.jsonl], max_tokens: 1e2, chat_template: ~/t.jinja}, "
    tasks += "{name: j, kind: judge, data: ~/c.jsonl, url: 'http://x', judge: m, baseline: ~/s.jsonl}]\n"
    file.write_text(f"model: ~/m\nout: ~/o\nsequence_length: 4.0\n{tasks}")
    loaded = load_evaluation("~/eval.yaml", {"sequence_length": "1e3"})
    home = str(tmp_path)
    assert (loaded.model, loaded.out, loaded.sequence_length) == (f"{home}/m", f"{home}/o", 1000)
    generated, judged = loaded.tasks
    assert generated.sources == (f"{home}/a.jsonl", "b.jsonl")
    assert (generated.max_tokens, generated.chat_template) == (100, f"{home}/t.jinja")
    assert (judged.sources, judged.baseline) == ((f"{home}/c.jsonl",), f"{home}/s.jsonl")
    preference = {
        "name": "a",
        "kind": "preference",
        "data": "x",
        "score": "implicit_reward",
        "reference": "~/r",
    }
    assert load_evaluation(config(tasks=[preference])).tasks[0].reference == f"{home}/r"
    for text, line in (
        ("model: m\nmodel: n\n", "line 2.*'model' is given twice"),
        ("- model\n", "must hold a mapping of model, out and tasks, got a list"),
        (f"model: m\nout: o\ntasks: {'[' * 99}\n", "not valid YAML"),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=line):
            load_evaluation(file)
    for changes, line in (
        ({"sequence_length": True}, "sequence_length must be a whole number or null, got true"),
        ({"template_date": "yesterday"}, "template_date must be a date such as 2024-07-26"),
        ({"out": 3}, "out must be text, got 3: put it into quotes"),
    ):
        with pytest.raises(InputError, match=line):
            load_evaluation(config(**changes))
    with pytest.raises(InputError, match=r"tasks\[0\] \(a\): max_tokens must be a whole number, got 1.5"):
        load_evaluation(task(max_tokens=1.5))


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
    adapters = parse(["--config", str(file), "--adapter", "adapter=A", "b=B"], "evaluate").adapter
    assert adapters == {"adapter": "A", "b": "B"}
    assert parse(["--config", str(file), "--adapter", "A"], "evaluate").adapter == "A"
    with pytest.raises(InputError, match="no option --presicion; did you mean '--precision'"):
        parse(["--config", str(file), "--presicion", "fp32"], "evaluate")
    with pytest.raises(InputError, match="needs --config"):
        parse([], "evaluate")
    with pytest.raises(InputError, match="found none at 'absent.yaml'"):
        parse(["--config", "absent.yaml"], "evaluate")
