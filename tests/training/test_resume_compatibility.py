"""A run goes on from its own checkpoints only; what else may differ is said by name, and every difference is named."""

import json

import pytest

from megatron_align.config import to_dict
from megatron_align.config.rewards import build_rewards
from megatron_align.errors import InputError
from megatron_align.objectives.configuration import parse
from megatron_align.training.resume_compatibility import harmless_differences, require_same_run
from tests.harness.tiny import byte_tokenizer, run_arguments

KEY = "0123456789abcdef"


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("assets")
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "step_000002"
    byte_tokenizer().save_pretrained(folder / "hf_assets")
    return folder


def config(*allow, **options):
    if allow:
        options["checkpoint__resume_allow"] = json.dumps(allow)
    return parse(run_arguments("model", "chat.jsonl", "run", **options))


def metadata(**options):
    return {"config": to_dict(config(**options)), "data": {"key": KEY, "passes_per_epoch": [1.0]}}


CHANGES = {
    "data": ("the tokenised data was 0123456789abcdef and is other", {"key": "other"}),
    "order": ("train.seed was 1234 and is 7", {"train__seed": 7}),
    "objective": (
        "objective.normalization was token and is sample",
        {"objective__normalization": "sample"},
    ),
}


@pytest.mark.parametrize("group", CHANGES)
def test_a_change_is_refused_by_name_unless_it_is_asked_for(group, checkpoint, assets):
    line, options = CHANGES[group]
    key = options.get("key", KEY)
    options = {name: value for name, value in options.items() if name != "key"}
    with pytest.raises(InputError) as error:
        require_same_run(config(**options), key, metadata(), checkpoint, assets)
    assert line in str(error.value)
    assert f"set checkpoint.resume_allow [{group}]" in str(error.value)
    assert "\n" not in str(error.value)
    others = [name for name in CHANGES if name != group]
    with pytest.raises(InputError, match=f"resume_allow \\[{group}\\]"):
        require_same_run(config(*others, **options), key, metadata(), checkpoint, assets)
    # the others: harmless
    require_same_run(config(group, *others, **options), key, metadata(), checkpoint, assets)


def at_step(step, steps=None, **options):
    """Return the metadata of a checkpoint; ``steps``: the complete run's, None: an older checkpoint."""
    return {**metadata(**options), "step": step, **({} if steps is None else {"steps": steps})}


COSINE = {"optimizer__schedule": "cosine"}
JUMPS = {
    "rate": ({}, {"optimizer__lr": 2e-3}, "optimizer.lr was 0.001 and is 0.002"),
    "more steps": (COSINE, {**COSINE, "train__steps": 9}, "train.steps was 5 and is 9"),
    "fewer steps": (COSINE, {**COSINE, "train__steps": 4}, "train.steps was 5 and is 4"),
    "schedule": (COSINE, {"optimizer__schedule": "linear"}, "optimizer.schedule was cosine and is linear"),
    "warm-up": (
        {"optimizer__warmup_steps": 4},
        {"optimizer__warmup_steps": 5},
        "optimizer.warmup_steps was 4 and is 5",
    ),
}
KEPT = {
    "steps of a constant rate": ({}, {"train__steps": 9}),
    "a warm-up that is over": ({"optimizer__warmup_steps": 1}, {"optimizer__warmup_steps": 2}),
    "another weight decay": (COSINE, {**COSINE, "optimizer__weight_decay": 0.5}),
    "nothing": (COSINE, COSINE),
}


@pytest.mark.parametrize("before, now, line", JUMPS.values(), ids=JUMPS)
@pytest.mark.parametrize("steps", [5, None])
def test_what_changes_the_remaining_learning_rates_is_refused_by_name(
    before, now, line, steps, checkpoint, assets
):
    saved = at_step(2, steps, **before)
    with pytest.raises(InputError) as error:
        require_same_run(config(**now), KEY, saved, checkpoint, assets)
    assert line in str(error.value)
    assert str(error.value).count(" was ") == 1  # nothing else is named
    assert "set checkpoint.resume_allow [schedule]" in str(error.value)
    require_same_run(config("schedule", **now), KEY, saved, checkpoint, assets)


@pytest.mark.parametrize("before, now", KEPT.values(), ids=KEPT)
def test_what_keeps_the_remaining_learning_rates_is_no_difference(before, now, checkpoint, assets):
    require_same_run(config(**now), KEY, at_step(2, 5, **before), checkpoint, assets)


def test_a_finished_run_that_is_made_longer_jumps_too(checkpoint, assets):
    """A rate that had decayed to 0 would rise again."""
    with pytest.raises(InputError, match="train.steps was 5 and is 9"):
        require_same_run(config(**COSINE, train__steps=9), KEY, at_step(5, 5, **COSINE), checkpoint, assets)


def epochs(number, **options):
    return {**COSINE, "train__steps": "null", "train__epochs": number, **options}


def test_epochs_count_by_their_steps(checkpoint, assets):
    saved = at_step(2, 5, **epochs(1))
    require_same_run(config(**epochs(1)), KEY, saved, checkpoint, assets, 5)
    require_same_run(config(**COSINE, train__steps=5), KEY, saved, checkpoint, assets, 5)
    with pytest.raises(InputError, match="train.epochs was 1 and is 2"):
        require_same_run(config(**epochs(2)), KEY, saved, checkpoint, assets, 10)
    with pytest.raises(InputError, match="train.steps was 5 and is 7"):  # other data
        require_same_run(config("data", **epochs(1)), "other", saved, checkpoint, assets, 7)
    older = at_step(2, **epochs(1))
    require_same_run(config(**epochs(1)), KEY, older, checkpoint, assets, 5)
    with pytest.raises(InputError, match="train.epochs was 1 and is 2"):
        require_same_run(config(**epochs(2)), KEY, older, checkpoint, assets, 10)


def test_harmless_differences_are_named():
    saved = metadata(optimizer__weight_decay=0.5)
    assert harmless_differences(config(), saved) == ["optimizer.weight_decay was 0.5 and is 0.1"]
    assert harmless_differences(config(), metadata()) == []


def test_a_reference_is_a_group_of_its_own(checkpoint, assets):
    pairs = {"objective__name": "dpo", "reference__mode": "live", "reference__sync_steps": 2}
    now = {**pairs, "reference__sync_steps": 4}
    with pytest.raises(InputError, match=r"reference.sync_steps was 2 and is 4.*\[reference\]"):
        require_same_run(config(**now), KEY, metadata(**pairs), checkpoint, assets)
    require_same_run(config("reference", **now), KEY, metadata(**pairs), checkpoint, assets)


def test_all_differences_are_named_at_once(checkpoint, assets):
    now = config(train__seed=7, data__shuffle=False, objective__normalization="sample")
    with pytest.raises(InputError) as error:
        require_same_run(now, "other", metadata(), checkpoint, assets)
    for fact in (
        "the tokenised data was",
        "train.seed was",
        "data.shuffle was",
        "objective.normalization was",
    ):
        assert fact in str(error.value)
    assert "resume_allow [data, order, objective]" in str(error.value)


def test_a_tokenizer_is_compared_by_its_files(checkpoint, assets):
    path = checkpoint / "hf_assets" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"tokenizers differ: 2 tokens differ.*\[tokenizer\]"):
        require_same_run(config(), KEY, metadata(), checkpoint, assets)
    require_same_run(config("tokenizer"), KEY, metadata(), checkpoint, assets)


def test_precision_cannot_be_allowed(checkpoint, assets):
    everything = config("data", "tokenizer", "order", "objective", "reference", train__precision="bf16")
    with pytest.raises(InputError, match="train.precision was fp32 and is bf16") as error:
        require_same_run(everything, KEY, metadata(), checkpoint, assets)
    assert "resume_allow" not in str(error.value)


def test_an_unknown_group_gets_the_nearest_name():
    with pytest.raises(InputError, match="got 'objectiv'; did you mean 'objective'?"):
        config("objectiv")


def test_weights_alone_are_no_run(checkpoint, assets):
    with pytest.raises(InputError, match="needs a checkpoint of a training run, found weights only"):
        require_same_run(config(), KEY, {}, checkpoint, assets)


def with_rewards(entries, *allow):
    """Return a run's configuration with rewards, without the objective that needs them."""
    run = config(*allow)
    object.__setattr__(run, "rewards", build_rewards(entries))
    return run


def test_the_weights_of_rewards_may_change_and_are_named_their_other_options_may_not(checkpoint, assets):
    math, length = {"kind": "math"}, {"kind": "length", "max": 9}
    before = {**metadata(), "config": to_dict(with_rewards([math, length]))}
    weighted = with_rewards([{**math, "weight": {"maths": 2.0}}, length])
    require_same_run(weighted, KEY, before, checkpoint, assets)
    assert harmless_differences(weighted, before) == ["rewards.math.weight was 1.0 and is {'maths': 2.0}"]
    for entries, line in (
        ([math, {**length, "max": 7}], "rewards.length was {.*'max': 9.* and is {.*'max': 7"),
        ([math], "rewards.length was {.* and is None"),
        ([math, length, {"kind": "code"}], "rewards.code was None and is {"),
    ):
        with pytest.raises(InputError, match=rf"{line}.*set checkpoint.resume_allow \[rewards\]"):
            require_same_run(with_rewards(entries), KEY, before, checkpoint, assets)
        require_same_run(with_rewards(entries, "rewards"), KEY, before, checkpoint, assets)


def test_options_that_an_older_version_did_not_have_were_at_their_defaults(checkpoint, assets):
    """A run continues after an upgrade, and a new option that is used is a difference."""
    grpo = {"objective__name": "grpo", "rewards": "[{kind: length, min: 2}]", "rollout__max_tokens": 8}
    saved, supervised = at_step(2, 5, **grpo), at_step(2, 5)
    del saved["config"]["objective"]["entropy_coef"], saved["config"]["rollout"]["as_chat"]
    del supervised["config"]["rollout"]
    require_same_run(config(**grpo), KEY, saved, checkpoint, assets)
    require_same_run(config(), KEY, supervised, checkpoint, assets)
    with pytest.raises(InputError, match="objective.entropy_coef was 0.0 and is 0.1 "):
        require_same_run(config(**grpo, objective__entropy_coef=0.1), KEY, saved, checkpoint, assets)


def test_servers_may_be_elsewhere_when_a_run_resumes(checkpoint, assets):
    """A requeued job finds its engine on another node; what the engine answers is the same."""
    grpo = {"objective__name": "grpo", "rewards": "[{kind: length, min: 2}]", "rollout__max_tokens": 8}
    servers = {**grpo, "rollout__engine": "vllm", "rollout__url": "http://one:8000"}
    elsewhere = {**servers, "rollout__url": "http://two:8000", "rollout__request_timeout": 1200}
    require_same_run(config(**elsewhere), KEY, at_step(2, 5, **servers), checkpoint, assets)
    other = config(**elsewhere, rollout__temperature=0.5)
    with pytest.raises(InputError, match="rollout.temperature was 1.0 and is 0.5 "):
        require_same_run(other, KEY, at_step(2, 5, **servers), checkpoint, assets)
