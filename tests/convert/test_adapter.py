"""Law 10 by command: the export of an adapter's checkpoint is what its run wrote, and ``verify`` exits with 0 for it.

Any change in the PEFT folder, of one bit or option, in the merged model beyond rounding, or in the base, is exit code 1
or one line of error.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_align.convert.open_adapter import open_adapter
from megatron_align.hf.adapter import base_hash
from megatron_align.model.families import read_shape
from tests.harness import training_ranks
from tests.harness.corruption import rewrite_checksums
from tests.harness.tiny import (
    change_tensors,
    make_adapter,
    make_baichuan,
    make_model,
    run_arguments,
    write_pairs,
)

WEIGHTS, UP = "adapter_model.safetensors", "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model whose attention depends on positions, so that logits show rotary frequencies that are rounded."""
    folder = make_model(tmp_path_factory.mktemp("base") / "base")
    change_tensors(folder, sharpen)
    return folder


def sharpen(tensors):
    for name, tensor in tensors.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor *= 10


@pytest.fixture(scope="module")
def run(pool, base, chat_file, tmp_path_factory):
    """A bf16 run on two ranks, from an fp32 base: the base was cast before the adapter was added to it."""
    folder = tmp_path_factory.mktemp("run")
    options = {"model__adapter": "{rank: 3, alpha: 7.5, rslora: true}", "train__precision": "bf16"}
    options |= {"optimizer__lr": 1e-2, "parallel__tensor": 2, "checkpoint__export_hf": True}
    pool.run(2, training_ranks.train, run_arguments(base, chat_file, folder, **options))
    return folder


@pytest.fixture(scope="module")
def exported(convert, run, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "out"
    answer = convert("export", "--checkpoint", run, "--out", out)
    assert answer.code == 0, answer.err
    assert "exported the adapter, LoRA of rank 3, scale 4.33013, on 28 linear layers, from" in answer.out
    return out


def test_an_export_is_what_the_run_wrote(run, exported):
    config = "adapter/adapter_config.json"
    assert (exported / config).read_text() == (run / config).read_text()
    found, wanted = (load_file(folder / "adapter" / WEIGHTS) for folder in (exported, run))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], want) for name, want in wanted.items())
    assert base_hash(exported / "adapter") == base_hash(run / "adapter")
    found, wanted = (load_file(folder / "hf" / "model.safetensors") for folder in (exported, run))
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        # fp32 sums of three products in another order, which bf16 rounds away but for ties
        torch.testing.assert_close(found[name], want, rtol=8e-3, atol=0)
    assert (exported / "hf/README.md").read_text() == (run / "hf/README.md").read_text()
    assert (exported / "hf/config.json").read_text() == (run / "hf/config.json").read_text()


@pytest.mark.parametrize("folder", ["adapter", "hf"])
def test_what_the_run_wrote_is_verified(folder, convert, run):
    answer = convert("verify", "--hf", run / folder, "--checkpoint", run)
    assert answer.code == 0, answer.out + answer.err
    assert "the same model" in answer.out
    assert "logits   built-in sentences" in answer.out


def test_every_change_is_found(convert, run, exported, tmp_path):
    changes = {
        "bit": lambda tensors: (
            tensors["base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"]
            .view(torch.int16)[0, :1]
            .bitwise_xor_(torch.tensor(1, dtype=torch.int16))
        ),
        "alpha": None,
    }
    for name, change in changes.items():
        copy = shutil.copytree(exported / "adapter", tmp_path / name)
        if change is None:
            config = json.loads((copy / "adapter_config.json").read_text())
            (copy / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 8}))
        else:
            tensors = load_file(copy / WEIGHTS)
            change(tensors)
            save_file(tensors, copy / WEIGHTS)
        answer = convert("verify", "--hf", copy, "--checkpoint", run)
        assert answer.code == 1, name
        line = (
            "layers.1.mlp.up_proj.lora_A.weight: differs"
            if change
            else "alpha is 7.5 in the checkpoint, 8.0 in"
        )
        assert line in answer.out
    copy = shutil.copytree(exported / "hf", tmp_path / "hf")
    change_tensors(copy, lambda tensors: tensors[UP][:1, :1].mul_(1.05))
    answer = convert("verify", "--hf", copy, "--checkpoint", run)
    assert answer.code == 1
    assert f"{UP}: differs by more than the rounding of W + scale B A" in answer.out
    head = "lm_head.weight"
    change_tensors(copy, lambda tensors: tensors.update({head: 2 * tensors["model.embed_tokens.weight"]}))
    answer = convert("verify", "--hf", copy, "--checkpoint", run)
    assert answer.code == 1
    assert f"{head}: differs from the embedding that it should be tied to" in answer.out


def test_deep_is_of_merged_models(convert, run):
    answer = convert("verify", "--deep", "--hf", run / "adapter", "--checkpoint", run)
    assert answer.code == 2
    assert "is a PEFT folder: leave --deep out" in answer.err


def test_a_packed_matrix_and_a_normalised_head_are_verified(convert, pool, chat_file, tmp_path):
    """transformers' model of Baichuan2 has q, k and v apart, and the head is normalised after the cast to bf16."""
    base = make_baichuan(tmp_path / "base")
    options = {"model__adapter": "{rank: 2, targets: [W_pack]}", "train__precision": "bf16"}
    options |= {"optimizer__lr": 1e-2, "train__steps": 2}
    pool.run(1, training_ranks.train, run_arguments(base, chat_file, tmp_path / "run", **options))
    answer = convert("verify", "--hf", tmp_path / "run/adapter", "--checkpoint", tmp_path / "run")
    assert answer.code == 0, answer.out + answer.err
    assert "logits   built-in sentences" in answer.out


@pytest.mark.slow
def test_another_base_and_none(convert, run, base, tmp_path):
    other = make_model(tmp_path / "other")
    change_tensors(other, lambda tensors: tensors["model.norm.weight"].add_(1))
    for command in (["export", "--out", tmp_path / "out"], ["verify", "--hf", run / "hf"]):
        answer = convert(*command, "--checkpoint", run, "--base", other)
        assert answer.code == 2
        assert "the adapter is of another base: it was trained on weights with sha256" in answer.err
    assert not (tmp_path / "out").exists()
    # a checkpoint of an older version, whose base is gone, holds the adapter all the same
    moved = shutil.copytree(run, tmp_path / "moved")
    for file in moved.glob("step_*/card.json"):
        card = json.loads(file.read_text())
        card["adapter"] = {"base": "/gone", "weights": card["adapter"]["weights"]}
        file.write_text(json.dumps(card))
        rewrite_checksums(file.parent)
    answer = convert("export", "--checkpoint", moved, "--out", tmp_path / "out")
    assert answer.code == 0, answer.err
    assert (
        "the merged model was not written: its base /gone is not here; give the base as --base" in answer.out
    )
    assert not (tmp_path / "out" / "hf").exists()
    assert convert("verify", "--hf", tmp_path / "out/adapter", "--checkpoint", run).code == 0
    answer = convert("verify", "--hf", run / "hf", "--checkpoint", moved)
    assert answer.code == 2
    assert "give it as --base" in answer.err
    assert convert("verify", "--hf", run / "hf", "--checkpoint", moved, "--base", base).code == 0


@pytest.mark.slow
def test_a_reward_models_adapter_has_a_language_model_as_base(convert, pool, tiny_models, tmp_path):
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    options = {
        "objective__name": "reward",
        "train__steps": 2,
        "model__adapter": "{rank: 2, targets: [v_proj]}",
    }
    arguments = run_arguments(tiny_models(), pairs, tmp_path / "run", checkpoint__export_hf=True, **options)
    pool.run(1, training_ranks.train, arguments)
    assert convert("export", "--checkpoint", tmp_path / "run", "--out", tmp_path / "out").code == 0
    for folder in ("adapter", "hf"):
        answer = convert("verify", "--hf", tmp_path / "out" / folder, "--checkpoint", tmp_path / "run")
        assert answer.code == 0, answer.out + answer.err
        assert ("note     logits were not compared: those of a reward model" in answer.out) == (
            folder == "adapter"
        )


def test_adapters_are_opened_wherever_they_are(run, exported, tiny_models, tmp_path):
    shape = read_shape(tiny_models())
    opened = [open_adapter(path, shape) for path in (run, run / "step_000005", run / "adapter", exported)]
    for one in opened:
        assert one.adapter == opened[0].adapter
        assert one.weights == opened[0].weights
        assert all(torch.equal(one.tensors[name], tensor) for name, tensor in opened[0].tensors.items())
    made = open_adapter(make_adapter(tmp_path / "made", tiny_models()), shape)
    assert made.weights is None
