"""A model's folder gets all that its source has besides weights, and config.json states the dtype of the weights."""

import json

import pytest
import torch
from transformers import AutoConfig

from megatron_align.errors import InputError
from megatron_align.hf.assets import copy_assets, write_config_dtype


def names_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_assets_are_copied_and_weights_are_not(tmp_path):
    source, out = tmp_path / "hf", tmp_path / "out"
    kept = [
        "LICENSE",
        "added_tokens.json",
        "additional_chat_templates/tool.jinja",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
    ]
    left = [
        "model.safetensors",
        "model.safetensors.index.json",
        "optimizer.pt",
        "pytorch_model.bin",
        "README.md",
    ]
    (source / "additional_chat_templates").mkdir(parents=True)
    for name in kept + left:
        (source / name).write_text(name)
    out.mkdir()
    copy_assets(source, out)
    assert names_in(out) == sorted([*kept, "additional_chat_templates"])
    assert all((out / name).read_text() == name for name in kept)


def test_assets_need_a_config(tmp_path):
    with pytest.raises(InputError) as error:
        copy_assets(tmp_path, tmp_path)
    assert str(error.value) == f"Hugging Face folder is incomplete: no file {tmp_path / 'config.json'}"


@pytest.mark.parametrize(
    "before, after",
    [
        ({"torch_dtype": "float32"}, {"torch_dtype": "bfloat16"}),
        ({"dtype": "float32"}, {"dtype": "bfloat16"}),
        ({"dtype": "float16", "torch_dtype": None}, {"dtype": "bfloat16", "torch_dtype": "bfloat16"}),
        ({}, {"torch_dtype": "bfloat16"}),
    ],
    ids=["transformers 4", "transformers 5", "both", "neither"],
)
def test_dtype_is_set_where_transformers_reads_it(tmp_path, before, after):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "qwen2", **before, "note": "é"}))
    write_config_dtype(tmp_path, torch.bfloat16)
    assert json.loads(path.read_text()) == {"model_type": "qwen2", **after, "note": "é"}
    assert AutoConfig.from_pretrained(tmp_path).dtype == torch.bfloat16
