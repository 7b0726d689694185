"""Law 4 (first part): a resumed run writes the very rows that the uninterrupted run writes, on the same layout."""

import itertools
import shutil

import pytest

from megatron_align.errors import InputError
from megatron_align.model.parallel import RankInfo
from megatron_align.objectives.configuration import parse
from megatron_align.training.setup import prepare_run
from tests.harness import training_ranks
from tests.harness.marks import mark_slow
from tests.harness.pool import RankFailed
from tests.harness.tiny import change_tensors, make_model, metrics_of, numbers, run_arguments, write_pairs

ALONE = RankInfo(rank=0, local_rank=0, world_size=1)


def cut_after(run, copy, step):
    """Copy a run as if it had been killed after it saved ``step``."""
    shutil.copytree(run, copy)
    for path in copy.glob("step_*"):
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    return copy


SAME_LAYOUT = {
    "one": (1, {}),
    "tp2": (2, {"parallel__tensor": 2}),
    "pp2_dp2": (4, {"parallel__pipeline": 2}),
    "cp2": (2, {"parallel__context": 2}),
}


@pytest.mark.parametrize(
    "layout, precision",
    mark_slow(
        itertools.product(SAME_LAYOUT, ["fp32", "bf16"]),
        slow=[("one", "bf16"), ("tp2", "fp32"), ("pp2_dp2", "bf16"), ("cp2", "fp32"), ("one", "fp32")],
    ),
)
def test_resumed_rows_are_bit_identical(pool, tiny_models, chat_file, tmp_path, layout, precision):
    world, parallel = SAME_LAYOUT[layout]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = {
        "train__precision": precision,
        "optimizer__schedule": "cosine",
        "checkpoint__save_every": 2,
        **parallel,
    }
    pool.run(
        world,
        training_ranks.train,
        run_arguments(tiny_models(), chat_file, whole, checkpoint__keep=9, **options),
    )
    # What a kill after step 3 leaves: the checkpoint of step 2, a row too many, half a line.
    cut_after(whole, cut, step=2)
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    (cut / "metrics.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    pool.run(world, training_ranks.train, run_arguments(tiny_models(), chat_file, cut, **options))
    assert numbers(cut) == numbers(whole)
    assert [row["step"] for row in metrics_of(cut)] == [1, 2, 3, 4, 5]
    assert sorted(path.name for path in cut.glob("step_*")) == ["step_000004", "step_000005"]  # keep: 2


LAYOUTS = {
    "one": (1, {}),
    "dp2": (2, {}),
    "tp2": (2, {"parallel__tensor": 2}),
    "pp2": (2, {"parallel__pipeline": 2}),
    "vpp2": (2, {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2}),
    "dp4": (4, {}),
    "ulysses2": (2, {"parallel__context": 2, "parallel__context_kind": "ulysses"}),
    "allgather2_dp2": (4, {"parallel__context": 2, "parallel__context_kind": "allgather"}),
    "tp2_pp2": (4, {"parallel__tensor": 2, "parallel__pipeline": 2}),
    "pp2_dp2": (4, {"parallel__pipeline": 2}),
}
# Each kind of ranks before or after.
QUICK = [("one", "allgather2_dp2"), ("vpp2", "dp2"), ("ulysses2", "tp2_pp2")]
SLOW = [(one, other) for one in LAYOUTS for other in LAYOUTS if one != other and (one, other) not in QUICK]


@pytest.mark.parametrize("before, after", mark_slow([*QUICK, *SLOW], SLOW))
def test_resuming_on_another_layout_keeps_the_numbers(pool, tiny_models, chat_file, tmp_path, before, after):
    """Weights, masters and moments lie elsewhere then; a moment that is lost changes the second step after it."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = {"checkpoint__save_every": 2, "checkpoint__keep": 9}
    world, layout = LAYOUTS[before]
    pool.run(world, training_ranks.train, run_arguments(tiny_models(), chat_file, whole, **options, **layout))
    cut_after(whole, cut, step=2)
    world, layout = LAYOUTS[after]
    pool.run(world, training_ranks.train, run_arguments(tiny_models(), chat_file, cut, **options, **layout))
    for got, want in zip(metrics_of(cut), metrics_of(whole), strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-5)


def test_checkpoints_do_not_care_for_transformer_engine(pool, tiny_models, chat_file, tmp_path):
    """megatron-core keeps Adam's step in another place with it; either kind of checkpoint resumes with either."""
    whole = tmp_path / "whole"
    options = {"checkpoint__save_every": 2, "checkpoint__keep": 9}
    pool.run(1, training_ranks.train, run_arguments(tiny_models(), chat_file, whole, **options))
    pool.run(
        1,
        training_ranks.train_with_extras,
        run_arguments(tiny_models(), chat_file, tmp_path / "extras", **options),
    )
    for first, then in (("whole", training_ranks.train_with_extras), ("extras", training_ranks.train)):
        cut = cut_after(tmp_path / first, tmp_path / f"{first}_cut", step=2)
        pool.run(1, then, run_arguments(tiny_models(), chat_file, cut, **options))
        assert numbers(cut) == numbers(whole)


def test_the_optimizer_options_of_this_run_count(pool, tiny_models, chat_file, tmp_path):
    """A checkpoint brings its moments, not its options."""
    whole = tmp_path / "whole"
    pool.run(
        1,
        training_ranks.train,
        run_arguments(tiny_models(), chat_file, whole, checkpoint__save_every=2, checkpoint__keep=9),
    )
    cut = cut_after(whole, tmp_path / "cut", step=2)
    pool.run(
        1, training_ranks.train, run_arguments(tiny_models(), chat_file, cut, optimizer__weight_decay=50.0)
    )
    got, want = numbers(cut), numbers(whole)
    assert got[:3] == want[:3]  # the loss of step 3 comes before its update
    assert got[3]["loss"] != pytest.approx(want[3]["loss"], rel=1e-3)


def test_a_kill_between_validation_and_save_loses_no_row(pool, tiny_models, chat_file, tmp_path):
    options = {
        "checkpoint__save_every": 2,
        "checkpoint__keep": 9,
        "train__validate_every": 2,
        "data__validation": chat_file,
    }
    whole = tmp_path / "whole"
    pool.run(1, training_ranks.train, run_arguments(tiny_models(), chat_file, whole, **options))
    # Killed after step 4 was validated, before it was saved.
    cut = cut_after(whole, tmp_path / "cut", step=2)
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    (cut / "metrics.jsonl").write_text("".join(lines[:-2]))
    pool.run(1, training_ranks.train, run_arguments(tiny_models(), chat_file, cut, **options))
    assert metrics_of(cut, "validation") == metrics_of(whole, "validation")
    assert [row["step"] for row in metrics_of(cut, "validation")] == [2, 4, 5]


@pytest.fixture(scope="module")
def complete(pool, tiny_models, chat_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("complete") / "run"
    pool.run(1, training_ranks.train, run_arguments(tiny_models(), chat_file, folder))
    return folder


@pytest.fixture
def finished(complete, tmp_path):
    return shutil.copytree(complete, tmp_path / "run")


def test_a_finished_run_does_nothing_more(pool, finished, tiny_models, chat_file):
    before = (finished / "metrics.jsonl").read_text()
    pool.run(1, training_ranks.train, run_arguments(tiny_models(), chat_file, finished))
    assert (finished / "metrics.jsonl").read_text() == before


def test_weights_of_a_checkpoint_start_a_new_run(pool, complete, chat_file, tmp_path):
    """model.path may be a run folder: its newest weights, a new optimizer, steps from 1."""
    pool.run(
        2,
        training_ranks.train,
        run_arguments(complete, chat_file, tmp_path / "two", parallel__tensor=2, train__steps=2),
    )
    first, second = metrics_of(complete), metrics_of(tmp_path / "two")
    assert [row["step"] for row in second] == [1, 2]
    assert second[0]["loss"] < first[-1]["loss"] < first[0]["loss"]


def test_another_model_is_refused_with_what_differs(finished, chat_file, tmp_path):
    other = make_model(tmp_path / "other", "qwen2_tied", intermediate_size=128)
    with pytest.raises(InputError, match=r"ffn_size 96 instead of 128 in .*step_000005"):
        prepare_run(parse(run_arguments(other, chat_file, finished)), ALONE)


def test_another_run_is_refused_with_what_differs(finished, tiny_models, chat_file, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(chat_file.read_text() * 2)
    changes = {
        "train.seed was 1234 and is 7": {"train__seed": 7},
        "train.global_batch_size was 12 and is 8": {"train__global_batch_size": 8},
        "train.precision was fp32 and is bf16": {"train__precision": "bf16"},
        "data.shuffle was True and is False": {"data__shuffle": False},
        "objective.normalization was token and is sample": {"objective__normalization": "sample"},
        "the tokenised data was": {"data__sequence_length": 300},
    }
    for message, options in changes.items():
        with pytest.raises(InputError, match=f"{message}.* give another checkpoint.dir"):
            prepare_run(parse(run_arguments(tiny_models(), chat_file, finished, **options)), ALONE)
    with pytest.raises(InputError, match="the tokenised data was"):
        prepare_run(parse(run_arguments(tiny_models(), other, finished)), ALONE)


def test_what_a_killed_run_left_is_removed_when_the_run_starts_again(finished, tiny_models, chat_file, pool):
    shutil.copytree(finished / "step_000005", finished / ".step_000009.partial")
    shutil.copytree(finished / "step_000005", finished / ".step_000003.deleted")
    (finished / "step_000005").rename(finished / ".step_000005.replaced")
    (finished / "requeue").touch()
    pool.run(1, training_ranks.train, run_arguments(tiny_models(), chat_file, finished, train__steps=6))
    assert [row["step"] for row in metrics_of(finished)] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]  # the replaced checkpoint came back
    assert not (finished / "requeue").exists()
    assert [path.name for path in finished.glob(".*")] == []


def test_a_wanted_change_is_gone_on_with(finished, tiny_models, chat_file, pool):
    """Another objective and other data, asked for by name: steps go on from 5, the new loss counts from there."""
    options = {"train__steps": 7, "objective__normalization": "sample", "train__global_batch_size": 8}
    wanted = {"checkpoint__resume_allow": '["order", "objective"]'}
    with pytest.raises(InputError, match=r"resume_allow \[order, objective\]"):
        prepare_run(parse(run_arguments(tiny_models(), chat_file, finished, **options)), ALONE)
    pool.run(1, training_ranks.train, run_arguments(tiny_models(), chat_file, finished, **options, **wanted))
    assert [row["samples"] for row in metrics_of(finished)] == [12] * 5 + [8] * 2


def test_a_reference_that_starts_to_move_is_read_from_its_own_place(pool, tiny_models, tmp_path):
    """The checkpoint of a run with a resting reference holds none."""
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    run = tmp_path / "run"
    options = {"objective__name": "dpo", "reference__mode": "live", "train__steps": 1}
    pool.run(1, training_ranks.train, run_arguments(tiny_models(), pairs, run, **options))
    options |= {"train__steps": 2, "reference__sync_steps": 1, "checkpoint__resume_allow": '["reference"]'}
    pool.run(1, training_ranks.train, run_arguments(tiny_models(), pairs, run, **options))
    assert [row["step"] for row in metrics_of(run)] == [1, 2]


@pytest.mark.parametrize("mode", ["live", "cached"])
def test_a_reference_whose_weights_were_changed_where_they_lie_is_refused(mode, pool, tiny_models, tmp_path):
    make_model(tmp_path / "reference")
    pairs, run = write_pairs(tmp_path / "pairs.jsonl"), tmp_path / "run"
    options = {
        "objective__name": "dpo",
        "reference__mode": mode,
        "reference__path": str(tmp_path / "reference"),
    }
    pool.run(1, training_ranks.train, run_arguments(tiny_models(), pairs, run, train__steps=1, **options))
    change_tensors(tmp_path / "reference", lambda tensors: tensors["model.norm.weight"].mul_(2))
    again = {"train__steps": 2, **options}
    with pytest.raises(RankFailed, match=r"sha256 \w+ and are \w+ .*resume_allow \[reference\]"):
        pool.run(1, training_ranks.train, run_arguments(tiny_models(), pairs, run, **again))
    again["checkpoint__resume_allow"] = '["reference"]'
    pool.run(1, training_ranks.train, run_arguments(tiny_models(), pairs, run, **again))
    assert [row["step"] for row in metrics_of(run)] == [1, 2]


def test_resume_never_refuses_a_used_folder(finished, tiny_models, chat_file):
    with pytest.raises(InputError, match="resume: never .*step_000005"):
        prepare_run(
            parse(run_arguments(tiny_models(), chat_file, finished, checkpoint__resume="never")), ALONE
        )


def test_fewer_steps_than_done_are_refused(finished, tiny_models, chat_file):
    with pytest.raises(InputError, match="5 steps already done .* got 3"):
        prepare_run(parse(run_arguments(tiny_models(), chat_file, finished, train__steps=3)), ALONE)
