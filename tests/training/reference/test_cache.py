"""The reference's log-probs are computed once, kept by what decides them, shared by later runs, and never trusted
when damaged; a resumed preference run goes on bit by bit (law 4), its moving parts included."""

import json
import shutil

import numpy as np
import pytest

from megatron_align.errors import InputError
from megatron_align.training.reference.cache import Column
from tests.harness import training_ranks
from tests.harness.pool import RankFailed
from tests.harness.tiny import make_model, metrics_of, run_arguments, write_labelled, write_pairs

TIMES = ("tokens_per_second", "step_seconds")
FACTS = {"weights": "w", "data": "d"}


def numbers(folder):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in metrics_of(folder)]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    return write_labelled(tmp_path_factory.mktemp("labelled") / "labelled.jsonl")


def test_a_column_survives_its_file(tmp_path):
    column = Column.open(tmp_path, FACTS, 3)
    assert np.isnan(column.values_K).all()
    column.values_K[1] = -1.5
    column.save()
    again = Column.open(tmp_path, FACTS, 3)
    assert np.array_equal(again.values_K, [np.nan, -1.5, np.nan], equal_nan=True)
    other = Column.open(tmp_path, {**FACTS, "weights": "v"}, 3)
    assert other.file != column.file
    assert np.isnan(other.values_K).all()
    assert [path.name for path in tmp_path.iterdir()] == [column.file.name]  # nothing half-written stays


def test_a_corrupt_column_is_refused(tmp_path):
    column = Column.open(tmp_path, FACTS, 3)
    column.values_K[:] = (1, 2, 3)
    column.save()
    whole = column.file.read_bytes()
    line = whole.index(b"\n") + 1
    foreign = (
        json.dumps({"facts": {**column.key, "weights": "v"}, "sha256": "x"}).encode() + whole[line - 1 :]
    )
    for content, need in (
        (whole[:-8], "are corrupt: SHA-256 mismatch in"),
        (whole[:-1] + b"\x01", "are corrupt: SHA-256 mismatch in"),
        (b"nothing\n" + whole[line:], "are corrupt: no header in"),
        (foreign, "must have weights w, got v"),
    ):
        column.file.write_bytes(content)
        with pytest.raises(InputError, match=f"{need}.*{column.file.name}.*delete the file"):
            Column.open(tmp_path, FACTS, 3)


def test_a_full_disk_leaves_the_old_column(tmp_path, monkeypatch):
    column = Column.open(tmp_path, FACTS, 1)
    column.values_K[0] = 1.0
    column.save()

    def full(*_):
        raise OSError(28, "No space left on device")

    column.values_K[0] = 2.0
    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="could not be written: No space left"):
        column.save()
    assert Column.open(tmp_path, FACTS, 1).values_K.tolist() == [1.0]
    assert len(list(tmp_path.iterdir())) == 1


@pytest.fixture
def run(pool, tiny_models, tmp_path):
    def go(name, data, world=1, model=None, **options):
        given = {
            "train__steps": 3,
            "train__global_batch_size": 8,
            "data__cache": tmp_path / "cache",
            **options,
        }
        pool.run(
            world, training_ranks.train, run_arguments(model or tiny_models(), data, tmp_path / name, **given)
        )
        return tmp_path / name

    return go


def columns(tmp_path):
    return {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("reference_*.bin")}


def test_a_second_run_computes_nothing_and_another_model_all(run, pairs, tmp_path):
    dpo = {"objective__name": "dpo", "train__steps": 2}
    first = numbers(run("first", pairs, **dpo))
    made = columns(tmp_path)
    assert len(made) == 1
    again = numbers(run("again", pairs, **dpo, objective__beta=0.1))
    assert columns(tmp_path) == made  # not written again
    assert again == first
    run("hinge", pairs, **dpo, objective__loss_type="hinge", optimizer__lr=1e-4)
    assert columns(tmp_path) == made  # another loss of the same sums
    run("tails", pairs, **dpo, objective__ld_alpha=0.5)
    assert len(columns(tmp_path)) == 2  # other sums
    run("model", pairs, **dpo, model=make_model(tmp_path / "other", "qwen2_untied"))
    assert len(columns(tmp_path)) == 3


def test_a_longer_run_adds_what_it_meets(run, pairs, tmp_path):
    run("short", pairs, objective__name="dpo", train__steps=2)
    [file] = (tmp_path / "cache").glob("reference_*.bin")

    def known():
        values = np.frombuffer(file.read_bytes().split(b"\n", 1)[1], "<f8")
        return int((~np.isnan(values)).sum())

    assert known() == 2 * 8 * 2  # steps x pairs x completions
    run("long", pairs, objective__name="dpo", train__steps=7)
    assert known() == 2 * 48  # every pair once, though some came twice


def test_a_reference_of_its_own(run, pairs, tmp_path):
    """reference.path: the first margins are not 0, and cached and live agree."""
    other = make_model(tmp_path / "other", num_hidden_layers=4)
    from safetensors.torch import load_file, save_file

    weights = load_file(other / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    save_file({**weights, name: weights[name] * 1.5}, other / "model.safetensors", {"format": "pt"})
    options = {"objective__name": "dpo", "reference__path": other}
    cached = metrics_of(run("cached", pairs, **options))
    live = metrics_of(run("live", pairs, **options, reference__mode="live"))
    assert abs(cached[0]["reward_margin"]) > 1e-4
    for row, want in zip(live, cached, strict=True):
        assert row["loss"] == pytest.approx(want["loss"], rel=1e-6)


def test_a_reference_of_another_shape_is_refused(run, pairs, tmp_path):
    other = make_model(tmp_path / "other", num_hidden_layers=2)
    with pytest.raises(
        RankFailed, match="reference.path must hold a model of model.path's shape, got num_layers 2 for 4"
    ):
        run("run", pairs, objective__name="dpo", reference__path=other)


RESUMED = {
    "dpo": ({"objective__name": "dpo"}, 2, {"parallel__tensor": 2}),
    "moving reference": (
        {"objective__name": "dpo", "reference__mode": "live", "reference__sync_steps": 1},
        2,
        {"parallel__pipeline": 2},
    ),
    "kto": ({"objective__name": "kto"}, 2, {}),
    "bco": ({"objective__name": "bco"}, 1, {}),
    "reward": ({"objective__name": "reward"}, 1, {}),
}


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_rows_are_bit_identical(name, run, pairs, labelled, tmp_path):
    options, world, layout = RESUMED[name]
    data = labelled if name in ("kto", "bco") else pairs
    options = {**options, **layout, "checkpoint__save_every": 2, "checkpoint__keep": 9}
    whole = run("whole", data, world, **options)
    shutil.copytree(whole, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "step_000003")
    cut = run("cut", data, world, **options)
    assert numbers(cut) == numbers(whole)


def test_a_moving_reference_moves(run, pairs):
    still = metrics_of(run("still", pairs, objective__name="dpo", reference__mode="live"))
    options = {"objective__name": "dpo", "reference__mode": "live", "reference__sync_steps": 2}
    moving = metrics_of(run("moving", pairs, **options, reference__mixup_alpha=1.0))
    assert [row["loss"] for row in moving[:2]] == [row["loss"] for row in still[:2]]
    # After step 2 the reference has become the policy: no margin is left.
    assert moving[2]["reward_margin"] == pytest.approx(0.0, abs=1e-5)
    assert still[2]["reward_margin"] > 0.1
