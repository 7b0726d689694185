"""Rows are written once each, in plain JSON; a resumed run drops what it will write again; a pipe gets plain text."""

import json
import math
import sys
from types import SimpleNamespace
from unittest import mock

import pytest

from megatron_align.config import LoggingConfig
from megatron_align.errors import InputError
from megatron_align.monitoring.logger import RunLog
from megatron_align.monitoring.metrics_file import keep_until
from megatron_align.monitoring.trackers import MLFLOW_RUN, check_logging

QUIET = LoggingConfig(tensorboard=False)
ROW = {"step": 1, "loss": 1.5, "grad_norm": 0.25, "lr": 1e-5, "tokens_per_second": 1234.5}
TIMING = {"step": 1, "split": "timing", "data_seconds": 0.01, "forward_backward_seconds": 2.0, "wait_seconds": 0.5,
          "optimizer_seconds": 0.25, "straggler_rank": 3, "straggler_seconds": 0.75}  # fmt: skip
ENTRIES = [("model", "Qwen2ForCausalLM, [4] layers"), ("steps", "0 done of 2")]


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rows_are_written_as_given_and_shown_plainly(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # some CI systems set it, for every program
    with RunLog.open(tmp_path, QUIET, {}, done=0, steps=2) as log:
        log.summary("megatron_align", ENTRIES)
        log.write(ROW, {"mfu": 0.4123, "peak_memory_gb": 61.23})
        log.write({"step": 1, "split": "validation", "loss": 2.0})
        log.write(TIMING)
        log.write({"step": 2, "loss": math.nan, "grad_norm": math.inf, "histogram": {"counts": [math.nan]}})
    assert rows(tmp_path) == [
        ROW,
        {"step": 1, "split": "validation", "loss": 2.0},
        TIMING,
        {"step": 2, "loss": None, "grad_norm": None, "histogram": {"counts": [None]}},
    ]
    shown = capsys.readouterr().out
    assert shown.splitlines() == [
        "model      Qwen2ForCausalLM, [4] layers",
        "steps      0 done of 2",
        "step 1/2  loss 1.5000  grad_norm 0.250  lr 1.00e-05  1,234 tokens/s  MFU 41.2%  61.2 GB  ETA 0:00:00",
        "step 1/2  validation  loss 2.0000",
        "step 1/2  timing  data 0.010 s  forward-backward 2.000 s  wait 0.500 s  optimizer 0.250 s  "
        "slowest rank 3  costs the others 0.750 s",
        "step 2/2  ETA 0:00:00",
    ]
    assert all(character.isprintable() for line in shown.splitlines() for character in line)


@pytest.mark.parametrize("columns, has_rate", [(80, False), (140, True)])
def test_a_terminal_gets_a_card_and_a_bar(tmp_path, capsys, monkeypatch, columns, has_rate):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with RunLog.open(tmp_path, QUIET, {}, done=0, steps=2) as log:
        log.summary("megatron_align", ENTRIES)
        log.write(ROW)
    shown = capsys.readouterr().out
    assert "╭─ megatron_align" in shown
    assert "Qwen2ForCausalLM, [4] layers" in shown  # brackets are no markup
    for needed in ("step 1/2", "loss 1.5000", "tokens/s", "ETA 0:00:"):
        assert needed in shown
    assert ("lr 1.00e-05" in shown) == has_rate  # a narrow terminal has no room for all
    assert "\x1b[" in shown


def test_the_remaining_time_is_that_of_this_start(tmp_path, capsys):
    """A resumed run stands on 60 steps that took no time of its own."""
    clock = mock.patch("megatron_align.monitoring.console.time.monotonic", side_effect=[0.0, 0.0, 30.0])
    with clock, RunLog.open(tmp_path, QUIET, {}, done=60, steps=100) as log:
        log.write({"step": 70})
    assert capsys.readouterr().out == "step 70/100  ETA 0:01:30\n"


def test_tensorboard_gets_every_number(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunLog.open(tmp_path, LoggingConfig(tensorboard=True), {}, done=0, steps=1) as log:
        log.write({**ROW, "nll": math.nan, "suspects": [3, 4]})
        log.write({"step": 1, "split": "validation", "loss": 2.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    expected = {f"train/{key}" for key in ROW if key != "step"}
    assert set(events.Tags()["scalars"]) == {*expected, "validation/loss"}
    assert events.Scalars("train/loss")[0].value == 1.5


class FakeMLflow:
    """As much of MLflow as is used, by the signatures of its 2.x and 3.x."""

    def __init__(self):
        self.calls = []

    def set_experiment(self, experiment_name):
        self.calls.append(("experiment", experiment_name))

    def start_run(self, run_id=None, run_name=None):
        self.calls.append(("start", run_id, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id or "new-id"))

    def log_params(self, params):
        self.calls.append(("params", params))

    def log_metrics(self, metrics, step=None):
        self.calls.append(("metrics", metrics, step))

    def end_run(self, status="FINISHED"):
        self.calls.append(("end", status))


def test_mlflow_goes_on_in_its_own_run(tmp_path, monkeypatch):
    fake = FakeMLflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    config = LoggingConfig(tensorboard=False, mlflow="alignment")
    folder = tmp_path / "dpo"
    folder.mkdir()
    with RunLog.open(folder, config, {"optimizer": {"lr": 1e-5}}, done=0, steps=2) as log:
        log.write({"step": 1, "loss": 1.5, "grad_norm": math.nan})
    with pytest.raises(KeyError), RunLog.open(folder, config, {"optimizer": {"lr": 1e-5}}, done=1, steps=2):
        raise KeyError
    assert (folder / MLFLOW_RUN).read_text() == "new-id\n"
    assert fake.calls == [
        ("experiment", "alignment"),
        ("start", None, "dpo"),
        ("params", {"optimizer.lr": 1e-5}),
        ("metrics", {"train/loss": 1.5}, 1),
        ("end", "FINISHED"),
        ("experiment", "alignment"),
        ("start", "new-id", None),
        ("end", "FAILED"),
    ]


class FakeWandb:
    """As much of Weights & Biases as is used."""

    def __init__(self):
        self.calls = []

    def init(self, **options):
        self.calls.append(options)
        return SimpleNamespace(
            log=lambda numbers, step: self.calls.append((numbers, step)),
            finish=lambda exit_code: self.calls.append(exit_code),
        )


def test_wandb_has_one_page_per_folder(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = LoggingConfig(tensorboard=False, wandb="alignment")
    for _ in range(2):
        with RunLog.open(tmp_path, config, {"train": {"seed": 1}}, done=0, steps=2) as log:
            log.write({"step": 1, "loss": 1.5})
    first, logged, code, second = fake.calls[:4]
    assert (first["project"], first["config"], first["resume"]) == (
        "alignment",
        {"train": {"seed": 1}},
        "allow",
    )
    assert first["id"] == second["id"]
    assert (logged, code) == (({"train/loss": 1.5}, 1), 0)


@pytest.mark.parametrize("tail", ["", '{"step": 4, "lo', "\n"])
def test_a_resumed_run_keeps_the_rows_it_stands_on(tmp_path, tail):
    file = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step}) + "\n" for step in (1, 2, 2, 3)]
    file.write_text("".join(lines) + tail)
    keep_until(file, 2)
    assert file.read_text() == "".join(lines[:3])
    keep_until(tmp_path / "absent.jsonl", 2)  # a fresh run has none


@pytest.mark.parametrize("option, value", [("wandb", "p"), ("mlflow", "e"), ("tensorboard", True)])
def test_an_absent_package_is_named(monkeypatch, option, value):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=f"logging.{option} needs the package {option}, which is not installed"
    ):
        check_logging(LoggingConfig(**{"tensorboard": False, option: value}))
