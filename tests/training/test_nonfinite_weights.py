"""Weights that are not finite are refused when they are loaded and when they are written, by name and count, on every
layout; samples are never blamed for them.
"""

import pytest
import torch

from tests.harness import cli, sick, training_ranks
from tests.harness.tiny import change_tensors, make_model, run_arguments

LAYOUTS = {
    "one": (1, {}),
    "tp2_pp2": (4, {"parallel__tensor": 2, "parallel__pipeline": 2}),
    "dp2": (2, {"train__precision": "bf16"}),
}


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory):
    """A tied model with bad numbers in an unused embedding row, a norm, and interleaved and column-cut rows."""

    def change(tensors):
        tensors["model.embed_tokens.weight"][-1] = torch.nan
        tensors["model.layers.0.input_layernorm.weight"][5] = torch.nan
        tensors["model.layers.3.self_attn.k_proj.weight"][9, 1:3] = torch.inf
        tensors["model.layers.3.mlp.down_proj.weight"][:, 0] = -torch.inf

    folder = make_model(tmp_path_factory.mktemp("spoilt") / "model")
    change_tensors(folder, change)
    return folder


EXPECTED = (
    "weights must be finite: model.embed_tokens.weight holds 64 NaN; "
    "model.layers.0.input_layernorm.weight holds 1 NaN; "
    "model.layers.3.self_attn.k_proj.weight holds 2 infinite; model.layers.3.mlp.down_proj.weight holds 64 infinite in "
)


@pytest.mark.parametrize("world, layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_they_are_refused_when_they_are_loaded(pool, spoilt, chat_file, tmp_path, world, layout):
    arguments = run_arguments(spoilt, chat_file, tmp_path / "run", **layout)
    assert pool.run(world, training_ranks.train_to_the_refusal, arguments) == [f"{EXPECTED}{spoilt}"] * world


def test_a_cast_that_overflows_is_seen(pool, chat_file, tmp_path):
    """The largest numbers of fp32 are infinite in bf16."""
    model = make_model(tmp_path / "model")
    change_tensors(
        model, lambda tensors: tensors["model.norm.weight"].__setitem__(2, torch.finfo(torch.float32).max)
    )
    arguments = run_arguments(model, chat_file, tmp_path / "run", train__precision="bf16")
    [said] = pool.run(1, training_ranks.train_to_the_refusal, arguments)
    assert said == f"weights must be finite: model.norm.weight holds 1 infinite in {model}"
    [answer] = pool.run(
        1, cli.call, ["convert", "import", "--hf", str(model), "--out", str(tmp_path / "fp32")]
    )
    assert answer.code == 0
    for command in (
        ["convert", "import", "--hf", model, "--out", tmp_path / "out", "--dtype", "bfloat16"],
        [
            "convert",
            "export",
            "--checkpoint",
            tmp_path / "fp32",
            "--out",
            tmp_path / "out",
            "--dtype",
            "bfloat16",
        ],
    ):
        [answer] = pool.run(1, cli.call, list(map(str, command)))
        assert answer.code == 2
        assert "weights must be finite: model.norm.weight holds 1 infinite in" in answer.err
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("world, layout", [LAYOUTS["one"], LAYOUTS["tp2_pp2"]], ids=["one", "tp2_pp2"])
def test_they_are_not_exported(pool, tiny_models, chat_file, tmp_path, world, layout):
    """The update of the last step overflows: no later step can notice it."""
    options = {"checkpoint__export_hf": True, "train__steps": 2, **layout}
    arguments = run_arguments(tiny_models("qwen2_untied"), chat_file, tmp_path / "run", **options)
    name = "decoder.layers.1.input_layernorm.weight"
    for said in pool.run(world, sick.train_with_bad_weights, arguments, name, 2):
        assert said.startswith("the trained weights are not finite, no Hugging Face folder was written: ")
        assert "model.layers.1.input_layernorm.weight holds 1 NaN;" in said
    assert not (tmp_path / "run" / "hf").exists()
    assert not list((tmp_path / "run").glob(".hf*"))


def test_a_run_does_not_resume_from_them(pool, tiny_models, chat_file, tmp_path):
    options = {"train__steps": 2, "checkpoint__save_every": 1, "checkpoint__export_hf": True}
    arguments = run_arguments(tiny_models("qwen2_untied"), chat_file, tmp_path / "run", **options)
    pool.run(1, sick.train_with_bad_weights, arguments, "decoder.layers.1.input_layernorm.weight", 2)
    [said] = pool.run(1, training_ranks.train_to_the_refusal, arguments)
    assert "model.layers.1.input_layernorm.weight holds 1 NaN" in said
    assert said.endswith(f" in {tmp_path / 'run' / 'step_000002'}")
