"""HF -> ours -> HF is byte-identical for every tensor, for any number of tensor ranks; and what we export is
what transformers loads: no missing, no unexpected key, the same weights.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_align.hf.assets import copy_assets, write_config_dtype
from megatron_align.hf.load import load_weights
from megatron_align.hf.safetensors import HFWeights
from megatron_align.hf.writer import ShardWriter, hf_specs
from megatron_align.model.families import local_shape, padded_vocab, read_shape, rows, to_hf
from tests.harness.tiny import make_model

FAMILIES = {"qwen2": "qwen2_untied", "llama": "llama3"}
EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


def make_hf(folder, *, family="qwen2", tied=False, **options):
    """Save a tiny model of two layers and 131 tokens, and return its folder."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 131}
    return make_model(folder, FAMILIES[family], tie_word_embeddings=tied, **sizes, **options)


def tensors_of(folder):
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def load_rank(folder, rank, ranks, dtype=torch.float32):
    """Return this rank's parameters of the complete model, by Megatron name, out of NaN-poisoned memory."""
    shape = read_shape(folder)
    local = {
        r.megatron: torch.full(local_shape(r, shape, ranks), torch.nan, dtype=dtype) for r in rows(shape)
    }
    load_weights(folder, shape, local, rank, ranks)
    return local


def export(source, target, shards, dtype, **options):
    shape = read_shape(source)
    with ShardWriter(target, hf_specs(shape, dtype), **options) as writer:
        for row in rows(shape):
            for name, tensor in to_hf(row, [shard[row.megatron] for shard in shards], shape).items():
                writer.write(name, tensor)
        copy_assets(source, writer.partial)
        write_config_dtype(writer.partial, dtype)


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype, name
        assert torch.equal(got[name], want[name]), name


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_bitwise(tmp_path, family, tied, dtype, ranks):
    """Four ranks on two key/value heads: the cut goes through query groups."""
    source = make_hf(tmp_path / "hf", family=family, tied=tied, dtype=dtype)
    shards = [load_rank(source, rank, ranks, dtype) for rank in range(ranks)]
    export(source, tmp_path / "out", shards, dtype)
    assert_same(tensors_of(tmp_path / "out"), tensors_of(source))


def test_sharded_in_and_sharded_out(tmp_path):
    source = make_hf(tmp_path / "hf", max_shard_size="60KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    out = tmp_path / "out"
    export(source, out, [load_rank(source, 0, 1)], torch.float32, max_bytes=60_000)
    assert_same(tensors_of(out), tensors_of(source))

    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(out).values())
    assert all(name in load_file(out / file) for name, file in index["weight_map"].items())
    for file in files:
        held = load_file(out / file)
        assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= 60_000
    assert HFWeights(out).names == sorted(index["weight_map"])


@pytest.mark.parametrize("max_bytes", [60_000, 10**9], ids=["sharded", "single"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_the_export(tmp_path, family, tied, max_bytes):
    source = make_hf(tmp_path / "hf", family=family, tied=tied)
    export(
        source,
        tmp_path / "out",
        [load_rank(source, 0, 1, torch.bfloat16)],
        torch.bfloat16,
        max_bytes=max_bytes,
    )
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype == torch.bfloat16
    want = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    assert_same(model.state_dict(), want.state_dict())


def test_parameters_are_cast_to_their_own_dtype(tmp_path):
    source = make_hf(tmp_path / "hf", family="llama")
    name = "decoder.layers.1.mlp.linear_fc2.weight"
    got = load_rank(source, 0, 1, torch.bfloat16)[name]
    assert torch.equal(got, tensors_of(source)["model.layers.1.mlp.down_proj.weight"].bfloat16())


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_tied_model_fills_the_last_stages_copy_and_its_padding(tmp_path, ranks):
    source = make_hf(tmp_path / "hf", tied=True)
    copy = torch.full((padded_vocab(131, ranks) // ranks, 64), torch.nan)
    load_weights(source, read_shape(source), {HEAD: copy}, ranks - 1, ranks)
    assert torch.equal(copy, load_rank(source, ranks - 1, ranks)[EMBEDDING])
    assert not copy[131 - padded_vocab(131, ranks) :].any()


def test_one_stage_reads_only_its_rows_and_only_its_slices(tmp_path, monkeypatch):
    source = make_hf(tmp_path / "hf")
    read = []
    read_segment = HFWeights.read

    def spy(self, segment):
        tensor = read_segment(self, segment)
        read.append((segment.name, tuple(tensor.shape)))
        return tensor

    monkeypatch.setattr(HFWeights, "read", spy)
    load_weights(
        source, read_shape(source), {"decoder.layers.1.mlp.linear_fc1.weight": torch.empty(48, 64)}, 3, 4
    )
    assert read == [(f"model.layers.1.mlp.{x}_proj.weight", (24, 64)) for x in ("gate", "up")]


def test_redundant_tensors_are_accepted(tmp_path):
    """Old rotary buffers, and the copy of the embedding that some tied checkpoints store."""
    source = make_hf(tmp_path / "hf", tied=True)
    tensors = tensors_of(source)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert HEAD not in load_rank(source, 0, 1)


@pytest.mark.parametrize(
    "local, line",
    [
        ({"decoder.layers.7.mlp.linear_fc1.weight": torch.empty(1)}, "not parameters of Qwen2ForCausalLM: "),
        (
            {EMBEDDING: torch.empty(131, 64)},
            f"{EMBEDDING} must be [128, 64] on each of 2 ranks, is [131, 64]",
        ),
    ],
    ids=["name", "shape"],
)
def test_parameters_that_are_not_the_models_are_a_bug_of_the_caller(tmp_path, local, line):
    source = make_hf(tmp_path / "hf")
    with pytest.raises(ValueError) as error:
        load_weights(source, read_shape(source), local, 0, 2)
    assert str(error.value).startswith(line)
