"""Laws 1, 3, 4, 9 and 10 of PPO: ten steps on given completions are those of a float64 loop (1e-4), on every layout.

At the first minibatch of rollouts every ratio is 1 and no value has moved. A killed run continues bit for bit. The
critic is part of checkpoints, and exported as a reward model. So with an adapter, whose base is the reference.
"""

import json
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_align.checkpoint.torch_metadata import read_stored_tensors
from megatron_align.model.families import read_shape
from megatron_align.objectives.configuration import load_config
from megatron_align.rollout.rollouts import FILE, ROLLOUTS
from megatron_align.tools.main import main as command
from megatron_align.train import main
from megatron_align.training.critic_start import critic_paths, find_critic
from tests.harness import training_ranks
from tests.harness.marks import mark_slow
from tests.harness.pool import RankFailed
from tests.harness.ppo import Settings, ten_steps
from tests.harness.tiny import byte_tokenizer, make_adapter, make_model, metrics_of, run_arguments
from tests.training.test_preference_layout import LAYOUTS
from tests.training.test_resume import cut_after

CLOCK = ("padding", "tokens_per_second", "step_seconds", "rollout_seconds", "sync_seconds")
# Layouts change the padding; a loss of whitened advantages is 0 at the first step but for rounding.
JUDGED = (
    *("loss", "grad_norm", "ratio_max"),
    *("value_loss", "value_mean", "returns", "explained_variance", "critic_grad_norm"),
)
CASES = {
    "reused": Settings(iterations=2, minibatches=2),
    "plain": Settings(beta=0.0, cliprange_value=None, gae_lambda=0.9, gamma=0.97, vf_coef=1.0),
    "adapter": Settings(iterations=2, minibatches=2),
    "small critic": Settings(iterations=2, minibatches=2),
}
USUAL = Settings()


@pytest.fixture(scope="module")
def critic(tmp_path_factory):
    """A reward model of the policy's shape."""
    return make_model(tmp_path_factory.mktemp("models") / "critic", "qwen2_reward")


@pytest.fixture(scope="module")
def small_critic(tmp_path_factory):
    """A reward model of half the depth, another width and number of heads, and more rows of the embedding."""
    folder = tmp_path_factory.mktemp("models") / "small_critic"
    return small(folder, hidden_size=48, intermediate_size=80, num_attention_heads=4, vocab_size=264)


@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
    """Prompts with two completions each, of other lengths."""
    draw, file = random.Random(3), tmp_path_factory.mktemp("data") / "ranked.jsonl"
    lines = [
        {
            "prompt": f"What is {i} + {'1' * draw.randrange(1, 9)}?",
            "completions": [
                {"content": f"{k}" + "xyz"[k] * draw.randrange(1, 14), "score": round(draw.uniform(-1, 1), 3)}
                for k in range(2)
            ],
        }
        for i in range(30)
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def arguments(model, critic, data, folder, settings, **options):
    given = {
        f"objective__{name}": value if value is not None else "null"
        for name in ("beta", "gamma", "gae_lambda", "cliprange_value", "vf_coef", "iterations", "minibatches")
        if (value := getattr(settings, name)) != getattr(USUAL, name)
    }
    return run_arguments(
        model,
        data,
        folder,
        **{
            "objective__name": "ppo",
            **given,
            "rollout__engine": "data",
            "critic__path": critic,
            "critic__optimizer": f"{{lr: {settings.critic_lr}, schedule: constant}}",
            "optimizer__lr": settings.lr,
            "data__shuffle": False,
            "train__global_batch_size": settings.batch,
            "train__steps": settings.steps,
            **options,
        },
    )


@pytest.fixture(scope="module")
def adapter(tiny_models, tmp_path_factory):
    """An adapter that changes the policy from the start: the reference, its base, is another model."""
    return make_adapter(tmp_path_factory.mktemp("adapters") / "adapter", tiny_models())


@pytest.fixture(scope="module")
def train(pool, tiny_models, critic, small_critic, ranked, adapter, tmp_path_factory):
    """``train(case, layout)`` -> the folder of a run, made once."""
    done = {}

    def run(case, layout=None):
        if (case, layout) not in done:
            world, options = (1, {"checkpoint__export_hf": True})
            if layout is not None:
                world, options = LAYOUTS[layout]
                options = {**options, "train__steps": 5}
            if case == "adapter":
                options = {**options, "model__adapter": f"{{path: {adapter}}}"}
            folder = done[case, layout] = tmp_path_factory.mktemp("run")
            pool.run(
                world,
                training_ranks.train,
                arguments(
                    tiny_models(),
                    small_critic if case == "small critic" else critic,
                    ranked,
                    folder,
                    CASES[case],
                    **options,
                ),
            )
        return done[case, layout]

    return run


def numbers_of(folder, step):
    from pyarrow import parquet

    return parquet.read_table(folder / ROLLOUTS / f"step_{step:06d}" / FILE).to_pydict()


@pytest.mark.parametrize("case", mark_slow(CASES, ["plain", "adapter", "small critic"]))
def test_ten_steps_are_those_of_a_float64_loop(
    case, train, tiny_models, critic, small_critic, ranked, adapter
):
    folder, settings = train(case), CASES[case]
    ids = lambda text: byte_tokenizer()(text).input_ids  # noqa: E731
    end = byte_tokenizer().eos_token_id
    groups = [
        (ids(record["prompt"]), [([*ids(a["content"]), end], a["score"]) for a in record["completions"]])
        for record in map(json.loads, ranked.read_text().splitlines())
    ]
    start = adapter if case == "adapter" else None
    first = small_critic if case == "small critic" else critic
    wanted, sets, policy, trained_critic = ten_steps(tiny_models(), first, groups, settings, start)
    rows = metrics_of(folder)
    assert len(rows) == len(wanted) == settings.steps
    for row, want in zip(rows, wanted, strict=True):
        for name in JUDGED:
            assert row[name] == pytest.approx(want[name], rel=1e-4, abs=2e-6), (row["step"], name)
        # A count: a token whose two losses are equal to fp32's rounding falls on either side.
        assert row["value_clip_fraction"] == pytest.approx(want["value_clip_fraction"], abs=0.02)
    if start is not None:
        assert abs(rows[0]["kl"]) > 1e-3  # the reference is the base
    if settings.cliprange_value is not None:
        assert max(row["value_clip_fraction"] for row in rows) > 0
        assert max(row["ratio_max"] for row in rows) > 1.05
    steps_of_set = settings.iterations * settings.minibatches
    for number, rollouts in enumerate(sets):
        table = numbers_of(folder, number * steps_of_set + 1)
        for name in ("values", "returns"):
            for ours, theirs in zip(table[name], rollouts, strict=True):
                assert ours == pytest.approx(theirs.numbers[name].tolist(), rel=1e-4, abs=2e-5)
        means = [rollout.numbers["advantages"].mean().item() for rollout in rollouts]
        assert table["advantage"] == pytest.approx(means, rel=1e-4, abs=1e-4)
    require_exported(folder / "hf", policy if start is None else policy.merge_and_unload())
    require_exported(folder / "critic", trained_critic)


def require_exported(folder, judge):
    """The exported model has the judge's weights, and is loaded as its class.

    Absolute: ten steps of Adam move each weight by about 1e-2, and the sign of a gradient near 0 is rounding's.
    """
    found = type(judge).from_pretrained(folder, dtype=torch.float64).state_dict()
    for name, want in judge.state_dict().items():
        if (
            "k_proj.bias" not in name
        ):  # softmax ignores it: its gradient is rounding noise, which Adam scales up
            assert torch.allclose(found[name], want, rtol=0, atol=2e-4), name


LAYOUT_CASES = [(case, layout) for case in ("reused", "adapter") for layout in LAYOUTS]
# Of the critic's two layers each stage has one.
LAYOUT_CASES += [("small critic", layout) for layout in LAYOUTS if layout != "vpp2"]
FAST = [("reused", "tp2_sp")]


@pytest.mark.parametrize(
    "case, layout", mark_slow(LAYOUT_CASES, [case for case in LAYOUT_CASES if case not in FAST])
)
def test_layouts_agree(case, layout, train):
    rows, wanted = metrics_of(train(case, layout)), metrics_of(train(case))
    assert len(rows) == 5  # a set of rollouts, and a step of the next
    for row, want in zip(rows, wanted, strict=False):
        assert set(row) == set(want)
        for name, value in want.items():
            if isinstance(value, float) and name not in CLOCK:
                assert row[name] == pytest.approx(value, rel=1e-5, abs=2e-6), (row["step"], name)


def test_at_the_first_minibatch_nothing_has_moved(train):
    """Law 9: ratios are 1, no value is clipped, and the explained variance is that of the rollouts' own values."""
    folder = train("reused")
    first, table = metrics_of(folder)[0], numbers_of(folder, 1)
    assert first["ratio_max"] == 1.0
    assert first["clip_fraction"] == first["value_clip_fraction"] == 0.0
    half = len(table["values"]) // 2  # of two minibatches
    values, returns = (torch.tensor(sum(table[name][:half], [])) for name in ("values", "returns"))
    unexplained = (returns - values).var(unbiased=False) / returns.var(unbiased=False)
    assert first["explained_variance"] == pytest.approx(1 - unexplained.item(), abs=1e-6)
    assert first["value_loss"] == pytest.approx((returns - values).square().mean().item() / 2, rel=1e-5)
    assert "groups_without_signal" not in first


@pytest.mark.parametrize("case", mark_slow(["reused", "small critic"], ["small critic"]))
def test_both_models_of_a_checkpoint_are_exported(case, train, tmp_path):
    """Tensors of the critic in a checkpoint are none of the model's; one of another shape has its own config."""
    folder = train(case)
    require_same_exports(folder, tmp_path, {"hf": "policy"})


def test_a_checkpoint_holds_adapter_critic_and_optimizers(
    pool, tiny_models, critic, ranked, adapter, tmp_path
):
    """Nothing of the base; and the penalty is of the policy against the base."""
    folder, settings = tmp_path / "run", CASES["adapter"]
    options = {"train__steps": 1, "checkpoint__export_hf": True, "model__adapter": f"{{path: {adapter}}}"}
    pool.run(1, training_ranks.train, arguments(tiny_models(), critic, ranked, folder, settings, **options))
    names = list(read_stored_tensors(folder / "step_000001" / "state"))
    adapted = [name for name in names if ".adapter." in name]
    of_critic = [name for name in names if name not in adapted]
    assert len(adapted) == 4 * 7 * 2 * (1 + 3)  # layers x modules x (A, B) x (weight; master, two moments)
    assert of_critic
    assert all("critic." in name for name in of_critic)
    assert abs(metrics_of(folder)[0]["kl"]) > 1e-3
    require_same_exports(folder, tmp_path, {"hf": "policy/hf", "adapter": "policy/adapter"})


def require_same_exports(folder, out, exported):
    """``convert export`` writes from a checkpoint what the run wrote at its end, of the policy and of the critic."""
    convert = ["convert", "export", "--checkpoint", str(folder), "--out"]
    assert command([*convert, str(out / "policy")]) == 0
    assert command([*convert, str(out / "critic"), "--critic"]) == 0
    for ours, theirs in {**exported, "critic": "critic"}.items():
        [file] = (folder / ours).glob("*.safetensors")
        found, wanted = load_file(out / theirs / file.name), load_file(file)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    for name in ("config.json", "tokenizer_config.json", "README.md"):
        assert (folder / "critic" / name).read_text() == (out / "critic" / name).read_text()


def small(folder, **changes):
    return make_model(folder, "qwen2_reward", num_hidden_layers=2, **changes)


def another_tokenizer(folder):
    path = make_model(folder, "qwen2_reward") / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(content))
    return folder


REFUSED = {
    "fewer layers than are recomputed": (
        small,
        {"train__recompute_layers": 4},
        "critic.path, a model of 2 layers: train.recompute_layers must be at most the 2 layers of a model chunk, got 4",
    ),
    "too few rows": (
        lambda folder: small(folder, vocab_size=250),
        {},
        "critic.path must have a row for every token of the data, got 250 rows for token 25[0-9] of data.train",
    ),
    "no family of reward models": (
        lambda folder: make_model(folder, "qwen3"),
        {},
        "critic.path must hold .* of a family with reward models, got a reward model must be one of",
    ),
    "another tokenizer": (
        another_tokenizer,
        {},
        "critic.path must hold .* got tokenizers differ: 2 tokens differ",
    ),
    "no model": (lambda folder: folder, {}, "critic"),
    "another objective": (
        small,
        {"objective__name": "grpo"},
        r"objective grpo has no critic: the options critic.\* belong to objective ppo",
    ),
    "a warm-up that does not end": (
        small,
        {"critic__optimizer": "{warmup_steps: 9}"},
        "critic.optimizer.warmup_steps must not exceed train.steps = 5, got 9",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, tiny_models, ranked, tmp_path, capsys):
    make, options, pattern = REFUSED[name]
    options = {"objective__name": "ppo", "rollout__engine": "data", **options}
    critic = make(tmp_path / "critic")
    given = run_arguments(tiny_models(), ranked, tmp_path / "run", critic__path=critic, **options)
    capsys.readouterr()  # what making the model printed
    assert main(given) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(f"error: [^\n]*{pattern}[^\n]*\n", error), error


def test_the_critic_starts_from_the_first_reward_model_that_fits_else_from_the_policy(
    tiny_models, critic, tmp_path
):
    """It is said which, and why a reward model was passed over."""
    model, other = str(tiny_models()), str(small(tmp_path / "small"))

    def start(*paths):
        config = load_config(
            {
                "model": {"path": model},
                "data": {"train": "d"},
                "objective": {"name": "ppo"},
                "train": {"steps": 1},
                "checkpoint": {"dir": "c"},
                "rewards": [
                    *({"kind": "model", "path": path, "name": f"r{i}"} for i, path in enumerate(paths)),
                    {"kind": "length", "min": 1},
                ],
            }
        )
        folders = {path: (Path(path), Path(path)) for path in critic_paths(config)}
        return find_critic(config, read_shape(Path(model)), folders)

    assert start(str(critic)).note == f"starts from {critic}, a reward model"
    assert start(other, str(critic)).path == str(critic)
    found = start(other)
    assert (found.path, found.has_head) == (model, False)
    assert found.note == (
        f"starts from {model}, a language model, with a new value head; not from {other}: num_layers 2 for 4"
    )
    assert start().path == model


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 3])
@pytest.mark.parametrize(
    "layout", ["one", "tp2", "pp2_dp2", "adapter_one", "adapter_tp2_pp2", "small_pp2_dp2"]
)
def test_a_killed_run_continues_bit_for_bit(pool, tiny_models, small_critic, adapter, tmp_path, step, layout):
    """Between two steps on the same rollouts, and between two sets; the critic starts from the policy, or is small."""
    is_adapted, is_small = layout.startswith("adapter"), layout.startswith("small")
    layout = layout.removeprefix("adapter_").removeprefix("small_")
    data, folder = tmp_path / "prompts.jsonl", tmp_path / "run"
    data.write_text("\n".join(json.dumps({"prompt": f"What is {i} + {3 * i}?"}) for i in range(10)))
    world, options = (1, {}) if layout == "one" else LAYOUTS[{"tp2": "tp2_sp"}.get(layout, layout)]

    def run(folder):
        settings = {
            "objective__name": "ppo",
            "objective__minibatches": 2,
            "rollout__max_tokens": 8,
            "rewards": '[{kind: regex, pattern: "[a-e]"}, {kind: length, min: 4}]',
            "critic__optimizer": "{lr: 1e-3}",
            "train__global_batch_size": 3,
            "train__steps": 6,
            "checkpoint__save_every": 1,
            "checkpoint__keep": 9,
            **({"model__adapter": f"{{path: {adapter}}}"} if is_adapted else {}),
            **({"critic__path": small_critic} if is_small else {}),
            **options,
        }
        pool.run(world, training_ranks.train, run_arguments(tiny_models(), data, folder, **settings))
        return [{name: v for name, v in row.items() if name not in CLOCK} for row in metrics_of(folder)]

    wanted = run(folder)
    cut = cut_after(folder, tmp_path / "cut", step)
    for later in (
        cut / ROLLOUTS
    ).iterdir():  # those that the killed run had not made: values are computed again
        if int(later.name.removeprefix("step_")) > step:
            shutil.rmtree(later)
    assert run(cut) == wanted
    for made in (folder / ROLLOUTS).iterdir():
        assert (cut / ROLLOUTS / made.name / FILE).read_bytes() == (made / FILE).read_bytes()
    assert len({row["value_mean"] for row in wanted}) == 6


@pytest.mark.slow
def test_a_run_resumes_with_a_critic_of_the_same_shape_only(
    pool, tiny_models, critic, small_critic, ranked, tmp_path
):
    folder, settings = tmp_path / "run", CASES["plain"]
    given = [
        arguments(tiny_models(), path, ranked, folder, settings, train__steps=steps)
        for path, steps in ((small_critic, 1), (critic, 2))
    ]
    pool.run(1, training_ranks.train, given[0])
    with pytest.raises(
        RankFailed, match="checkpoint does not match critic.path: num_layers 2 instead of 4, hidden"
    ):
        pool.run(1, training_ranks.train, [*given[1], "--checkpoint.resume_allow=[schedule]"])
