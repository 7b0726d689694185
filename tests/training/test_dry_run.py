"""A dry run refuses what a run refuses, prints what the run then does, and writes and deletes nothing."""

import os
import re
from pathlib import Path

import pytest

from megatron_align import train
from tests.harness.tiny import metrics_of, run_arguments
from tests.harness.training_ranks import train as train_ranks


@pytest.fixture
def arguments(tiny_models, chat_file, tmp_path):
    options = {"parallel__tensor": 2, "train__steps": 1}
    return run_arguments(tiny_models("qwen2_tied"), chat_file, tmp_path / "run", **options)


def test_it_says_what_the_run_does(pool, arguments, tmp_path, capsys):
    assert train.main([*arguments, "--dry_run=4"]) == 0
    said = capsys.readouterr().out
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert "4 ranks = tensor 2 x pipeline 1 x data 2" in said
    assert "steps      0 done of 1" in said
    pool.run(4, train_ranks, arguments)
    [row] = metrics_of(tmp_path / "run")
    step = re.search(r"12 samples, ([\d,]+) tokens, ([\d,]+) scored, .* ([\d.]+)% padding", said)
    tokens, scored = (int(step[i].replace(",", "")) for i in (1, 2))
    assert (tokens, scored) == (row["tokens"], row["trained_tokens"])
    assert float(step[3]) == pytest.approx(100 * row["padding"], abs=0.051)  # printed with one digit


def tree(folder: Path) -> dict[str, tuple]:
    """Return every path below a folder with what would show that it was written."""
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size, p.is_dir()) for p in sorted(folder.rglob("*"))}


def test_nothing_is_written_where_the_run_would_write(arguments, tmp_path, capsys):
    before = tree(tmp_path)
    assert train.main([*arguments, "--dry_run=2"]) == 0
    assert "0 done of 1" in capsys.readouterr().out
    assert tree(tmp_path) == before  # not even checkpoint.dir, or the tokenised data


def test_beside_a_live_run_nothing_is_deleted_and_its_checkpoint_is_found(pool, arguments, tmp_path, capsys):
    run = tmp_path / "run"
    pool.run(2, train_ranks, arguments)
    (run / ".step_000009.partial").mkdir()
    (run / ".step_000009.partial" / "card.json").write_text("{}")
    (run / ".step_000008.deleted").mkdir()
    (run / "requeue").write_text("1\n")
    before = tree(tmp_path)
    assert train.main([*arguments, "--train.steps", "4", "--dry_run=2"]) == 0
    assert "steps      1 done of 4" in capsys.readouterr().out
    assert tree(tmp_path) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_created_is_refused(arguments, tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert train.main([*arguments, "--dry_run=2"]) == 2
    assert "no permission in" in capsys.readouterr().err


def test_a_file_in_the_place_of_the_folder_is_refused(arguments, tmp_path, capsys):
    (tmp_path / "run").write_text("not a folder")
    assert train.main([*arguments, "--dry_run=2"]) == 2
    assert "checkpoint.dir cannot be created or written" in capsys.readouterr().err


def test_without_a_launcher_it_takes_the_ranks_that_the_layout_needs(arguments, monkeypatch, capsys):
    assert train.main([*arguments, "--dry_run"]) == 0
    assert "2 ranks = tensor 2 x pipeline 1 x data 1" in capsys.readouterr().out
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "6")):
        monkeypatch.setenv(name, value)
    assert train.main([*arguments, "--dry_run"]) == 0
    assert "6 ranks = tensor 2 x pipeline 1 x data 3" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert train.main([*arguments, "--dry_run"]) == 0
    assert capsys.readouterr().out == ""  # rank 0 says it


@pytest.mark.parametrize(
    "options, message",
    [
        (["--dry_run=3"], "world size must be a multiple of tensor x pipeline x context"),
        (["--dry_run=none"], "--dry_run=RANKS needs a positive whole number, got 'none'"),
        (["--dry_run", "--data.train", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--dry_run", "--train.steps", "1", "--optimizer.warmup_steps", "2"], "warmup_steps"),
    ],
)
def test_it_refuses_what_a_run_refuses(arguments, capsys, options, message):
    assert train.main([*arguments, *options]) == 2
    assert message in capsys.readouterr().err
