"""Tasks during training have the numbers that evaluate finds in the checkpoint of their step, on any layout.

No number of the training changes, their metrics are followed in their own direction, and bad tasks end no run late.
"""

import json
from contextlib import redirect_stdout
from io import StringIO

import pytest

from megatron_align import Trainer
from megatron_align.errors import InputError
from megatron_align.model.parallel import RankInfo
from megatron_align.objectives.configuration import parse
from megatron_align.training.dry_run import dry_run
from megatron_align.training.run_context import joined_ranks
from megatron_align.training.setup import prepare_run
from tests.harness import training_ranks
from tests.harness.http_server import serving
from tests.harness.tiny import make_model, metrics_of, numbers, run_arguments, write_chat, write_pairs


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    chat = write_chat(folder / "chat.jsonl", samples=6, seed=3)
    asked = [
        {"messages": [{"role": "user", "content": f"{i} + {i}"}], "answer": str(2 * i)} for i in range(3)
    ]
    choices = [{"question": f"{i} + 1 =", "choices": [str(i + 1), str(i)], "answer": i % 2} for i in range(5)]
    for name, records in (("asked", asked), ("choices", choices)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    reference = make_model(folder / "reference", initializer_range=0.05)
    return [
        {"name": "chat", "kind": "loss", "data": str(chat)},
        {
            "name": "implicit",
            "kind": "preference",
            "data": str(write_pairs(folder / "pairs.jsonl", 8)),
            "reference": str(reference),
        },
        {"name": "choice", "kind": "choice", "data": str(folder / "choices.jsonl")},
        {"name": "sums", "kind": "generate", "data": str(folder / "asked.jsonl"), "max_tokens": 6},
    ]


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
def test_tasks_are_those_of_evaluate_on_the_checkpoint(pool, tiny_models, chat_file, tasks, tmp_path):
    """On tensor-parallel shards, with an adapter; a killed run writes the same rows again."""
    options = {
        "parallel__tensor": 2,
        "train__steps": 3,
        "train__validate_every": 2,
        "checkpoint__save_every": 1,
        "checkpoint__keep": 9,
        "model__adapter": "{rank: 4}",
        "optimizer__lr": 0.02,
    }
    asked = {"validation__tasks": json.dumps(tasks), "checkpoint__keep_best": "validation/chat/loss"}
    plain, run = tmp_path / "plain", tmp_path / "run"
    pool.run(2, training_ranks.train, run_arguments(tiny_models(), chat_file, plain, **options))
    arguments = run_arguments(tiny_models(), chat_file, run, **options, **asked)
    pool.run(2, training_ranks.train, arguments)
    assert numbers(run) == numbers(plain)
    rows = metrics_of(run, "validation")
    assert [row["step"] for row in rows] == [2, 3]
    for row in rows:
        step = row["step"]
        config = {"model": str(tiny_models()), "adapter": str(run / f"step_{step:06d}"), "precision": "fp32"}
        config |= {"tasks": tasks, "out": str(tmp_path / f"evaluated_{step}")}
        [found] = pool.run(1, training_ranks.evaluate, config)
        written = results_of(run / "validation" / f"step_{step:06d}")
        assert written["tasks"].keys() == found["tasks"].keys()
        for name, entry in found["tasks"].items():
            for metric in (metric for metric, value in entry.items() if isinstance(value, float)):
                assert row[f"{name}/{metric}"] == pytest.approx(entry[metric], rel=1e-4), (name, metric)
                assert written["tasks"][name][metric] == row[f"{name}/{metric}"]
        for name in ("data", "primary", "higher_is_better", "files"):
            assert written[name] == found[name]
    best = min(rows, key=lambda row: row["chat/loss"])["step"]
    assert json.loads((run / "best.json").read_text())["step"] == best

    (run / "finished").unlink()
    (run / "step_000003" / "card.json").unlink()  # it falls back to step 2, and validates again after step 3
    pool.run(2, training_ranks.train, arguments)
    assert metrics_of(run, "validation") == rows


def test_a_judge_that_does_not_answer_costs_its_task(pool, tiny_models, chat_file, tasks, tmp_path):
    """Its metrics are null, which are never the best; the run goes on."""
    with serving(lambda path, body: (404, {})) as url:
        judged = {**tasks[3], "name": "judged", "kind": "judge", "url": url, "judge": "j", "failures": 0}
        asked = {
            "validation__tasks": json.dumps([tasks[0], judged]),
            "checkpoint__keep_best": "judged/win_rate",
            "train__steps": 1,
        }
        pool.run(1, training_ranks.train, run_arguments(tiny_models(), chat_file, tmp_path / "run", **asked))
    [row] = metrics_of(tmp_path / "run", "validation")
    assert row["judged/win_rate"] is None
    assert row["chat/loss"] > 0
    assert list(results_of(tmp_path / "run" / "validation" / "step_000001")["tasks"]) == ["chat"]


@pytest.mark.parametrize(
    ("changes", "more", "line"),
    [
        ({"kind": "choise"}, {}, "validation.tasks[0]: kind must be one of loss, preference, choice"),
        (
            {"dta": "x"},
            {},
            "validation.tasks[0] (chat): unknown configuration key 'dta'; did you mean 'data'?",
        ),
        ({"data": "absent.jsonl"}, {}, "absent.jsonl"),
        ({"kind": "choice"}, {}, "validation.tasks: "),
        (
            {"name": "validation"},
            {},
            "a task must not be named as a split of metrics.jsonl, got 'validation'",
        ),
        (
            {},
            {"train__early_stopping": "{metric: chat/los}", "train__validate_every": 1},
            "did you mean 'chat/loss'?",
        ),
        (
            {},
            {"checkpoint__keep_best": "loss"},
            "must name a metric of the validation (chat/loss, chat/perplexity)",
        ),
    ],
)
def test_a_broken_task_is_found_by_the_dry_run(tiny_models, chat_file, tasks, tmp_path, changes, more, line):
    broken = json.dumps([{**tasks[0], **changes}])
    arguments = run_arguments(tiny_models(), chat_file, tmp_path / "run", validation__tasks=broken, **more)
    with pytest.raises(InputError) as refused, redirect_stdout(StringIO()):
        dry_run(parse(arguments), RankInfo(0, 0, 1), 1)
    assert line in str(refused.value)
    assert not (tmp_path / "run").exists()


def by_hand(rank_info, arguments):
    """Build a trainer, and run its tasks before any step."""
    setup = prepare_run(parse(arguments), rank_info)
    with joined_ranks(setup) as watchdog:
        return Trainer.build(setup, watchdog).run_tasks()


def test_a_loop_of_ones_own_runs_tasks(pool, tiny_models, chat_file, tasks, tmp_path):
    arguments = run_arguments(tiny_models(), chat_file, tmp_path, validation__tasks=json.dumps(tasks[:1]))
    [report] = pool.run(1, by_hand, arguments)
    assert set(report.metrics) == {"chat/loss", "chat/perplexity"}
    assert (
        results_of(tmp_path / "validation" / "step_000000")["tasks"]["chat"]["loss"]
        == report.metrics["chat/loss"]
    )
