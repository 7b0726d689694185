"""Nothing that has its final name can be lost or incomplete after a power failure: written, forced, renamed, forced."""

import json
import os

import pytest

from megatron_align.convert.export_hf import export_hf
from megatron_align.convert.import_hf import import_hf
from megatron_align.storage import fsync as fsync_module
from megatron_align.storage.atomic_write import replace_file
from tests.harness import training_ranks
from tests.harness.durability import Durability
from tests.harness.tiny import run_arguments, write_pairs
from tools import main


def test_the_recorder_sees_what_is_missing(tmp_path):
    """Without it no test below could fail."""
    file, partial = tmp_path / "file", tmp_path / ".partial"
    with Durability() as seen:
        partial.write_text("x")
        replace_file(partial, file)
    assert (seen.renamed, seen.unsafe()) == (["file"], [])
    with Durability() as seen:
        partial.write_text("x")
        os.replace(partial, file)
    assert [line.split(": ")[1] for line in seen.unsafe()] == [
        f"{partial} is not forced after its last change",
        "its folder is not forced after the rename",
    ]
    with Durability() as seen:
        partial.write_text("x")
        fsync_module.fsync(partial)
        with partial.open("a") as out:
            out.write("y")
        os.rename(partial, file)
        fsync_module.fsync(tmp_path)
    assert [line.split(": ")[1] for line in seen.unsafe()] == [
        f"{partial} is not forced after its last change"
    ]


def test_a_run(pool, tiny_models, tmp_path):
    """Tokenised data, the reference's column, checkpoints, the best one, the export, and the rows after a resume."""
    pairs = write_pairs(tmp_path / "pairs.jsonl", samples=16)
    options = {
        "objective__name": "dpo",
        "data__validation": pairs,
        "train__validate_every": 1,
        "checkpoint__save_every": 1,
        "checkpoint__keep_best": "loss",
        "checkpoint__export_hf": True,
        "train__global_batch_size": 4,
    }
    for steps in (2, 3):
        arguments = run_arguments(tiny_models(), pairs, tmp_path / "run", **options, train__steps=steps)
        [(renamed, unsafe)] = pool.run(1, training_ranks.train_recorded, arguments)
        assert unsafe == []
        assert {f"step_{steps:06d}", "hf", "best.json"} <= set(renamed)
        assert any(name.startswith("reference_") for name in renamed) == (steps == 2)
        assert ("metrics.jsonl" in renamed) == (steps == 3)


def test_an_online_run(pool, tiny_models, tmp_path):
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": f"{i}?"}) for i in range(4)))
    arguments = run_arguments(
        tiny_models(),
        tmp_path / "prompts.jsonl",
        tmp_path / "run",
        objective__name="grpo",
        rollout__max_tokens=4,
        rollout__completions=2,
        rewards="[{kind: length, max: 3}]",
        train__global_batch_size=2,
        train__steps=2,
    )
    [(renamed, unsafe)] = pool.run(1, training_ranks.train_recorded, arguments)
    assert unsafe == []
    assert renamed.count("step_000001") == 1  # the rollouts of the first step


def test_conversion_merging_and_generation(tiny_models, tmp_path, capsys):
    with Durability() as seen:
        import_hf(tiny_models(), tmp_path / "imported")
        export_hf(tmp_path / "imported", tmp_path / "exported")
        arguments = ["merge", "linear", "--models", str(tiny_models()), str(tmp_path / "exported")]
        assert main.main([*arguments, "--out", str(tmp_path / "merged")]) == 0
        (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "1?"}))
        arguments = ["--prompts", str(tmp_path / "prompts.jsonl"), "--out", str(tmp_path / "answers.jsonl")]
        assert main.main(["generate", "--model", str(tiny_models()), *arguments, "--max-tokens", "2"]) == 0
    assert seen.unsafe() == []
    assert {"imported", "exported", "merged", "answers.jsonl"} <= set(seen.renamed)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_without_forcing_each_of_them_would_be_unsafe(kind, tiny_models, tmp_path, monkeypatch):
    monkeypatch.setattr(fsync_module, "fsync_open", lambda *_, **__: None)
    with Durability() as seen:
        if kind == "folder":
            import_hf(tiny_models(), tmp_path / "imported")
        else:
            (tmp_path / ".file").write_text("x")
            replace_file(tmp_path / ".file", tmp_path / "file")
    assert len(seen.unsafe()) > 1
