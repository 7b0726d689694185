"""A run has its folder alone, wherever it is mounted: what cannot work is refused before anything is written there."""

import re
import subprocess

import pytest

from megatron_align.errors import TrainingFault
from megatron_align.model import parallel
from megatron_align.model.parallel import RankInfo
from megatron_align.train import main
from megatron_align.training.run_lock import LOCK, RunLock
from tests.harness import refusals, training_ranks
from tests.harness.tiny import metrics_of, run_arguments

ALONE = RankInfo(rank=0, local_rank=0, world_size=1)


@pytest.fixture(params=["bind", "simulated"])
def mount(request, tmp_path):
    """``mount(folder)`` mounts another folder of the same disk there, as a container's volume is."""
    mounted = []
    (tmp_path / "volume").mkdir()

    def bind(folder):
        folder.mkdir(parents=True)
        if request.param == "simulated":
            mounted.append(folder)
            return
        command = ["mount", "--bind", tmp_path / "volume", folder]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting needs root")
        mounted.append(folder)

    bind.is_simulated = request.param == "simulated"
    if bind.is_simulated:
        with refusals.mounted(mounted, tmp_path / "mountinfo"):
            yield bind
        return
    yield bind
    for folder in mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)  # workers still map its data


def error_of(arguments, capsys):
    capsys.readouterr()
    assert main(arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    return line


def test_a_mounted_export_folder_is_refused_before_the_first_byte(
    tiny_models, chat_file, tmp_path, mount, capsys
):
    run = tmp_path / "run"
    mount(run / "hf")
    arguments = run_arguments(tiny_models(), chat_file, run, checkpoint__export_hf=True)
    line = error_of(arguments, capsys)
    assert line.startswith("error: checkpoint.dir/hf must not be a mount point")
    assert f"mounted at {run / 'hf'}" in line
    assert [path.name for path in run.iterdir()] == ["hf"]


def train_in(rank_info, arguments, mounted, listed_in):
    """In a process of the pool: train where folders are mount points."""
    with refusals.mounted(mounted, listed_in):
        return training_ranks.train(rank_info, arguments)


def test_the_folder_itself_may_be_a_mount_point(pool, tiny_models, chat_file, tmp_path, mount):
    run = tmp_path / "run"
    mount(run)
    options = {"train__steps": 2, "checkpoint__export_hf": True}
    arguments = run_arguments(tiny_models(), chat_file, run, **options)
    if mount.is_simulated:
        pool.run(1, train_in, arguments, [run], tmp_path / "mountinfo")
    else:
        pool.run(1, training_ranks.train, arguments)
    volume = run if mount.is_simulated else tmp_path / "volume"
    assert (volume / "hf" / "model.safetensors").exists()
    assert (volume / "step_000002").is_dir()
    assert not (run / LOCK).exists()


def test_a_folder_in_use_is_left_as_it_is(tiny_models, chat_file, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    with RunLock(run, ALONE) as lock:
        lock.acquire()
        line = error_of(run_arguments(tiny_models(), chat_file, run), capsys)
        assert line.startswith(f"error: checkpoint.dir '{run}' is in use by another run: process ")
        assert [path.name for path in run.iterdir()] == [LOCK]


def test_bad_input_leaves_neither_lock_nor_folder(tiny_models, tmp_path, capsys):
    (tmp_path / "data.jsonl").write_text("{}\n")
    assert "data.jsonl" in error_of(
        run_arguments(tiny_models(), tmp_path / "data.jsonl", tmp_path / "a" / "run"), capsys
    )
    assert not (tmp_path / "a").exists()


MOMENTS = {  # of the call before which the lock is lost: its place, name; then the steps in rows, what the folder holds
    "step": ("training.trainer", "Trainer", "train_step", [], []),
    "save": ("checkpoint.saver", "Saver", "finish", [1, 2], [".step_000002.partial"]),
    "export": ("training.trainer", "Trainer", "export", [1, 2, 3], ["step_000002", "step_000003"]),
}


def lose_the_lock(rank_info, arguments, moment):
    """In a process of the pool: another machine takes the folder just before a call is made; return the error."""
    import importlib
    from dataclasses import replace
    from pathlib import Path
    from unittest import mock

    from megatron_align.objectives.configuration import parse
    from megatron_align.storage.lock_holder import Holder
    from megatron_align.training.loop import run

    module, owner, name, *_ = MOMENTS[moment]
    owner, config = getattr(importlib.import_module(f"megatron_align.{module}"), owner), parse(arguments)
    path, call = Path(config.checkpoint.dir) / LOCK, getattr(owner, name)

    def lose_first(self, *arguments):
        if rank_info.rank == 0:
            other = replace(Holder.this_process(path, ""), host="node7", machine="another boot")
            path.write_text(other.to_text())
        return call(self, *arguments)

    with mock.patch.object(owner, name, lose_first), pytest.raises(TrainingFault) as fault:
        run(config, rank_info)
    parallel.leave()
    return str(fault.value)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_lost_its_folder_writes_neither_rows_nor_checkpoints(
    pool, tiny_models, chat_file, tmp_path, moment
):
    run, options = tmp_path / "run", {"train__steps": 3, "checkpoint__save_every": 2}
    options |= {"checkpoint__export_hf": True, "checkpoint__async_save": False}
    arguments = run_arguments(tiny_models(), chat_file, run, **options)
    line = "took over checkpoint.dir while this run was paused; it is left unchanged"
    first, second = pool.run(2, lose_the_lock, arguments, moment)
    assert re.fullmatch(f"process .* on node7, .* {line}", first)
    assert second.endswith(line)
    *_, steps, left = MOMENTS[moment]
    assert sorted(path.name for path in run.glob("*step_*")) == left
    assert [row["step"] for row in metrics_of(run)] == steps
    assert (run / LOCK).exists()  # the other run's
    assert not any((run / name).exists() for name in ("hf", "finished", "requeue"))
