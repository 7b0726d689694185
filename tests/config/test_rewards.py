"""Rewards are a list of entries, each with the options of its kind: all are checked, and an unknown one is refused."""

from dataclasses import dataclass, replace
from typing import get_args, get_type_hints

import pytest

from megatron_align.config.rewards import KINDS, InstructionReward, RewardConfig, build_rewards
from megatron_align.config.run import ObjectiveNames, load, to_dict
from megatron_align.errors import InputError
from megatron_align.objectives.configuration import load_config
from megatron_align.rollout.verifiers import instructions


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Options of an objective that trains on rollouts."""

    name: str = "sampling"
    minibatches: int = 1


OBJECTIVES = ObjectiveNames(lambda _: Sampling, lambda _: [])
RUN = {
    "model": {"path": "m"},
    "data": {"train": "d"},
    "checkpoint": {"dir": "c"},
    "train": {"steps": 1, "global_batch_size": 4},
}
MATH = {"kind": "math"}


def rewards(entries, overrides=()):
    config = load({**RUN, "rewards": entries}, overrides, OBJECTIVES)
    assert (
        load(to_dict(config), (), OBJECTIVES) == config
    )  # what is written into checkpoint.dir is read again
    return config.rewards


def test_a_reward_is_named_by_its_kind_or_its_function():
    named = rewards([MATH, {"kind": "function", "path": "~/f.py:score"}, {"kind": "code", "name": "tests"}])
    assert [reward.label for reward in named] == ["math", "score", "tests"]
    assert not named[1].path.startswith("~")


def test_every_kind_has_its_options():
    given = {
        "model": {"path": "p"},
        "function": {"path": "f.py:score"},
        "endpoint": {"url": "http://h:1/score"},
        "length": {"max": 9},
        "regex": {"pattern": "a"},
    }
    built = rewards([{"kind": kind, **given.get(kind, {})} for kind in KINDS])
    assert [type(reward) for reward in built] == list(KINDS.values())
    assert get_args(get_type_hints(InstructionReward)["metric"]) == instructions.METRICS


@pytest.mark.parametrize(
    ("entries", "line"),
    [
        ([MATH, MATH], "each needs a name of its own, got 'math' twice"),
        ([{"kind": "maths"}], r"rewards\[0\].kind must be one of .*did you mean 'math'\?"),
        ([{"weight": 1}], r"rewards\[0\].kind must be one of .*, got null"),
        (
            [MATH, {"kind": "regex", "patern": "a"}],
            r"unknown .* 'rewards\[1\].patern'; did you mean 'pattern'",
        ),
        ([{"kind": "math", "pattern": "a"}], r"unknown configuration key 'rewards\[0\].pattern'"),
        ([{"kind": "model"}], r"rewards\[0\].path is missing"),
        ([{"kind": "regex", "pattern": "("}], "reward regex: pattern must be a regular expression"),
        ([{"kind": "math", "extract": "["}], "reward math: extract must be a regular expression"),
        ([{"kind": "length"}], "length needs min or max, got neither"),
        ([{"kind": "length", "min": 5, "max": 3}], "max must be at least 5, got 3"),
        ([{"kind": "length", "max": 3, "ramp": 0}], "ramp must be at least 1, got 0"),
        ([{"kind": "endpoint", "url": "h:1"}], "url must be http://HOST"),
        ([{"kind": "endpoint", "url": "http://h", "retries": -1}], "retries must be at least 0, got -1"),
        ([{"kind": "function", "path": "f.py"}], r"the path of a function is FILE.py:FUNCTION, got 'f.py'"),
        ([{"kind": "function", "path": "f.py:g", "timeout": 0}], "timeout must be positive"),
        ([{**MATH, "weight": "high"}], r"rewards\[0\].weight must be a number or a mapping"),
        ([{**MATH, "weight": float("nan")}], "it must be finite"),
        ([{**MATH, "weight": {}}], "weight must name a category"),
        ([{**MATH, "category": "kind"}], "category is read where weight is"),
        ([{**MATH, "normalize": "all"}], r"rewards\[0\].normalize must be one of none, group, batch"),
        ([{**MATH, "name": "a b"}], "a name is part of a metric's"),
        (MATH, r"rewards must be a list"),
        (["math"], r"rewards\[0\] must be a mapping"),
    ],
)
def test_bad_entries_are_one_line(entries, line):
    with pytest.raises(InputError, match=line):
        rewards(entries)


def test_an_entry_is_changed_by_its_name():
    entries = [{**MATH, "weight": {"maths": 1, "chat": 0.5}}, {"kind": "length", "name": "v1.2", "max": 9}]
    changed = rewards(entries, ["rewards.math.weight=0.3", "rewards.v1.2.max=7"])
    assert changed[0].weight == 0.3
    assert changed[1].max == 7
    assert rewards(entries, {"rewards.math.weight": {"chat": 2}})[0].weight == {"chat": 2.0}
    assert rewards(entries, {"rewards": [MATH]}) == build_rewards([MATH])
    assert [reward.label for reward in rewards([MATH], ["rewards+={kind: code}"])] == ["math", "code"]
    with pytest.raises(InputError, match=r"no reward is named mth, .*did you mean 'math'\?"):
        rewards(entries, ["rewards.mth.weight=1"])


def test_rewards_of_an_objective_that_samples_nothing_are_refused():
    with pytest.raises(InputError, match="they do not apply to objective sft"):
        load_config({**RUN, "rewards": [MATH]})
    with pytest.raises(InputError, match=r"'reward'; did you mean 'rewards'\?"):
        load_config({**RUN, "reward": [MATH]})


def test_entries_are_equal_by_their_options():
    [reward] = build_rewards([MATH])
    assert isinstance(reward, RewardConfig)
    assert replace(reward, weight=2.0) != reward
