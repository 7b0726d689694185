"""Names known from other programs are answered with ours, wherever they stand; each answer is an option that exists."""

from dataclasses import fields

import pytest

from megatron_align.config import AdapterConfig, OptimizerConfig, familiar_names
from megatron_align.config.familiar_names import FAMILIAR
from megatron_align.config.run import SECTIONS
from megatron_align.errors import InputError, listed, nearest, shown
from megatron_align.objectives.configuration import load_config, parse
from megatron_align.objectives.registry import OBJECTIVES, objective_class

RUN = {"model": {"path": "m"}, "data": {"train": "d"}, "train": {"steps": 3}, "checkpoint": {"dir": "c"}}
SECTION_OPTIONS = {f"{name}.{field.name}" for name, kind in SECTIONS.items() for field in fields(kind)}
SECTION_OPTIONS |= {f"model.adapter.{field.name}" for field in fields(AdapterConfig)}
SECTION_OPTIONS |= {f"critic.optimizer.{field.name}" for field in fields(OptimizerConfig)}
OBJECTIVE_OPTIONS = {
    f"objective.{field.name}" for kind in OBJECTIVES.values() for field in fields(kind.Options)
}


def refusal(make):
    with pytest.raises(InputError) as error:
        make()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_answer_exists():
    assert set(FAMILIAR.values()) <= SECTION_OPTIONS | OBJECTIVE_OPTIONS
    assert set(familiar_names.OBJECTIVES.values()) <= {*OBJECTIVES, "-"}
    assert set(familiar_names._DIFFERENCE_OF) <= set(FAMILIAR)
    assert not set(familiar_names._NOTE_OF) & set(FAMILIAR)
    assert all(familiar_names.plain(name) == name for name in (*FAMILIAR, *familiar_names._NOTE_OF))
    own = {option.partition(".")[2] for option in SECTION_OPTIONS}
    assert not own & (set(FAMILIAR) | set(familiar_names._NOTE_OF)), "an option of ours needs no translation"
    assert len(FAMILIAR) > 400


@pytest.mark.parametrize("nest", [
    lambda name: {name: 1},
    lambda name: {"training_arguments": {name: 1}},
    lambda name: {"x": {"y": {"z": {name: 1}}}},
    lambda name: {"logging": {name: 1}},
    lambda name: {"model": {"path": "m", name: 1}},
    lambda name: {"train": {"steps": 3, "more": {name: 1}}},
    lambda name: {"model": {"path": "m", "adapter": {name: 1}}},
    lambda name: {f"train.{name}": 1},
])  # fmt: skip
def test_a_key_at_every_nesting(nest):
    for name, option in FAMILIAR.items():
        line = refusal(lambda name=name: load_config({**RUN, **nest(name)}))
        assert option in line, line
        assert f"{name}'" in line, line


def test_a_flag_in_every_spelling():
    given = ["--model.path=m", "--data.train=d", "--train.steps=3", "--checkpoint.dir=c"]
    for name, option in FAMILIAR.items():
        for flag in (f"--{name}", f"--{name.replace('_', '-')}", f"--train.{name}", f"--{name.upper()}"):
            assert option in refusal(lambda flag=flag: parse([*given, flag, "1"])), flag
            assert option in refusal(lambda flag=flag: parse([f"{flag}=1", *given])), flag


@pytest.mark.parametrize(
    "key, answer",
    [
        ("lr", "did you mean 'optimizer.lr'?"),
        ("train.lr", "did you mean 'optimizer.lr'?"),
        ("optimizer.steps", "did you mean 'train.steps'?"),
        ("train.dir", "did you mean 'checkpoint.dir'?"),
        ("train.precison", "did you mean 'train.precision'?"),
        ("precison", "did you mean 'train.precision'?"),
        ("learning_rate", "here it is optimizer.lr"),
        (
            "per_device_train_batch_size",
            "here it is train.global_batch_size (samples of a step over all ranks;",
        ),
        ("deepspeed", "the optimizer is sharded over data-parallel ranks by itself"),
        ("objective.label_smoothing", "it is an option of objective.name dpo, cpo, simpo, tpo"),
        ("nonsense", "(--help lists all)"),
    ],
)
def test_answers(key, answer):
    assert refusal(lambda: load_config({**RUN, key: 1})).endswith(answer) or answer in refusal(
        lambda: load_config({**RUN, key: 1})
    )


def test_a_foreign_configuration_is_answered_at_once():
    foreign = {"learning_rate": 1, "output_dir": "x", "nonsense": 2, "bf16": True, "fsdp": ""}
    line = refusal(lambda: load_config({**RUN, **foreign}))
    assert "'learning_rate' (here it is optimizer.lr), 'output_dir' (here it is checkpoint.dir" in line
    assert "'nonsense', " in line
    many = refusal(lambda: load_config({**RUN, **{f"nonsense{i}": 1 for i in range(250)}}))
    assert many.endswith("'nonsense9' and 240 more")


@pytest.mark.parametrize(
    "section, option",
    [
        ("model", "model.path"),
        ("data", "data.train"),
        ("objective", "objective.name"),
        ("checkpoint", "checkpoint.dir"),
    ],
)
def test_a_text_for_a_section(section, option):
    line = refusal(lambda: load_config({**RUN, section: "text"}))
    assert line == f"{section} must be a mapping of options, got 'text'; did you mean '{option}'?"
    assert option in refusal(lambda: parse([f"--{section}", "text"]))


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["run.yaml"], "unrecognized argument 'run.yaml': a configuration is given as --config run.yaml"),
        (["train.steps=3"], "write --train.steps 3"),
        (["-c", "run.yaml"], "options begin with two dashes"),
        (
            ["--data.train", "a", "b"],
            "--data.train takes one value; several are a list, --data.train '[a, b]'",
        ),
        (["--train.steps"], "--train.steps needs a value"),
        (["--train.steps", "--data.train", "x"], "--train.steps needs a value"),
        (["--config"], "--config needs a YAML file, got none"),
        (["--model.path=m"], "data.train, checkpoint.dir must be given"),
    ],
)
def test_command_lines(arguments, line):
    assert line in refusal(lambda: parse(arguments))


@pytest.mark.parametrize(
    "name, end",
    [
        ("remax", "got 'remax': it is not available"),
        ("gspo", "; did you mean 'grpo'?"),
        ("cispo", ": it is objective.loss_type cispo of objective.name grpo"),
        ("xdpo2", "got 'xdpo2'"),
        ("rm", "; did you mean 'reward'?"),
        ("reward_model", "; did you mean 'reward'?"),
        ("DPO", "; did you mean 'dpo'?"),
        ("stf", "; did you mean 'sft'?"),
        ("ipo", ": it is objective.loss_type ipo of objective.name dpo"),
        ("apo_zero_unpaired", ": it is objective.loss_type apo_zero_unpaired of objective.name kto"),
    ],
)
def test_unknown_objectives_have_no_misleading_neighbours(name, end):
    assert refusal(lambda: objective_class(name)).endswith(end)


@pytest.mark.parametrize(
    "word, candidates, match",
    [
        ("ppo", ["dpo", "tpo", "kto"], ""),
        ("grpo", ["orpo"], ""),
        ("llama2", ["qwen2"], ""),
        ("imprt", ["import"], "import"),
        ("wieght", ["path", "weight"], "weight"),
        ("sequence_lenth", ["sequence_length", "sequence"], "sequence_length"),
        ("directory", ["dir"], "dir"),
        ("h10", ["h100", "a100"], "h100"),
    ],
)
def test_a_neighbour_is_a_slip_of_the_pen(word, candidates, match):
    assert nearest(word, candidates) == (f"; did you mean '{match}'?" if match else "")


def test_lines_stay_short():
    assert listed(range(10)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    assert listed(range(1250), most=2) == "0, 1 and 1,248 more"
    assert (shown(None), shown(True), shown("a")) == ("null", "true", "'a'")
    loop = []
    loop.append(loop)
    assert len(shown([loop] * 1000)) < 100
    assert "\n" not in str(InputError("a\nb\u2028c"))
