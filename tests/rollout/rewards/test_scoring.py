"""Every reward gives one number or None for each completion; whatever else happens is one line with its name."""

import importlib.util
import math
import re
import threading
from pathlib import Path

import pytest
import yaml

from megatron_align.config.rewards import build_rewards as read_rewards
from megatron_align.errors import InputError, TrainingFault
from megatron_align.records import Message
from megatron_align.rollout.prompts import PromptRecord
from megatron_align.rollout.rewards import function
from megatron_align.rollout.rewards.scoring import (
    build_rewards,
    check_rewards,
    combine,
    mean_rewards,
    score_rewards,
)
from megatron_align.rollout.types import Completion
from megatron_align.rollout.verifiers import patterns
from tests.harness.http_server import serving


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    monkeypatch.setattr(function, "FIRST_WAIT", 0.01)


def completions(*texts):
    return [
        Completion(
            token_ids=tuple(range(len(text))),
            logprobs=(0.0,) * len(text),
            text=text,
            finish_reason="stop",
            weight_version=0,
        )
        for text in texts
    ]


def group(*texts, where="p.jsonl:1", prompt="q", **raw):
    return PromptRecord(raw=raw, where=where, prompt=prompt), completions(*texts)


def built(*entries):
    return build_rewards(read_rewards(list(entries)))


def score(entries, *groups):
    rewards = built(*([entries] if isinstance(entries, dict) else entries))
    try:
        check_rewards(rewards, [record for record, _ in groups])
        return score_rewards(rewards, groups)
    finally:
        for reward in rewards:
            reward.reward.close()


class Written:
    """Functions in a user's file."""

    def __init__(self, folder):
        self.folder, self.count = folder, 0

    def __call__(self, body, head="def score(prompts, completions, **columns):"):
        self.count += 1
        file = self.folder / f"my_rewards_{self.count}.py"
        lines = "\n".join(f"    {line}" for line in body.splitlines())
        file.write_text(
            f"import asyncio, glob, itertools, os, time\ncalls = itertools.count()\n\n\n{head}\n{lines}\n"
        )
        return {"kind": "function", "path": f"{file}:score"}


@pytest.fixture
def write(tmp_path):
    return Written(tmp_path)


def test_verifiers_and_texts():
    groups = [
        group("it is 4", "4", where="a:1", answer="4"),
        group(
            "no\n5", "a b c", where="a:2", answer=5, instruction_id_list=["punctuation:no_comma"], kwargs=[{}]
        ),
    ]
    entries = [
        {"kind": "exact_match", "extract": r"\d"},
        {"kind": "contains"},
        {"kind": "regex", "pattern": r"\d$"},
        {"kind": "regex", "pattern": r"\d", "fullmatch": True, "name": "digit"},
        {"kind": "length", "min": 2, "max": 5, "ramp": 4},
        {"kind": "length", "name": "words", "unit": "words", "max": 1},
        {"kind": "length", "name": "characters", "unit": "characters", "min": 3},
    ]
    assert score(entries, *groups) == {
        "exact_match": [[1, 1], [1, 0]],
        "contains": [[1, 1], [1, 0]],
        "regex": [[1, 1], [1, 0]],
        "digit": [[0, 1], [0, 0]],
        "length": [[-0.5, -0.25], [0, 0]],
        "words": [[-1, 0], [-1, -1]],
        "characters": [[0, -1], [0, 0]],
    }
    assert score({"kind": "ifeval"}, group("a, b", "a", **groups[1][0].raw)) == {"ifeval": [[0, 1]]}


@pytest.mark.slow  # it starts a process; its check has tests of its own
@pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs math-verify")
def test_mathematics():
    assert score({"kind": "math"}, group("$\\frac{1}{2}$", "1/3", answer="0.5")) == {"math": [[1, 0]]}


def test_code():
    tests = {"test_list": ["assert f(1) == 2"]}
    answers = ["```python\ndef f(x):\n    return x + 1\n```", "```python\ndef f(x):\n    return x\n```"]
    chat = (Message("user", "write f"),)
    assert score({"kind": "code"}, group(*answers, prompt=chat, **tests)) == {"code": [[1, 0]]}


def test_a_prompt_without_an_answer_is_found_before_the_first_completion():
    for kind in ("exact_match", "contains", "code", "ifeval"):
        with pytest.raises(InputError, match="^b:2: "):
            check_rewards(built({"kind": kind}), [PromptRecord(raw={}, where="b:2", prompt="q")])


def test_a_function_is_given_prompts_completions_and_columns_as_trl_gives_them(write):
    body = """assert prompts == ["q", "q", [{"role": "user", "content": "hi"}]], prompts
assert completions == ["a", "bb", [{"role": "assistant", "content": "c"}]], completions
assert columns == {"level": [1, 1, None], "topic": [None, None, "x"], "completion_ids": [[0], [0, 1], [0]]}, columns
return [0.5, None, True]"""
    groups = [group("a", "bb", level=1), group("c", prompt=(Message("user", "hi"),), topic="x")]
    assert score(write(body), *groups) == {"score": [[0.5, None], [1.0]]}


def test_a_function_names_the_arguments_that_it_takes(write):
    lengths = write(
        "return [len(c) + n for c, n in zip(completions, level)]", "def score(completions, level, scale=1):"
    )
    assert score(lengths, group("a", "bb", level=1, topic="x")) == {"score": [[2, 3]]}
    needs = write("return 1", "def score(completions, levl):")
    with pytest.raises(InputError, match=r"reward score: the function needs 'levl', .*did you mean 'level'"):
        score(needs, group("a", level=1))
    with pytest.raises(InputError, match=r"p.jsonl:1: the field 'completions' has the name of an argument"):
        score(write("return 1"), group("a", completions=1))


def test_the_documented_list_and_function(tmp_path, monkeypatch):
    page = (Path(__file__).parents[3] / "docs" / "online.md").read_text(encoding="utf-8")
    [example] = re.findall(r'```python\n("""my_rewards\.py"""\n.*?)```', page, re.DOTALL)
    [listed] = re.findall(r"```yaml\n(rewards:\n.*?)```", page, re.DOTALL)
    (tmp_path / "my_rewards.py").write_text(example)
    monkeypatch.chdir(tmp_path)
    rewards = read_rewards(yaml.safe_load(listed)["rewards"])
    assert [reward.label for reward in rewards] == ["correct", "model", "polite", "length"]
    [polite] = [{"kind": reward.kind, "path": reward.path} for reward in rewards if reward.kind == "function"]
    groups = [
        group("Thanks", "no", language="en"),
        group("danke", language="fr", prompt=(Message("user", "hi"),)),
    ]
    assert score(polite, *groups) == {"polite": [[1, 0], [None]]}


def test_an_async_function_and_a_callable_object(write):
    body = "await asyncio.sleep(0.01)\nreturn [float(len(c)) for c in completions]"
    assert score(write(body, "async def score(completions):"), group("a", "bb")) == {"score": [[1, 2]]}
    klass = write("def __call__(self, completions):\n    return [1] * len(completions)", "class Scorer:")
    file = Path(klass["path"].rpartition(":")[0])
    file.write_text(file.read_text() + "\n\nscore = Scorer()\n")
    assert score(klass, group("a", "bb")) == {"score": [[1, 1]]}


@pytest.mark.parametrize(
    "returned", ["np.array([1, 2.5])", "torch.tensor([1, 2.5])", "(np.float32(1), torch.tensor(2.5))"]
)
def test_numbers_of_other_libraries(write, returned):
    assert score(write(f"import numpy as np, torch\nreturn {returned}"), group("a", "b")) == {
        "score": [[1, 2.5]]
    }


@pytest.mark.parametrize(
    ("returned", "line"),
    [
        ("[1.0, float('nan')]", "must return a finite number or None, got nan for completion 1 of p.jsonl:1"),
        ("[float('inf'), 1.0]", "must return a finite number or None, got inf for completion 0 of p.jsonl:1"),
        ("[1.0, 'good']", "must return a finite number or None, got 'good' for completion 1"),
        ("[1.0, [2.0]]", "must return a finite number or None, got .2.0. for completion 1"),
        ("[1.0]", "must return a number or None for each of 2 completions, got 1"),
        ("[[1.0], [2.0], [3.0]]", "must return a number or None for each of 2 completions, got 3"),
        ("None", "must return a list of 2 numbers or None, one for each completion, got null"),
        ("(x for x in [1.0, 2.0])", "must return a list of 2 numbers"),
        ("1.0", "must return a list of 2 numbers"),
    ],
)
def test_bad_values_are_named(write, returned, line):
    with pytest.raises(InputError, match=f"^reward score {line}"):
        score(write(f"return {returned}"), group("a", "b"))


def test_a_function_that_raises_is_tried_again_then_named_with_its_line(write):
    passing = write("if next(calls) < 2:\n    raise OSError('busy')\nreturn [1.0]")
    assert score(passing, group("a")) == {"score": [[1]]}
    for raised, head in (
        ("exit(3)", "def score(completions):"),
        ("{}['x']", "async def score(completions):"),
    ):
        failing = write(f"next(calls)\n{raised}", head)
        place = failing["path"].replace(":score", ":7")
        with pytest.raises(
            InputError,
            match=rf"^reward score raised (KeyError|SystemExit): .* at {place}, in each of 3 tries$",
        ):
            score(failing, group("a"))
        with pytest.raises(InputError, match=rf"at {place}$"):
            score({**failing, "retries": 0}, group("a"))


@pytest.mark.parametrize("head", ["def score(completions):", "async def score(completions):"])
def test_a_function_that_takes_too_long_is_tried_again_then_named(write, head, tmp_path):
    """Nobody waits for it: it ends after the test only, by a file, or after a minute with a value."""
    sleep, over = "await asyncio.sleep" if "async" in head else "time.sleep", tmp_path / "over"
    endless = f"for _ in range(1200 * (next(calls) < TIMES)):\n    if os.path.exists({str(over)!r}):\n        break\n"
    endless += f"    {sleep}(0.05)\nreturn [1.0]"
    slow_once = write(endless.replace("TIMES", "1"), head)
    assert score({**slow_once, "timeout": 0.5}, group("a")) == {"score": [[1]]}
    line = r"^reward score took longer than its timeout of 0.1 s for 1 completions, in each of 2 tries$"
    with pytest.raises(TrainingFault, match=line):
        score({**write(endless.replace("TIMES", "9"), head), "timeout": 0.1, "retries": 1}, group("a"))
    over.touch()


def test_files_and_functions_that_are_not_there(write, tmp_path):
    path = write("return 1")["path"]
    with pytest.raises(InputError, match=r"reward scor: path: no function 'scor' .*did you mean 'score'\?"):
        built({"kind": "function", "path": path[:-1]})
    with pytest.raises(
        InputError, match="reward score: path: FILE.py:FUNCTION needs a Python file, found none"
    ):
        built({"kind": "function", "path": f"{tmp_path}/none.py:score"})
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(
        InputError, match="broken.py raised ZeroDivisionError when imported: division by zero"
    ):
        built({"kind": "function", "path": f"{tmp_path}/broken.py:score"})


def test_an_endpoint_scores_in_batches():
    bodies, lock = [], threading.Lock()

    def answer(path, body):
        with lock:
            bodies.append(body)
        return 200, {"rewards": [None if text == "b" else float(len(text)) for text in body["completions"]]}

    with serving(answer) as url:
        given = {"kind": "endpoint", "url": f"{url}/score", "batch_size": 2}
        assert score(given, group("a", "b", level=1), group("ccc")) == {"endpoint": [[1, None], [3]]}
    first, last = sorted(bodies, key=lambda body: -len(body["prompts"]))
    assert first == {"prompts": ["q", "q"], "completions": ["a", "b"], "columns": {"level": [1, 1]}}
    assert last == {"prompts": ["q"], "completions": ["ccc"], "columns": {"level": [None]}}


def test_a_pattern_that_never_ends_is_named(monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    endless = {"kind": "regex", "pattern": r"(a+)+$", "fullmatch": True}
    line = r"^reward regex: the pattern must decide within .* completion 1 of p.jsonl:1 .*, got \(a\+\)\+\$$"
    with pytest.raises(InputError, match=line):
        score(endless, group("aaa", "a" * 60 + "b"))
    process = patterns.PatternProcess(r"(a+)+$")
    texts = ("é\n\x85\ud800aa", "a" * 60 + "b", "b", "aa")  # after the endless one the process starts again
    assert [process.matches(text) for text in texts] == [True, None, False, True]
    process.close()


RUBBISH = [
    ((400, "no"), TrainingFault, "^reward endpoint: http.* refused a request: status 400: no"),
    (
        (200, {"reward": [1]}),
        InputError,
        r"must answer \{rewards: \[...\]\} .* 1 completions, got \{'reward'",
    ),
    ((200, {"rewards": [1, 2]}), InputError, "request's 1 completions, got 2 of them"),
    (
        (200, {"rewards": ["x"]}),
        InputError,
        "^reward endpoint must return a finite number or None, got 'x' for",
    ),
    (
        (200, '{"rewards": [NaN]}'),
        InputError,
        "^reward endpoint must return a finite number or None, got nan",
    ),
]


def test_an_endpoint_that_answers_rubbish_or_is_down_is_named_and_never_0():
    answers = [answer for answer, _, _ in RUBBISH]
    with serving(lambda *_: answers.pop(0)) as url:
        given = {"kind": "endpoint", "url": url, "retries": 0}
        for _, error, line in RUBBISH:
            with pytest.raises(error, match=line):
                score(given, group("a"))
        with pytest.raises(InputError, match="^reward endpoint: a prompt's record is not JSON"):
            score(given, group("a", seen={1}))
    with pytest.raises(TrainingFault, match="^reward endpoint: http.* failed 1 times, the last time"):
        score(given, group("a"))


def test_rewards_overlap_where_they_wait(write, tmp_path):
    """Each waits until all four have begun."""
    entries = []
    for i in range(4):
        begin = f"open({str(tmp_path / f'{i}.begun')!r}, 'w').close()\nfor _ in range(1200):\n"
        wait = f"    if len(glob.glob({str(tmp_path / '*.begun')!r})) == 4:\n        return [1.0]\n    time.sleep(0.05)"
        entries.append({**write(f"{begin}{wait}\nreturn [0.0]"), "name": f"r{i}"})
    assert score(entries, group("a")) == {f"r{i}": [[1]] for i in range(4)}


CATEGORIES = [
    group("4", "5", where="a:1", category="maths", answer="4"),
    group("hello", "hi", where="a:2", category="chat"),
]


def test_weights_by_category_score_only_the_prompts_that_they_name():
    entries = [
        {"kind": "exact_match", "weight": {"maths": 2.0}},
        {"kind": "length", "max": 2, "ramp": 10, "weight": {"chat": 1.0, "maths": 0.0}},
        {"kind": "regex", "pattern": "h", "weight": 0.5},
    ]
    rewards, records = built(*entries), [record for record, _ in CATEGORIES]
    check_rewards(rewards, records)  # the chat prompt has no answer, and needs none
    values = score_rewards(rewards, CATEGORIES)
    assert values == {
        "exact_match": [[1, 0], [None, None]],
        "length": [[0, 0], [-0.3, 0]],
        "regex": [[0, 0], [1, 1]],
    }
    reward_C, scored_C = combine(rewards, values, records)
    assert reward_C.tolist() == pytest.approx([2, 0, 0.2, 0.5])
    assert scored_C.all()
    assert mean_rewards({name: sum(of_prompts, []) for name, of_prompts in values.items()}) == {
        "reward/exact_match": 0.5,
        "reward/length": pytest.approx(-0.075),
        "reward/regex": 0.5,
    }


@pytest.mark.parametrize(
    ("weight", "field", "line"),
    [
        ({"math": 1, "chat": 1, "maths": 1}, None, "weight has the category 'math', .*did you mean 'maths'"),
        ({"maths": 1}, None, "^a:2: no reward scores this prompt"),
        (
            {"maths": 1},
            "topic",
            "a:1: field 'topic' must be a text: the weight of reward regex depends on it",
        ),
    ],
)
def test_categories_that_do_not_fit_are_refused(weight, field, line):
    with pytest.raises(InputError, match=line):
        check_rewards(
            built({"kind": "regex", "pattern": "a", "weight": weight, "category": field}),
            [record for record, _ in CATEGORIES],
        )


def test_a_completion_that_nothing_scores_has_no_reward(write):
    rewards = built(write("return [None, 2.0]"))
    groups = [group("a", "b")]
    check_rewards(rewards, [groups[0][0]])
    values = score_rewards(rewards, groups)
    reward_C, scored_C = combine(rewards, values, [groups[0][0]])
    assert scored_C.tolist() == [False, True]
    assert reward_C[1] == 2
    assert math.isnan(mean_rewards({"x": [None]})["reward/x"])
    assert mean_rewards({"score": values["score"][0]}) == {"reward/score": 2}
