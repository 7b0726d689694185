"""Every option reads from YAML and the command line, says what it means, and survives a round trip."""

import dataclasses

import pytest
import yaml

from megatron_align.config import DataSource, to_dict
from megatron_align.config.run import SECTIONS
from megatron_align.errors import InputError
from megatron_align.objectives.configuration import parse
from megatron_align.objectives.registry import OBJECTIVES

RUN = {
    "model": {"path": "/models/m"},
    "data": {"train": ["a.jsonl", "b.jsonl"], "sequence_length": 128},
    "objective": {"name": "sft", "normalization": "sample"},
    "parallel": {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2},
    "optimizer": {"lr": 2.0e-5, "betas": [0.9, 0.95]},
    "train": {"epochs": 2, "precision": "fp32"},
    "checkpoint": {"dir": "runs/x", "save_every": 50},
    "logging": {"tensorboard": False},
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(RUN))
    return path


def test_yaml_is_read(file):
    config = parse(["--config", str(file)])
    for section, values in RUN.items():
        for key, value in values.items():
            got = getattr(getattr(config, section), key)
            assert (list(got) if isinstance(got, tuple) else got) == value, (section, key)


def test_the_command_line_wins(file):
    config = parse(
        ["--config", str(file), "--optimizer.lr", "3e-6", "--parallel.tensor=4", "--data.train", "c.jsonl"]
    )
    assert (config.optimizer.lr, config.parallel.tensor, config.data.train) == (3e-6, 4, "c.jsonl")
    assert config.train.epochs == 2


def test_parts_of_a_list_or_mapping_are_joined_in_any_order(file):
    """Each part counts, given as text or not: none may vanish."""
    given = ["--config", str(file)]
    for arguments in (
        ["--model.adapter", "{rank: 4}", "--model.adapter.alpha", "8"],
        ["--model.adapter.alpha", "8", "--model.adapter", "{rank: 4}"],
        ["--model.adapter.rank=4", "--model.adapter.alpha=8"],
    ):
        adapter = parse([*given, *arguments]).model.adapter
        assert (adapter.rank, adapter.alpha) == (4, 8)
    config = parse([*given, "--data.train", "a", "--data.train+", "[b, c]"])
    assert list(config.data.train) == ["a", "b", "c"]
    config = parse([*given, "--checkpoint.resume_allow", "[data]", "--checkpoint.resume_allow+", "schedule"])
    assert list(config.checkpoint.resume_allow) == ["data", "schedule"]


def test_a_mapping_of_columns_is_read_by_type(file):
    config = parse(["--config", str(file), "--data.columns.prompt", "null", "--data.columns.completion=a"])
    assert config.data.columns == {"prompt": None, "completion": "a"}
    with pytest.raises(InputError, match="data.columns.prompt must be text or null, got 5"):
        parse(["--config", str(file), "--data.columns", "{prompt: 5}"])


@pytest.mark.parametrize("joined", [True, False])
def test_the_command_line_chooses_the_objective(file, joined):
    """The file's own options must then be the other objective's too."""
    given = [f"--config={file}"] if joined else ["--config", str(file)]
    with pytest.raises(InputError, match="unknown configuration key 'objective.normalization'"):
        parse([*given, "--objective.name", "dpo"])
    file.write_text(yaml.safe_dump({**RUN, "objective": {"name": "sft"}}))
    config = parse([*given, "--objective.name", "dpo", "--objective.beta", "0.3", "--optimizer.lr", "1e-6"])
    assert (config.objective.name, config.objective.beta, config.optimizer.lr) == ("dpo", 0.3, 1e-6)
    assert config.data.sequence_length == 128


def test_the_saved_configuration_gives_the_same_run(file, tmp_path):
    config = parse(["--config", str(file)])
    saved = tmp_path / "config.yaml"
    saved.write_text(yaml.safe_dump(to_dict(config)))
    assert parse(["--config", str(saved)]) == config


def test_a_mixture_survives_saving(file, tmp_path):
    mixture = ["--data.train", '["a.jsonl", {"path": "b.jsonl", "weight": 0.5}]']
    config = parse(["--config", str(file), *mixture])
    assert config.data.train == ["a.jsonl", DataSource(path="b.jsonl", weight=0.5)]
    saved = tmp_path / "config.yaml"
    saved.write_text(yaml.safe_dump(to_dict(config)))
    assert parse(["--config", str(saved)]) == config


def test_print_config_can_be_read_back(file, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--config", str(file), "--print_config"])
    assert stop.value.code == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert parse(["--config", str(tmp_path / "printed.yaml")]) == parse(["--config", str(file)])


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for section, kind in {**SECTIONS, "objective": OBJECTIVES["sft"].Options}.items():
        for option in dataclasses.fields(kind):
            assert f"--{section}.{option.name}" in text
            explained = [
                line for line in kind.__doc__.splitlines() if line.strip().startswith(f"{option.name}: ")
            ]
            assert explained, (section, option.name)
            meaning = explained[0].split(": ", 1)[1].split()[:5]
            assert " ".join(meaning) in text, (section, option.name)


def test_configurations_are_frozen(file):
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse(["--config", str(file)]).train.steps = 3


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--train.steps", "3"], "either train.steps or train.epochs, got steps 3 and epochs 2"),
        (["--optimizer.betas", "[0.9, 1.0]"], r"betas must be in \[0, 1\), got \[0.9, 1.0\]"),
        (
            ["--parallel.pipeline", "1"],
            "virtual_pipeline needs at least 2 chunks on at least 2 pipeline stages",
        ),
        (["--checkpoint.keep", "0"], "checkpoint.keep must be at least 1, got 0"),
        (["--parallel.timeout_seconds", "0"], "timeout_seconds must be positive"),
        (
            ["--parallel.tensr", "2"],
            "unknown configuration key 'parallel.tensr'; did you mean 'parallel.tensor'",
        ),
        (["--critic.adapter", "{rank: 4}"], "key 'critic.adapter': an adapter of the critic is not built"),
        (
            ["--train.global_batch_size", "4", "--train.global_batch_tokens", "99"],
            "give train.global_batch_size or",
        ),
        (
            ["--data.train", '[{"path": "a", "weight": 0}]'],
            "weight of data source 'a' must be positive, got 0",
        ),
        (
            ["--data.train", '[{"path": "a", "weight": 1e-12}]'],
            "weight of data source 'a' must be within 1e-9 and 1e6 passes per epoch, got 1e-12",
        ),
        (["--objective.name=stf"], "objective.name must be one of .*'stf'; did you mean 'sft'"),
    ],
)
def test_what_does_not_fit_is_one_line(file, extra, message):
    with pytest.raises(InputError, match=message) as error:
        parse(["--config", str(file), *extra])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["qwen2_7b", "llama3_8b"])
def test_examples_parse(name):
    config = parse(["--config", f"examples/{name}/sft.yaml"])
    assert config.parallel.data_parallel(8) == 2
