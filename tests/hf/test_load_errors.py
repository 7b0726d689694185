"""A folder that does not hold the model's weights is refused before any weight is read, in one line that says what is
wrong and where.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_align.errors import InputError
from megatron_align.hf.load import load_weights
from megatron_align.hf.safetensors import HFWeights
from megatron_align.model.families import read_shape
from tests.harness.tiny import make_model

INDEX = "model.safetensors.index.json"
SHARDS = "model.safetensors or shards with model.safetensors.index.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny Llama, sharded; each test corrupts its own copy."""
    folder = tmp_path_factory.mktemp("saved")
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 131}
    return make_model(folder, "llama3", max_shard_size="60KB", **sizes)


@pytest.fixture
def hf(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "hf")


def shards(folder):
    return sorted(folder.glob("model-*.safetensors"))


def edit_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def edit_tensors(folder, change):
    """Rewrite the folder as one file, its tensors changed."""
    tensors = {name: t for file in shards(folder) for name, t in load_file(file).items()}
    change(tensors)
    for file in (*shards(folder), folder / INDEX):
        file.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def drop_weights(folder):
    for file in folder.glob("model*"):
        file.unlink()


def no_weights(folder):
    drop_weights(folder)
    return f"weights must be {SHARDS}, found neither in {folder}"


def only_pickles(folder):
    drop_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    return f"weights must be safetensors: convert pytorch_model.bin to safetensors first, in {folder}"


def no_index(folder):
    (folder / INDEX).unlink()
    return f"weights must be {SHARDS}, found only {shards(folder)[0].name} in {folder}"


def no_folder(folder):
    shutil.rmtree(folder)
    return f"no Hugging Face folder at {folder}"


def missing_shard(folder):
    file = shards(folder)[1]
    file.unlink()
    return f"the index names shards that do not exist: {file.name} in {folder}"


def tensor_in_another_shard(folder):
    first, second, *_ = (file.name for file in shards(folder))
    name = next(iter(load_file(folder / first)))
    edit_index(folder, lambda where: where.update({name: second}))
    return f"the index names tensors that their shards do not hold: {name} ({second}) in {folder}"


def path_out_of_the_folder(folder):
    shutil.copy(shards(folder)[0], folder.parent / "out.safetensors")
    edit_index(folder, lambda where: where.update({"model.norm.weight": "../out.safetensors"}))
    found = "'../out.safetensors' in"
    return f"weight_map must name safetensors files of its own folder, found {found} {folder / INDEX}"


def path_of_a_wrong_kind(folder):
    edit_index(folder, lambda where: where.update({"model.norm.weight": ["x"]}))
    return f"weight_map must name safetensors files of its own folder, found ['x'] in {folder / INDEX}"


def index_without_map(folder):
    (folder / INDEX).write_text("{}")
    return f"weight_map must map tensors to files, found None in {folder / INDEX}"


def index_that_is_not_json(folder):
    (folder / INDEX).write_text("")
    return f"{folder / INDEX} is not valid JSON: Expecting value: line 1 column 1 (char 0)"


def truncated_shard(folder):
    file = shards(folder)[-1]
    file.write_bytes(file.read_bytes()[:-1])
    return (
        f"cannot read safetensors file {file}: corrupt or truncated: Error while deserializing header: "
        "incomplete metadata, file not fully covered"
    )


def pointer_file(folder):
    file = shards(folder)[0]
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    return f"cannot read safetensors file {file}: it is a git-lfs pointer (run: git lfs pull)"


def missing_and_unexpected(folder):
    def rename(tensors):
        del tensors["lm_head.weight"]
        tensors["model.layers.0.self_attn.q_norm.weight"] = tensors.pop("model.norm.weight")
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(96, 64)

    edit_tensors(folder, rename)
    return (
        "weights do not match LlamaForCausalLM: missing lm_head.weight, model.norm.weight; "
        f"unexpected model.layers.0.self_attn.q_norm.weight, model.layers.1.mlp.up_proj.weight in {folder}"
    )


def index_that_forgets_a_tensor(folder):
    forgotten = []
    edit_index(folder, lambda where: forgotten.append(where.pop("model.norm.weight")))
    return (
        "the shards hold tensors that the index does not name: "
        f"model.norm.weight ({forgotten[0]}) in {folder}"
    )


def wrong_shapes(folder):
    edit_tensors(
        folder,
        lambda tensors: tensors.update(
            {"model.norm.weight": torch.zeros(65), "model.embed_tokens.weight": torch.zeros(132, 64)}
        ),
    )
    return (
        "tensor shapes do not match config.json: model.embed_tokens.weight must be [131, 64], "
        f"found [132, 64]; model.norm.weight must be [64], found [65] in {folder}"
    )


def wrong_dtype(folder):
    edit_tensors(
        folder, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(64, dtype=torch.int8)})
    )
    return f"tensor dtypes must be one of ['F32', 'F16', 'BF16', 'F64']: model.norm.weight is I8 in {folder}"


FAULTS = [
    no_folder,
    no_weights,
    only_pickles,
    no_index,
    missing_shard,
    tensor_in_another_shard,
    path_out_of_the_folder,
    path_of_a_wrong_kind,
    index_without_map,
    index_that_is_not_json,
    truncated_shard,
    pointer_file,
    missing_and_unexpected,
    index_that_forgets_a_tensor,
    wrong_shapes,
    wrong_dtype,
]


@pytest.mark.parametrize("corrupt", FAULTS, ids=[fault.__name__ for fault in FAULTS])
def test_fault_is_named_in_one_line_and_nothing_is_read(hf, monkeypatch, corrupt):
    def never(*args):
        raise AssertionError("a weight was read")

    shape = read_shape(hf)
    line = corrupt(hf)
    monkeypatch.setattr(HFWeights, "read", never)
    kept = {"decoder.final_layernorm.weight": torch.empty(64)}
    with pytest.raises(InputError) as error:
        load_weights(hf, shape, kept, 0, 1)
    assert str(error.value) == line
    assert "\n" not in line


def test_links_into_another_folder_are_followed(hf):
    """As the hub's cache lays its files out."""
    tensors = {name: tensor for file in shards(hf) for name, tensor in load_file(file).items()}
    for file in shards(hf):
        blob = file.rename(hf.parent / file.name)
        file.symlink_to(blob)
    norm, down = torch.full((64,), torch.nan), torch.full((64, 96), torch.nan)
    local = {"decoder.final_layernorm.weight": norm, "decoder.layers.0.mlp.linear_fc2.weight": down}
    load_weights(hf, read_shape(hf), local, 0, 1)
    assert torch.equal(norm, tensors["model.norm.weight"])
    assert torch.equal(down, tensors["model.layers.0.mlp.down_proj.weight"])
