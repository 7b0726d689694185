"""A win needs both orders, ties count half, replies are asked for once, and length alone earns nothing."""

import json

import numpy as np
import pytest

from megatron_align.errors import InputError
from megatron_align.evaluation.config import JudgeTask
from megatron_align.evaluation.judge import (
    METRICS,
    Comparison,
    Judge,
    length_controlled_win_rate,
    read_baselines,
    require_a_verdict,
)
from tests.harness.http_server import serving


class Script:
    """A judging model: ``decide(answer A, answer B) -> reply``."""

    def __init__(self, decide):
        self.decide, self.bodies = decide, []

    def __call__(self, path, body):
        assert path == "/v1/chat/completions"
        self.bodies.append(body)
        shown = body["messages"][1]["content"]
        one, other = shown.split("# Answer A\n\n")[1].split("\n\n# Answer B\n\n")
        return 200, {"choices": [{"message": {"content": self.decide(one, other)}}]}


def task(url, **options):
    return JudgeTask(name="j", data="x", url=url, judge="big", **{"workers": 2, **options})


def scores(script, folder, answers, **options):
    with serving(script) as url:
        return Judge(task(url, **options), folder, 0).scores(answers)


def better(one, other):
    """Prefer the answer with the greater number, whatever the order."""
    return "Thinking.\n[[A]]" if int(one) > int(other) else "[[B]]" if int(one) < int(other) else "So [[C]]"


def test_wins_losses_and_ties(tmp_path):
    answers = [("3", Comparison("q", "1")), ("1", Comparison("q", "22")), ("2", Comparison("q", "2"))]
    script = Script(better)
    won, lost, tied = scores(script, tmp_path, answers)
    assert [s["win_rate"] for s in (won, lost, tied)] == [1, 0, 0.5]
    assert (won["wins"], lost["losses"], tied["ties"]) == (1, 1, 1)
    assert lost["length_difference"] == -1
    assert set(METRICS) < set(won)
    assert len(script.bodies) == 6
    body = script.bodies[0]
    assert (body["model"], body["temperature"]) == ("big", 0)


def test_a_judge_that_prefers_a_place_makes_ties(tmp_path):
    [score] = scores(Script(lambda *_: "[[A]]"), tmp_path, [("3", Comparison("q", "1"))])
    assert (score["win_rate"], score["ties"], score["unjudged"]) == (0.5, 1, 0)


def test_replies_are_kept_and_never_requested_twice(tmp_path):
    answers = [("3", Comparison("q", "1")), ("1", Comparison("q", "2"))]
    script = Script(better)
    with serving(script) as url:
        first = Judge(task(url), tmp_path, 0).scores(answers)
        [file] = tmp_path.iterdir()
        replies = [json.loads(line)["reply"] for line in file.read_text().splitlines()]
        assert sorted(replies) == ["Thinking.\n[[A]]", "Thinking.\n[[A]]", "[[B]]", "[[B]]"]
        file.write_text(file.read_text() + '{"key": "cut')  # killed within a line
        script.bodies.clear()
        assert Judge(task(url), tmp_path, 0).scores(answers) == first
        assert not script.bodies
        Judge(task(url), tmp_path, 0).scores([*answers, ("5", Comparison("q", "2"))])
    assert len(script.bodies) == 2


def test_replies_of_another_endpoint_or_length_are_not_used(tmp_path):
    answers = [("3", Comparison("q", "1"))]
    one, other = Script(better), Script(better)
    with serving(one) as first, serving(other) as second:
        Judge(task(first), tmp_path, 0).scores(answers)
        Judge(task(second), tmp_path, 0).scores(answers)
        Judge(task(first, judge_tokens=99), tmp_path, 0).scores(answers)
    assert (len(one.bodies), len(other.bodies)) == (4, 2)
    assert [body["max_tokens"] for body in one.bodies] == [1024, 1024, 99, 99]


def test_a_judge_without_a_verdict_is_asked_again_and_counted(tmp_path):
    script = Script(lambda *_: "Both are nice.")
    [score] = scores(script, tmp_path, [("3", Comparison("q", "1"))], tries=3)
    assert (score["win_rate"], score["unjudged"]) == (0.5, 1)
    assert [body["temperature"] for body in script.bodies].count(0) == 2  # of 6: the first of each order
    assert len(script.bodies) == 6


def test_a_judge_that_never_gives_a_verdict_is_no_result(tmp_path):
    judged = task("http://host:1")
    with pytest.raises(
        InputError, match=r"task j: the judge big .* in none of 3 comparisons, read its replies"
    ):
        require_a_verdict(judged, np.ones(3))
    require_a_verdict(judged, np.array([1.0, 0.5, 1.0]))
    require_a_verdict(judged, np.zeros(0))


def test_failures_are_ties_within_the_budget_and_an_error_beyond(tmp_path):
    answers = [("3", Comparison("q", "1"))] * 3
    assert all(s["unjudged"] for s in scores(lambda *_: (400, "no"), tmp_path, answers, failures=6))
    with pytest.raises(InputError, match=r"\d requests failed, 1 are allowed; the last: .*refused"):
        scores(lambda *_: (400, "no"), tmp_path, answers, failures=1)
    with pytest.raises(InputError, match="answered no message"):
        scores(lambda *_: (200, {"choices": []}), tmp_path, answers, failures=0)


def test_length_alone_earns_no_win_under_length_control():
    random = np.random.default_rng(0)
    difference_N = random.normal(100, 300, 4000)
    probability_N = 1 / (1 + np.exp(-2 * np.tanh(difference_N / difference_N.std())))
    wins_N = (random.random(4000) < probability_N).astype(float)
    assert wins_N.mean() > 0.55  # longer answers win, and they are longer on average
    assert length_controlled_win_rate(wins_N, difference_N) == pytest.approx(
        0.5, abs=0.03
    )  # 3 standard errors
    same_N = np.zeros(4000)
    assert length_controlled_win_rate(wins_N, same_N) == pytest.approx(wins_N.mean(), abs=1e-3)
    assert 0.9 < length_controlled_win_rate(np.ones(50), difference_N[:50]) < 1


def test_baselines_are_the_first_completions_that_generate_wrote(tmp_path):
    file = tmp_path / "answers.jsonl"
    file.write_text(
        '{"completions": [{"content": "a"}, {"content": "b"}]}\n{"completions": [{"content": "c"}]}\n'
    )
    assert read_baselines(str(file)) == ["a", "c"]
    file.write_text('{"completions": []}\n')
    with pytest.raises(
        InputError, match="answers.jsonl:1: field 'completions' must be a list with a completion"
    ):
        read_baselines(str(file))
