"""The Trainer does by hand what the command does: the same steps, bit for bit; saved, resumed, loaded and exported."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_align.objectives.configuration import parse
from megatron_align.training.hooks import Hook, Hooks
from megatron_align.training.loop import fit
from megatron_align.training.run_context import joined_ranks
from megatron_align.training.setup import prepare_run
from megatron_align.training.trainer import Trainer
from tests.harness import training_ranks
from tests.harness.marks import mark_slow
from tests.harness.tiny import make_model, metrics_of, run_arguments


def train_by_hand(rank_info, arguments, steps, export=None):
    """In a process of the pool: make steps with a loop of one's own; return loss and gradient norm of each."""
    setup = prepare_run(parse(arguments), rank_info)
    with joined_ranks(setup) as watchdog:
        trainer = Trainer.build(setup, watchdog)
        reports = [trainer.train_step(trainer.train_batches.step(trainer.step)) for _ in range(steps)]
        trainer.save()
        if export:
            trainer.export(export)
        if setup.validation:
            return trainer.evaluate()
    return [(report.step, report.metrics["loss"], report.result.grad_norm) for report in reports]


@pytest.mark.parametrize("world", mark_slow([1, 2], [1]))
def test_steps_by_hand_are_those_of_the_command(pool, tiny_models, chat_file, tmp_path, world):
    layout = {"parallel__tensor": world}
    pool.run(
        world, training_ranks.train, run_arguments(tiny_models(), chat_file, tmp_path / "command", **layout)
    )
    arguments = run_arguments(tiny_models(), chat_file, tmp_path / "hand", **layout)
    first = pool.run(world, train_by_hand, arguments, 3)
    resumed = pool.run(
        world, train_by_hand, arguments, 2
    )  # a new Trainer resumes from what the first one saved
    rows = [(row["step"], row["loss"], row["grad_norm"]) for row in metrics_of(tmp_path / "command")]
    assert [a + b for a, b in zip(first, resumed, strict=True)] == [rows] * world


def test_evaluate_returns_what_the_validation_row_has(pool, tiny_models, chat_file, tmp_path):
    options = {"data__validation": chat_file, "train__steps": 1}
    pool.run(
        1, training_ranks.train, run_arguments(tiny_models(), chat_file, tmp_path / "command", **options)
    )
    [row] = metrics_of(tmp_path / "command", "validation")
    arguments = run_arguments(tiny_models(), chat_file, tmp_path / "hand", **options)
    [metrics] = pool.run(1, train_by_hand, arguments, 1)
    assert metrics == {name: row[name] for name in metrics}


def load_and_export(rank_info, arguments, other, folder):
    """In a process of the pool: load another model, make an update with learning rate 0, export."""
    setup = prepare_run(parse(arguments), rank_info)
    with joined_ranks(setup) as watchdog:
        trainer = Trainer.build(setup, watchdog)
        trainer.load(str(other))
        # an update writes the masters back into the weights
        trainer.train_step(trainer.train_batches.step(0))
        trainer.export(folder)


def fail_and_open_again(rank_info, arguments):
    """In a process of the pool: a run that fails inside of its with-block, then a run."""
    with pytest.raises(ZeroDivisionError), Trainer.open(parse(arguments)):
        1 / 0  # noqa: B018
    with Trainer.open(parse(arguments)) as trainer:
        return trainer.step


def test_a_process_opens_another_run_after_one_that_failed(pool, tiny_models, chat_file, tmp_path):
    """As a notebook does; law of the library: bad input costs a correction, not the process."""
    assert pool.run(1, fail_and_open_again, run_arguments(tiny_models(), chat_file, tmp_path / "run")) == [0]


def test_load_replaces_weights_and_masters(pool, tiny_models, chat_file, tmp_path):
    make_model(tmp_path / "other", seed=7)
    options = {"optimizer__lr": 1e-30, "optimizer__weight_decay": 0}
    arguments = run_arguments(tiny_models(), chat_file, tmp_path / "run", **options)
    pool.run(2, load_and_export, arguments, tmp_path / "other", tmp_path / "hf")
    loaded, exported = (load_file(tmp_path / name / "model.safetensors") for name in ("other", "hf"))
    assert loaded.keys() == exported.keys()
    for name, tensor in loaded.items():
        torch.testing.assert_close(exported[name], tensor, rtol=0, atol=1e-20, msg=name)


class Recorder(Hook):
    """Notes the moments at which it is called, and stops the run after a step."""

    def __init__(self, stop_after):
        self.calls, self.stop_after = [], stop_after

    def start(self, trainer):
        super().start(trainer)
        self.calls.append("start")

    def before_step(self, step):
        self.calls.append(f"before_step {step}")

    def before_update(self):
        self.calls.append("before_update")

    def after_step(self, report):
        assert math.isfinite(report.metrics["loss"])
        self.calls.append(f"after_step {report.step}")

    def end_step(self, step):
        self.calls.append(f"end_step {step}")
        return step == self.stop_after

    def finish(self):
        self.calls.append("finish")

    def close(self, error):
        self.calls.append("close")


def fit_recorded(rank_info, arguments, stop_after):
    setup = prepare_run(parse(arguments), rank_info)
    with joined_ranks(setup) as watchdog:
        recorder = Recorder(stop_after)
        completed = fit(Trainer.build(setup, watchdog), Hooks([recorder]))
    return completed, recorder.calls


@pytest.mark.parametrize("stop_after, completed", [(None, True), (1, False)])
def test_hooks_are_called_at_their_moments(pool, tiny_models, chat_file, tmp_path, stop_after, completed):
    arguments = run_arguments(tiny_models(), chat_file, tmp_path, train__steps=2)
    [(answer, calls)] = pool.run(1, fit_recorded, arguments, stop_after)
    assert answer == completed
    steps = [
        call
        for step in ((1, 2) if completed else (1,))
        for call in (f"before_step {step}", "before_update", f"after_step {step}", f"end_step {step}")
    ]
    assert calls == ["start", *steps, *(["finish"] if completed else []), "close"]
    assert not (tmp_path / "metrics.jsonl").exists()  # rows are a hook's: none was attached


def test_a_checkpoint_saved_by_hand_names_its_step(pool, tiny_models, chat_file, tmp_path):
    pool.run(1, train_by_hand, run_arguments(tiny_models(), chat_file, tmp_path), 2)
    assert json.loads((Path(tmp_path) / "step_000002" / "card.json").read_text())["step"] == 2
