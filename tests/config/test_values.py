"""An option of the wrong type is one line with its key, what it must be and what was found, in plain words.

Every option of every objective is tried with every kind of value. Whole numbers may be written as 1e6 and 3.0.
"""

import re
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest

from megatron_align.config.run import SECTIONS
from megatron_align.config.values import convert, description, option_types
from megatron_align.errors import InputError
from megatron_align.evaluation.config import load_evaluation
from megatron_align.objectives.configuration import load_config, parse
from megatron_align.objectives.registry import OBJECTIVES

RUN = {"model": {"path": "m"}, "data": {"train": "d"}, "train": {"steps": 3}, "checkpoint": {"dir": "c"}}
VALUES: list[Any] = ["abc", 3, 2.5, True, None, [], ["x"], {}, {"a": 1}, [[1]], -1, 1e30, 10**200]
VALUES += [float("nan"), float("inf"), "1e400", "", "null", "[", "{", "[1,2", "a\nb", [None], {"path": [1]}]
PYTHON = re.compile(
    r"<class|typing|Literal|Union|NoneType|\bNone\b|Expected|Parser|argparse|subtype|object at|\bint\b"
)


def run_with(objective, section, option, value):
    sections = {**RUN, "objective": {"name": objective}}
    if objective in ("grpo", "rloo", "ppo"):
        sections["rollout"] = {"engine": "data"}
    if objective == "distill":
        sections["reference"] = {"path": "t", "mode": "cached"}
    return load_config({**sections, section: {**sections.get(section, {}), option: value}})


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_option_with_every_kind_of_value(objective):
    sections = {**(SECTIONS if objective == "dpo" else {}), "objective": OBJECTIVES[objective].Options}
    for section, kind in sections.items():
        for option in option_types(kind):
            for value in VALUES:
                try:
                    run_with(objective, section, option, value)
                except InputError as error:
                    line = str(error)
                    assert option in line, line
                    assert not PYTHON.search(line), line
                    assert "\n" not in line
                    assert len(line) < 400, line


@pytest.mark.parametrize("text", ["1e6", "1_000_000", "1000000.0", "1.0e6"])
def test_whole_numbers_in_any_notation(text, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(f"train: {{steps: {text}, recompute_layers: 2.0}}")
    given = ["--model.path=m", "--data.train=d", "--checkpoint.dir=c"]
    for config in (
        parse(["--config", str(file), *given]),
        parse([*given, "--train.steps", text, "--train.recompute_layers=2.0"]),
    ):
        assert (config.train.steps, config.train.recompute_layers) == (1_000_000, 2)
        assert type(config.train.steps) is int
    assert load_config(RUN, {"train.steps": 3.0}).train.steps == 3


@pytest.mark.parametrize(
    "key, value, line",
    [
        ("train.steps", 2.5, "train.steps must be a whole number or null, got 2.5"),
        ("train.steps", "many", "train.steps must be a whole number or null, got 'many'"),
        ("train.steps", True, "train.steps must be a whole number or null, got true"),
        ("train.steps", 1e30, "train.steps must be a whole number or null, got 1e+30: at most 9,223,"),
        ("optimizer.lr", "1e39", "optimizer.lr must be a number, got '1e39': it must be finite, at most 3.4e+38"),
        ("objective.margin_scale", 1e39, "objective.margin_scale must be a number or null, got 1e+39: it must be"),
        ("optimizer.lr", float("nan"), "optimizer.lr must be a number, got nan: it must be finite"),
        ("optimizer.schedule", "Cosine", "one of cosine, linear, constant, got 'Cosine'; did you mean 'cosine'?"),
        ("optimizer.betas", "0.9 0.95", "must be a list of 2 numbers, got '0.9 0.95': write [0.9, 0.95]"),
        ("train.recompute_modules", "mlp", "a list of attention, mlp, norms, got 'mlp': write [mlp]"),
        ("train.recompute_modules", ["mpl"], "modules[0] must be one of attention, mlp, norms, got 'mpl'; did you"),
        ("data.packing", 1, "data.packing must be true or false, got 1: write true or false"),
        ("data.train", {"path": "a"}, "got {'path': 'a'}: write a list, [{...}]"),
        ("data.train", [{"path": "a", "wieght": 2}], "key 'data.train[0].wieght'; did you mean 'weight'?"),
        ("data.train", [{"weight": 2}], "data.train[0].path is missing"),
        ("data.cache", 2026, "data.cache must be text or null, got 2026: put it into quotes"),
        ("parallel.timeout_seconds", 1e30, "parallel.timeout_seconds must be positive and at most 1e7, got 1e+30"),
        ("train.global_batch_size", 9e18, "train.global_batch_size must be at most 10,000,000, got 9000000"),
        ("objective.loss_type", "ippo", "discopop, margin, reward_aware, sft; got 'ippo'; did you mean 'ipo'?"),
    ],
)  # fmt: skip
def test_the_line_says_what_is_wanted(key, value, line):
    with pytest.raises(InputError) as error:
        load_config({**RUN, "objective": {"name": "dpo"}}, {key: value})
    assert line in str(error.value)


class Colour(Enum):
    red = 1


def test_types_of_a_users_objective():
    assert convert("red", Colour, "x") is Colour.red
    assert convert("a/b", Path | None, "x") == Path("a/b")
    assert convert("null", Path | None, "x") is None
    assert convert({"a": "2"}, dict[str, int], "x") == {"a": 2}
    assert convert([1, "2"], list[int], "x") == [1, 2]
    assert description(dict[str, int]) == "a mapping"
    assert description(Literal["a", "b"] | None) == "one of a, b or null"
    for value, wanted in (("blue", Colour), ({"a": "b"}, dict[str, int]), ("two", tuple[int, int])):
        with pytest.raises(InputError, match="^x.* must be") as error:
            convert(value, wanted, "x")
        assert not PYTHON.search(str(error.value)), error.value


@pytest.mark.parametrize(
    "key", ["9" * 5000, 10**200, 9, None, "a\nb"], ids=["text", "number", "digit", "null", "lines"]
)
@pytest.mark.parametrize("place", ["run", "evaluation"])
def test_a_key_of_any_kind_and_length_is_one_short_line(place, key):
    of_an_evaluation = {
        "model": "m",
        "out": "o",
        "tasks": [{"name": "a", "kind": "loss", "data": "x"}],
        key: 1,
    }
    with pytest.raises(InputError, match="unknown configuration key '") as error:
        load_config(RUN, {"model.adapter": {key: 1}}) if place == "run" else load_evaluation(of_an_evaluation)
    assert len(str(error.value)) < 300
    assert "\n" not in str(error.value)
