"""Frozen parameters keep every bit, the others train as they would on any layout, and a run says how many it trains."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.harness import training_ranks
from tests.harness.tiny import metrics_of, numbers, run_arguments

LAYOUT = 1e-5  # law 1's tolerance: fp32 sums in another order (5e-8 measured)
FROZEN = "[embed_tokens, layers.0.*, layers.3.mlp.*]"  # the embedding is tied: the head too


@pytest.fixture(scope="module")
def one_rank(pool, tiny_models, chat_file, tmp_path_factory):
    run = tmp_path_factory.mktemp("one")
    options = {"model__freeze": FROZEN, "checkpoint__export_hf": True, "train__steps": 3}
    pool.run(1, training_ranks.train, run_arguments(tiny_models(), chat_file, run, **options))
    return run


def test_only_the_others_change(tiny_models, one_rank):
    base, trained = (load_file(folder / "model.safetensors") for folder in (tiny_models(), one_rank / "hf"))
    kept = {name for name in base if torch.equal(base[name], trained[name])}
    assert kept == {
        name for name in base if "embed_tokens" in name or ".layers.0." in name or ".layers.3.mlp." in name
    }


@pytest.mark.parametrize(
    "world, layout",
    [
        (4, {"parallel__tensor": 2, "parallel__pipeline": 2}),
        pytest.param(
            2,
            {"train__recompute_layers": 1, "parallel__pipeline": 2, "parallel__virtual_pipeline": 2},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["tp2_pp2", "vpp2_recompute"],
)
def test_layouts_agree(world, layout, pool, tiny_models, chat_file, tmp_path, one_rank):
    options = {"model__freeze": FROZEN, "train__steps": 3, **layout}
    pool.run(world, training_ranks.train, run_arguments(tiny_models(), chat_file, tmp_path, **options))
    for row, same in zip(metrics_of(tmp_path), metrics_of(one_rank), strict=True):
        assert row["loss"] == pytest.approx(same["loss"], rel=LAYOUT)
        assert row["grad_norm"] == pytest.approx(same["grad_norm"], rel=LAYOUT)


def test_an_adapter_of_a_checkpoint_is_that_of_its_export(pool, chat_file, tmp_path, one_rank):
    """The base of an adapter may be one of our checkpoints, here of a run with frozen parts."""
    runs = {}
    for name, base in (("checkpoint", one_rank), ("export", one_rank / "hf")):
        runs[name] = tmp_path / name
        options = {"model__adapter": "{rank: 2}", "parallel__tensor": 2, "train__steps": 2}
        pool.run(2, training_ranks.train, run_arguments(base, chat_file, runs[name], **options))
    losses = [[row["loss"] for row in metrics_of(run)] for run in runs.values()]
    assert losses[0] == losses[1]


def test_resumed_rows_are_bit_identical(pool, tiny_models, chat_file, tmp_path):
    """The optimizer's state of the trained layers alone is stored, layer by layer."""
    options = {"model__freeze": FROZEN, "checkpoint__save_every": 2, "checkpoint__keep": 9}
    options |= {"parallel__tensor": 2, "train__steps": 3}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    pool.run(2, training_ranks.train, run_arguments(tiny_models(), chat_file, whole, **options))
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "step_000003")
    (cut / "finished").unlink(missing_ok=True)
    pool.run(2, training_ranks.train, run_arguments(tiny_models(), chat_file, cut, **options))
    assert numbers(cut) == numbers(whole)
    assert metrics_of(cut)[-1]["step"] == 3
