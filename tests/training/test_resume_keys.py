"""Law 13 of a resume: every option of a run is compared with the checkpoint's, or may change for the reason given.

The options are the declared ones, of every section and every objective: one that is added fails here until it is in
one of the lists.
"""

from copy import deepcopy
from dataclasses import asdict, fields

import pytest

from megatron_align.config import AdapterConfig, to_dict
from megatron_align.config.rollout import OF_SERVERS
from megatron_align.config.run import RunConfig
from megatron_align.objectives.registry import OBJECTIVES
from megatron_align.training.resume_compatibility import differences, harmless_differences
from tests.training.test_resume_compatibility import KEY, config, with_rewards

# The group in which a difference is refused; "named": it is allowed, and the run's start names it.
COMPARED = {
    "model.adapter": "precision",
    "model.freeze": "precision",
    "data.shuffle": "order",
    "train.seed": "order",
    "train.global_batch_size": "order",
    "train.global_batch_tokens": "order",
    "train.precision": "precision",
    "train.fp8": "named",
    "train.steps": "schedule",
    "train.epochs": "schedule",
    "optimizer.lr": "schedule",
    "optimizer.warmup_steps": "schedule",
    "optimizer.schedule": "schedule",
    "critic.optimizer.lr": "schedule",
    "critic.optimizer.warmup_steps": "schedule",
    "critic.optimizer.schedule": "schedule",
}
COMPARED |= {
    f"{section}.{option}": "named"
    for section in ("optimizer", "critic.optimizer")
    for option in ("weight_decay", "betas", "eps", "clip_grad")
}
# Sections of which every option is compared, unless it is among the free ones.
COMPARED_SECTIONS = {"objective": "objective", "rollout": "objective", "reference": "reference"}
FREE = {
    "a part of the tokenised data's key": "data.train data.shape data.columns data.chat_template data.template_date "
    "data.train_turns data.drop_fields data.on_bad_record data.sequence_length data.too_long",
    "law 1: changes no number": "data.packing data.share_prefix train.recompute_layers train.recompute_modules "
    "model.attention model.linear optimizer.implementation critic.optimizer.implementation "
    "train.gradient_accumulation_fusion "
    + " ".join(f"parallel.{name}" for name in to_dict(config())["parallel"]),
    "the weights come from the checkpoint": "model.path critic.path",
    "read by validation only": "data.validation validation.generate validation.tasks train.validate_every",
    "when the run ends, and what is checked": "train.early_stopping train.on_nonfinite train.self_check",
    "where servers are, not what they answer": " ".join(f"rollout.{name}" for name in OF_SERVERS),
    "where things are written": "data.cache "
    + " ".join(
        f"{section}.{name}" for section in ("checkpoint", "logging") for name in to_dict(config())[section]
    ),
}
OFF = {"lr": 0.5, "warmup_steps": 3, "schedule": "linear", "steps": 9, "adapter": asdict(AdapterConfig())}


def flat(run):
    """Yield section and option of everything a run declares; the critic's optimizer is a section."""
    for section, options in to_dict(run).items():
        if section == "rewards":
            continue  # a list: below
        for option in options:
            if section == "critic" and option == "optimizer":
                yield from (("critic.optimizer", each) for each in options[option])
            else:
                yield section, option


def found(run, section, option):
    """Return the groups of a checkpoint's differences if one option of its run was another."""
    before = deepcopy(to_dict(run))
    options = before["critic"]["optimizer"] if section == "critic.optimizer" else before[section]
    options[option] = OFF.get(option, "another")
    metadata = {"config": before, "data": {"key": KEY, "passes_per_epoch": [1.0]}, "step": 2}
    metadata["critic"], steps = section == "critic.optimizer", 5
    if option == "epochs":
        metadata["steps"], steps = 5, 7
    lines = differences(run, KEY, metadata, steps)
    named = harmless_differences(run, metadata)
    assert all(
        f"{section}.{option} was " in line for of_group in [*lines.values(), named] for line in of_group
    )
    return [*lines, *(["named"] if named else [])]


def test_every_option_of_every_section_is_compared_or_may_change():
    run = config(objective__name="dpo", optimizer__schedule="cosine")
    epochs = config(objective__name="dpo", optimizer__schedule="cosine", train__steps="null", train__epochs=1)
    free = {name for names in FREE.values() for name in names.split()}
    assert not free & COMPARED.keys()
    walked = set()
    for section, option in flat(run):
        name = f"{section}.{option}"
        walked.add(name)
        group = None if name in free else COMPARED.get(name) or COMPARED_SECTIONS.get(section)
        assert group or name in free, f"{name} needs an entry"
        assert found(epochs if option == "epochs" else run, section, option) == ([group] if group else []), (
            name
        )
    assert free | COMPARED.keys() <= walked  # no entry of an option that is gone
    assert set(to_dict(run)) == {field.name for field in fields(RunConfig)}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_option_of_every_objective_is_compared(name):
    run = config()
    object.__setattr__(run, "objective", OBJECTIVES[name].Options(**({"beta": 0.1} if name == "ppo" else {})))
    for option in to_dict(run)["objective"]:
        assert found(run, "objective", option) == ["objective"], option


def test_every_option_of_a_reward_but_its_weight_is_compared():
    run = with_rewards([{"kind": "length", "max": 9}])
    for option in (each for each in to_dict(run)["rewards"][0] if each != "name"):
        before = deepcopy(to_dict(run))
        before["rewards"][0][option] = "another"
        metadata = {"config": before, "data": {"key": KEY, "passes_per_epoch": [1.0]}}
        assert list(differences(run, KEY, metadata, 5)) == ([] if option == "weight" else ["rewards"]), option


def test_the_data_and_the_weight_of_each_source_are_compared():
    run = config(data__train='[{"path": "a", "weight": 1.0}, {"path": "b", "weight": 0.5}]')
    for key, passes in ((KEY, [1.0, 0.5]), ("other", [1.0, 0.5]), (KEY, [1.0, 1.0]), (KEY, [1.0])):
        metadata = {"config": to_dict(run), "data": {"key": key, "passes_per_epoch": passes}}
        same = (key, passes) == (KEY, [1.0, 0.5])
        assert list(differences(run, KEY, metadata, 5)) == ([] if same else ["data"])
