"""A metric of the validation ends the run and keeps its best checkpoint; a resumed run decides as one never killed.

The metrics are global, so that every layout decides the same; rank 0 decides for all.
"""

import errno
import json
import math
import os
import shutil
from types import SimpleNamespace
from unittest import mock

import pytest

from megatron_align.errors import InputError
from megatron_align.objectives.configuration import load_config
from megatron_align.objectives.dpo import DPO
from megatron_align.training import best
from megatron_align.training.best import History
from tests.harness import training_ranks
from tests.harness.tiny import metrics_of, numbers, run_arguments, write_chat


@pytest.fixture(scope="module")
def validation(tmp_path_factory):
    return write_chat(tmp_path_factory.mktemp("validation") / "chat.jsonl", samples=6, seed=3)


def steps_of(run):
    return sorted(int(folder.name[5:]) for folder in run.glob("step_*"))


def test_no_improvement_ends_the_run_as_a_complete_one(pool, tiny_models, chat_file, validation, tmp_path):
    """Of a loss that falls, mode max finds the first validation best: two more, and the run ends."""
    run = tmp_path / "run"
    stopping = "{metric: validation/loss, patience: 2, mode: max}"
    options = {
        "data__validation": validation,
        "train__validate_every": 1,
        "train__early_stopping": stopping,
        "checkpoint__save_every": 1,
        "checkpoint__keep": 5,
        "checkpoint__export_hf": True,
    }
    arguments = run_arguments(tiny_models(), chat_file, run, **options)
    pool.run(1, training_ranks.train, arguments)
    assert [row["step"] for row in metrics_of(run, "validation")] == [1, 2, 3]
    assert steps_of(run) == [1, 2, 3]
    assert (run / "hf" / "model.safetensors").is_file()
    assert (run / "finished").read_text() == "3 of 5: no better validation/loss in 2 validations\n"
    before = (run / "metrics.jsonl").read_bytes()
    pool.run(1, training_ranks.train, arguments)
    assert (run / "metrics.jsonl").read_bytes() == before  # it says that it is finished
    expected = numbers(run)

    for step in (3, None):  # killed while step 3 was saved, and while it was exported
        (run / "finished").unlink()
        shutil.rmtree(run / "hf")
        if step:
            shutil.rmtree(run / f"step_{step:06d}")
        pool.run(1, training_ranks.train, arguments)
        assert numbers(run) == expected
        assert steps_of(run) == [1, 2, 3]
        assert (run / "hf").is_dir()
    patient = {**options, "train__early_stopping": "{metric: loss, patience: 3, mode: max}"}
    pool.run(1, training_ranks.train, run_arguments(tiny_models(), chat_file, run, **patient))
    assert steps_of(run) == [1, 2, 3, 4]


def test_the_best_checkpoint_is_saved_and_kept(pool, tiny_models, chat_file, validation, tmp_path):
    run = tmp_path / "run"
    options = {
        "data__validation": validation,
        "train__validate_every": 1,
        "optimizer__lr": 0.03,  # the loss rises again
        "checkpoint__keep": 1,
        "checkpoint__keep_best": "loss",
    }
    pool.run(2, training_ranks.train, run_arguments(tiny_models(), chat_file, run, **options))
    losses = {row["step"]: row["loss"] for row in metrics_of(run, "validation")}
    lowest = min(losses, key=losses.get)
    assert lowest < 5, losses
    assert steps_of(run) == [lowest, 5]
    found = json.loads((run / "best.json").read_text())
    assert found == {
        "step": lowest,
        "metric": "loss",
        "value": losses[lowest],
        "checkpoint": f"step_{lowest:06d}",
    }


def test_an_unknown_metric_is_named_with_the_known_ones(pool, tiny_models, chat_file, validation, tmp_path):
    options = {"data__validation": validation, "checkpoint__keep_best": "los"}
    arguments = run_arguments(tiny_models(), chat_file, tmp_path / "run", **options)
    [line] = pool.run(1, training_ranks.train_to_the_refusal, arguments)
    assert (
        "checkpoint.keep_best must name a metric of the validation (loss), got 'los'; did you mean 'loss'?"
        in line
    )


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"train.early_stopping": "{patience: 2}"}, "train.early_stopping needs train.validate_every"),
        ({"train.early_stopping": "{patience: 2}", "train.validate_every": 1}, "needs data.validation"),
        ({"checkpoint.keep_best": "loss"}, "checkpoint.keep_best needs data.validation"),
        ({"train.early_stopping": "{patience: 0}", "train.validate_every": 1}, "patience must be at least 1"),
        ({"train.early_stopping": "{mode: best}"}, "mode must be one of min, max"),
        ({"train.early_stopping": "{metrics: loss}"}, "did you mean 'metric'"),
        ({"validation.generate": "{limit: 3}"}, "validation.generate.prompts is missing"),
    ],
)
def test_options_that_do_not_fit_are_one_line(changes, line):
    run = {"model": {"path": "m"}, "data": {"train": "x"}, "checkpoint": {"dir": "d"}, "train": {"steps": 3}}
    with pytest.raises(InputError, match=line):
        load_config(run, changes)


@pytest.fixture
def tracking(tmp_path, monkeypatch):
    """``tracking(metric)``: a started KeepBest of a DPO run on one rank, and what it logs."""
    monkeypatch.setattr(best.dist, "get_rank", lambda: 0)
    metrics = SimpleNamespace(metrics=DPO.metrics)
    setup = SimpleNamespace(folder=tmp_path)
    trainer = SimpleNamespace(objective=metrics, setup=setup, step=0, validated={})

    def start(metric):
        lines = []
        hook = best.KeepBest(SimpleNamespace(message=lines.append), metric)
        hook.start(trainer)
        return hook, lines

    return start


@pytest.mark.parametrize(("metric", "lowest"), [("loss", True), ("nll", True), ("accuracy", False)])
def test_what_is_better_is_the_metrics_own(tracking, metric, lowest):
    hook, _ = tracking(metric)
    for step, value in ((1, 2.0), (2, 1.0)):
        hook._history.add(step, {metric: value})
    assert hook._history.best() == (2 if lowest else 1)


def test_a_metric_that_the_validation_lacks_is_refused(tracking):
    """Without a likelihood term no row has nll."""
    hook, _ = tracking("nll")
    hook.trainer.validated = {1: {"loss": 1.0, "accuracy": 0.5}}
    with pytest.raises(InputError, match="has no nll; it has loss, accuracy"):
        best.KeepBest.end_step(hook, 1)


def test_a_full_disk_refuses_best_json_and_ends_nothing(tracking, tmp_path, monkeypatch):
    hook, lines = tracking("loss")
    monkeypatch.setattr(best, "list_steps", lambda folder: [(1, tmp_path / "step_000001")])
    hook._history.add(1, {"loss": 1.0})
    with mock.patch.object(
        best.Path, "write_text", side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    ):
        hook.write()
    assert lines == [
        "warning: best.json could not be written: No space left on device; the checkpoint of step 1 is kept"
    ]
    hook.write()
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 1


def test_the_best_is_the_first_of_equal_ones_and_never_one_that_is_not_finite():
    history = History("loss", "min")
    for step, value in ((1, 3.0), (2, float("nan")), (3, 2.0), (4, None), (5, 2.0), (6, 2.5), (7, -math.inf)):
        history.add(step, {"loss": value})
    assert (history.best(), history.without_improvement(), history.best([1, 5, 6])) == (3, 4, 5)
    highest = History("accuracy", "max")
    assert (highest.best(), highest.without_improvement()) == (None, 0)
    highest.add(1, {"accuracy": None})
    assert (highest.best(), highest.without_improvement()) == (None, 1)
