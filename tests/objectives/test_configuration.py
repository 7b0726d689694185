"""A configuration is the same from a file, a mapping and the command line, with the same checks and one-line errors."""

from pathlib import Path

import pytest
import yaml

from megatron_align.config import DataSource
from megatron_align.errors import InputError
from megatron_align.objectives.configuration import load_config, parse
from megatron_align.objectives.dpo import DPOOptions

RUN = {
    "model": {"path": "m"},
    "data": {"train": "d.jsonl"},
    "objective": {"name": "dpo", "beta": 0.2},
    "train": {"steps": 10},
    "checkpoint": {"dir": "runs/x"},
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(RUN))
    return path


def test_a_file_a_mapping_and_the_command_line_agree(file):
    config = load_config(RUN)
    assert config.objective == DPOOptions(beta=0.2)
    assert config == load_config(file) == load_config(str(file)) == parse(["--config", str(file)])


def test_overrides_win_whichever_way_they_are_given(file):
    given = {
        "optimizer.lr": 2e-5,
        "objective.beta": 0.3,
        "optimizer.betas": (0.9, 0.95),
        "data.shuffle": False,
    }
    config = load_config(RUN, given)
    assert (config.optimizer.lr, config.objective.beta) == (2e-5, 0.3)
    assert (config.optimizer.betas, config.data.shuffle) == ((0.9, 0.95), False)
    texts = ["optimizer.lr=2e-5", "objective.beta=0.3", "optimizer.betas=[0.9, 0.95]", "data.shuffle=false"]
    assert load_config(file, texts) == config
    assert parse(["--config", str(file), *(f"--{text}" for text in texts)]) == config


def test_an_override_chooses_the_objective():
    run = {**RUN, "objective": {"name": "dpo"}}
    assert load_config(run, {"objective.name": "sft"}).objective.name == "sft"
    assert load_config(run, ["objective.name=sft"]).objective.name == "sft"
    with pytest.raises(InputError, match="unknown configuration key 'objective.beta'"):
        load_config(RUN, {"objective.name": "sft"})  # sft has no beta


def test_paths_and_data_sources_are_taken_as_they_are():
    sources = ["a.jsonl", DataSource(path="b.jsonl", weight=0.5)]
    config = load_config({**RUN, "model": {"path": Path("m")}}, {"data.train": sources})
    assert (config.model.path, config.data.train) == ("m", sources)


def test_a_file_is_read_once(file, monkeypatch):
    """A configuration that comes from a pipe has no second reading."""
    reads, read_text = [], Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda self, **k: (reads.append(self), read_text(self, **k))[1])
    parse([f"--config={file}", "--objective.name", "dpo"])
    assert reads == [file]


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"optimizer.lrr": 1.0}, "unknown configuration key 'optimizer.lrr'; did you mean 'optimizer.lr'?"),
        ({"optimizr.lr": 1.0}, "unknown configuration key 'optimizr.lr'; did you mean 'optimizer.lr'?"),
        (["optimizer.lrr=1"], "unknown configuration key 'optimizer.lrr'; did you mean 'optimizer.lr'?"),
        ({"lr": 1.0}, "an override must be named section.key, got 'lr'"),
        (["optimizer.lr"], "an override must be 'section.key=value', got 'optimizer.lr'"),
        ({"optimizer.lr": object}, "a configuration holds strings, numbers, lists and mappings, got type"),
        ({"objective.beta": -1.0}, "objective.beta must be positive, got -1.0"),
        ({"objective.name": "cpo", "reference.mode": "live"}, "objective cpo compares with no reference"),
        ({"optimizer.warmup_steps": 11}, "optimizer.warmup_steps must not exceed train.steps = 10, got 11"),
    ],
)
def test_what_does_not_fit_is_one_line(overrides, message):
    with pytest.raises(InputError) as error:
        load_config(RUN, overrides)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(InputError, match="found none at"):
        load_config(tmp_path / "absent.yaml")
