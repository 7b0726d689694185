"""Law 4 (first part): a resumed run writes the very rows that the uninterrupted run writes, on the same layout."""

import shutil

import pytest

from megatron_align.config import parse
from megatron_align.errors import InputError
from megatron_align.model.parallel import Place
from megatron_align.training.loop import prepare
from tests.harness import ranks
from tests.harness.tiny import make_model, metrics_of, run_arguments

TIMES = ("tokens_per_second", "step_seconds")
ALONE = Place(rank=0, local_rank=0, world_size=1)


def numbers(folder):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in metrics_of(folder)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "world, layout",
    [(1, {}), (2, {"parallel__tensor": 2}), (4, {"parallel__pipeline": 2})],
    ids=["one", "tp2", "pp2_dp2"],
)
def test_resumed_rows_are_bit_identical(pool, tiny_models, chat_file, tmp_path, world, layout, precision):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = {
        "train__precision": precision,
        "optimizer__schedule": "cosine",
        "checkpoint__save_every": 2,
        **layout,
    }
    pool.run(
        world, ranks.train, run_arguments(tiny_models(), chat_file, whole, checkpoint__keep=9, **options)
    )
    # What a kill after step 3 leaves: the checkpoint of step 2, a row too many, half a line.
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "step_000004")
    shutil.rmtree(cut / "step_000005")
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    (cut / "metrics.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    pool.run(world, ranks.train, run_arguments(tiny_models(), chat_file, cut, **options))
    assert numbers(cut) == numbers(whole)
    assert [row["step"] for row in metrics_of(cut)] == [1, 2, 3, 4, 5]
    assert sorted(path.name for path in cut.glob("step_*")) == ["step_000004", "step_000005"]  # keep: 2


def test_resuming_on_another_layout_keeps_the_numbers(pool, tiny_models, chat_file, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = {"checkpoint__save_every": 2, "checkpoint__keep": 9}
    pool.run(1, ranks.train, run_arguments(tiny_models(), chat_file, whole, **options))
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "step_000004")
    shutil.rmtree(cut / "step_000005")
    layout = {"parallel__tensor": 2, "parallel__pipeline": 2}
    pool.run(4, ranks.train, run_arguments(tiny_models(), chat_file, cut, **options, **layout))
    for got, want in zip(metrics_of(cut), metrics_of(whole), strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-5)


def test_a_finished_run_does_nothing_more(pool, tiny_models, chat_file, tmp_path):
    arguments = run_arguments(tiny_models(), chat_file, tmp_path / "run")
    pool.run(1, ranks.train, arguments)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    pool.run(1, ranks.train, arguments)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_weights_of_a_checkpoint_start_a_new_run(pool, tiny_models, chat_file, tmp_path):
    """model.path may be a run folder: its newest weights, a new optimizer, steps from 1."""
    pool.run(1, ranks.train, run_arguments(tiny_models(), chat_file, tmp_path / "one"))
    pool.run(2, ranks.train, run_arguments(tmp_path / "one", chat_file, tmp_path / "two", parallel__tensor=2))
    first, second = metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two")
    assert [row["step"] for row in second] == [1, 2, 3, 4, 5]
    assert second[0]["loss"] < first[-1]["loss"] < first[0]["loss"]


@pytest.fixture
def finished(pool, tiny_models, chat_file, tmp_path):
    pool.run(1, ranks.train, run_arguments(tiny_models(), chat_file, tmp_path / "run"))
    return tmp_path / "run"


def test_another_model_is_refused_with_what_differs(finished, chat_file, tmp_path):
    other = make_model(tmp_path / "other", "qwen2_tied", intermediate_size=128)
    with pytest.raises(InputError, match=r"ffn_size 96 for 128 in .*step_000005"):
        prepare(parse(run_arguments(other, chat_file, finished)), ALONE)


def test_resume_never_refuses_a_used_folder(finished, tiny_models, chat_file):
    with pytest.raises(InputError, match="resume: never .*step_000005"):
        prepare(parse(run_arguments(tiny_models(), chat_file, finished, checkpoint__resume="never")), ALONE)


def test_fewer_steps_than_done_are_refused(finished, tiny_models, chat_file):
    with pytest.raises(InputError, match="5 steps already done .* got 3"):
        prepare(parse(run_arguments(tiny_models(), chat_file, finished, train__steps=3)), ALONE)
