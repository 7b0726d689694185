"""Law 1 for uneven pipelines: losses, gradient norms, weights and checkpoints as those of one process.

Embeddings are tied across the stages; the exported weights show that every layer kept its number.
"""

import subprocess
import sys

import pytest
from safetensors.torch import load_file

from tests.harness import training_ranks
from tests.harness.marks import mark_slow
from tests.harness.tiny import make_model, metrics_of, run_arguments

SPLITS = {
    "first": (2, {"pipeline": 2, "first_stage_layers": 2}),
    "virtual": (2, {"pipeline": 2, "virtual_pipeline": 2, "first_stage_layers": 2}),
    "both": (4, {"pipeline": 4, "first_stage_layers": 1, "last_stage_layers": 1}),
    "counted_virtual": (
        2,
        {"pipeline": 2, "virtual_pipeline": 2, "count_embedding": True, "count_loss": True},
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "six", num_hidden_layers=6)


@pytest.fixture(scope="module")
def train(pool, model, chat_file):
    def run(folder, world=1, layout=None, **options):
        layout = {f"parallel__{name}": value for name, value in (layout or {}).items()}
        arguments = run_arguments(
            model,
            chat_file,
            folder,
            data__cache=chat_file.parent,
            checkpoint__export_hf=True,
            **{"train__steps": 3, **layout, **options},
        )
        pool.run(world, training_ranks.train, arguments)

    return run


@pytest.fixture(scope="module")
def reference(train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    train(folder)
    return folder


def assert_same(folder, reference):
    rows, wanted = metrics_of(folder), metrics_of(reference)
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row, want in zip(rows, wanted, strict=True):
        assert row["loss"] == pytest.approx(want["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-5)
    weights, others = (load_file(path / "hf" / "model.safetensors") for path in (folder, reference))
    assert weights.keys() == others.keys()
    for name, other in others.items():
        assert (weights[name] - other).norm() <= 1e-2 * other.norm(), name  # Adam steps on rounding noise too


# Merged layers are on the virtual one too, below.
@pytest.mark.parametrize("split", mark_slow(SPLITS, ["virtual"]))
def test_as_one_process(split, train, reference, tmp_path):
    world, layout = SPLITS[split]
    train(tmp_path, world, layout)
    assert_same(tmp_path, reference)


def test_under_merged_layers(train, reference, tmp_path):
    """Two of [1, 2, 1, 2] layers are merged: some chunks have fewer."""
    world, layout = SPLITS["virtual"]
    train(tmp_path, world, layout, train__recompute_layers=2)
    assert_same(tmp_path, reference)


@pytest.mark.slow
def test_a_checkpoint_resumes_elsewhere_and_converts(train, reference, tmp_path):
    world, layout = SPLITS["virtual"]
    train(tmp_path, world, layout, train__steps=2)
    command = [sys.executable, "-m", "megatron_align.tools.main", "convert", "export"]
    done = subprocess.run(
        [*command, "--checkpoint", tmp_path / "step_000002", "--out", tmp_path / "converted"],
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    exported, converted = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "converted"))
    assert exported.keys() == converted.keys()
    assert all(tensor.equal(converted[name]) for name, tensor in exported.items())
    train(tmp_path, 4, {"pipeline": 4, "count_embedding": True, "count_loss": True})
    assert_same(tmp_path, reference)
