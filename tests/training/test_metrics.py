"""Rows are written once each, in plain JSON; a resumed run drops what it will write again; a pipe gets plain text."""

import json

import pytest

from megatron_align.config import LoggingConfig
from megatron_align.errors import InputError
from megatron_align.training.metrics import Sinks, check_logging, keep_until

QUIET = LoggingConfig(tensorboard=False)
ROW = {"step": 1, "loss": 1.5, "grad_norm": 0.25, "lr": 1e-5, "tokens_per_second": 1234.5}


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rows_are_written_as_given_and_shown_plainly(tmp_path, capsys):
    with Sinks(tmp_path, QUIET, {}, done=0, steps=2) as sinks:
        sinks.write(ROW)
        sinks.write({"step": 1, "split": "validation", "loss": 2.0})
    assert rows(tmp_path) == [ROW, {"step": 1, "split": "validation", "loss": 2.0}]
    shown = capsys.readouterr().out
    assert shown.splitlines() == [
        "step 1/2  loss 1.5000  grad_norm 0.250  lr 1.00e-05  1,234 tokens/s",
        "step 1/2  validation  loss 2.0000",
    ]
    assert "\x1b" not in shown


def test_tensorboard_gets_every_number(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Sinks(tmp_path, LoggingConfig(tensorboard=True), {}, done=0, steps=1) as sinks:
        sinks.write(ROW)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {f"train/{key}" for key in ROW if key != "step"}
    assert events.Scalars("train/loss")[0].value == 1.5


@pytest.mark.parametrize("tail", ["", '{"step": 4, "lo', "\n"])
def test_a_resumed_run_keeps_the_rows_it_stands_on(tmp_path, tail):
    file = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step}) + "\n" for step in (1, 2, 2, 3)]
    file.write_text("".join(lines) + tail)
    keep_until(file, 2)
    assert file.read_text() == "".join(lines[:3])
    keep_until(tmp_path / "absent.jsonl", 2)  # a fresh run has none


def test_an_absent_package_is_named():
    with pytest.raises(InputError, match="logging.wandb needs the package wandb"):
        check_logging(LoggingConfig(wandb="project"))
