"""A shape equals what transformers reads from the same config.json, or is refused with a line that names the key."""

import json

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from megatron_align.errors import InputError
from megatron_align.model.families import (
    read_shape,
)

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 131,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def qwen2(**extra):
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "num_key_value_heads": 2,
        **SIZES,
        **extra,
    }


def llama(**extra):
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SIZES, **extra}


def qwen3(**extra):
    return {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 32, **SIZES, **extra}


def mistral(**extra):
    return {"architectures": ["MistralForCausalLM"], "model_type": "mistral", **SIZES, **extra}


def baichuan(**extra):
    sizes = {**SIZES, "max_position_embeddings": 4096}
    return {"architectures": ["BaichuanForCausalLM"], "model_type": "baichuan", **sizes, **extra}


def reward(**extra):
    return {**qwen2(**extra), "architectures": ["Qwen2ForSequenceClassification"]}


def write(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def without(config, key):
    return {k: v for k, v in config.items() if k != key}


# Each as people's folders have it: transformers 4 and 5 spellings, and keys left out.
CONFIGS = {
    "qwen2": qwen2(rope_theta=1000000, tie_word_embeddings=True, use_sliding_window=False, sliding_window=32),
    "qwen2 of transformers 5": qwen2(rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    "qwen2, windows after the last layer": qwen2(use_sliding_window=True, max_window_layers=2),
    "qwen2, 32 key/value heads by default": without(
        qwen2(hidden_size=128, num_attention_heads=64), "num_key_value_heads"
    ),
    "qwen2, null": qwen2(num_key_value_heads=None, rope_scaling=None),
    "qwen2, own head_dim": qwen2(head_dim=32),
    "qwen2, no architectures": without(qwen2(), "architectures"),
    "llama, all defaults": llama(),
    "llama-3": llama(num_key_value_heads=2, rope_theta=500000.0, rms_norm_eps=1e-5, head_dim=None),
    "llama-3.1": llama(
        head_dim=128,
        rope_theta=500000.0,
        max_position_embeddings=131072,
        rope_scaling={"rope_type": "llama3", "original_max_position_embeddings": 8192, **LLAMA3},
    ),
    "llama-3.2 of transformers 5": llama(
        tie_word_embeddings=True,
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "original_max_position_embeddings": 8192,
            **LLAMA3,
            "factor": 32.0,
        },
    ),
    "llama3, old key type": llama(rope_scaling={"type": "llama3", **LLAMA3}, max_position_embeddings=64),
    "llama3, original length outside": llama(
        rope_scaling={"rope_type": "llama3", "original_max_position_embeddings": 16, **LLAMA3},
        original_max_position_embeddings=128,
        max_position_embeddings=512,
    ),
    "qwen3": qwen3(num_key_value_heads=2, rope_theta=1000000),
    "qwen3, all defaults": without(qwen3(num_attention_heads=32), "head_dim"),
    "mistral": mistral(num_key_value_heads=2, sliding_window=None, rope_theta=1e6),
    "mistral, a window as long as the model": mistral(
        num_key_value_heads=2, sliding_window=64, max_position_embeddings=64
    ),
    "llama, both spellings": llama(
        rope_scaling={"type": "llama3", "rope_theta": 9.0, **LLAMA3}, rope_parameters={"rope_theta": 4.0}
    ),
}


@pytest.fixture(params=CONFIGS, ids=CONFIGS)
def both(request, tmp_path):
    folder = write(tmp_path, CONFIGS[request.param])
    return read_shape(folder), AutoConfig.from_pretrained(folder)


def test_shape_is_what_transformers_reads(both):
    shape, hf = both
    heads, hidden = hf.num_attention_heads, hf.hidden_size
    assert shape.architecture == type(hf).__name__.replace("Config", "ForCausalLM")
    assert shape.qk_norm == isinstance(hf, Qwen3Config)
    assert shape.qkv_bias == isinstance(hf, Qwen2Config)
    assert shape.tied_embeddings == hf.tie_word_embeddings
    assert (shape.num_layers, shape.hidden_size, shape.num_heads) == (hf.num_hidden_layers, hidden, heads)
    assert shape.num_query_groups == hf.num_key_value_heads
    assert shape.head_dim == (getattr(hf, "head_dim", None) or hidden // heads)
    assert (shape.ffn_size, shape.vocab_size) == (hf.intermediate_size, hf.vocab_size)
    assert (shape.norm_eps, shape.max_positions) == (hf.rms_norm_eps, hf.max_position_embeddings)
    assert shape.rope_theta == hf.rope_parameters["rope_theta"]


def test_rotary_frequencies_are_bitwise_those_of_transformers(both):
    shape, hf = both
    rotary = LlamaRotaryEmbedding if isinstance(hf, (LlamaConfig, MistralConfig)) else Qwen2RotaryEmbedding
    ours = shape.rope_frequencies()
    assert ours.dtype == torch.float32
    assert torch.equal(ours, rotary(hf).inv_freq)


KNOWN = (
    "architectures must be one of Qwen2ForCausalLM, LlamaForCausalLM, Qwen3ForCausalLM, MistralForCausalLM, "
    "BaichuanForCausalLM, Qwen2ForSequenceClassification, LlamaForSequenceClassification, found "
)
OTHER = " in {path}: models of another architecture are not trained or converted"
REFUSED = {
    "unknown architecture": (
        qwen2(architectures=["Qwen2MoeForCausalLM"]),
        KNOWN + "'Qwen2MoeForCausalLM'" + OTHER,
    ),
    "no architecture": (SIZES, KNOWN + "'nothing'" + OTHER),
    "unknown model_type": ({"model_type": "mixtral", **SIZES}, KNOWN + "'mixtral'" + OTHER),
    "baichuan-13b": (
        without(baichuan(), "max_position_embeddings"),
        "max_position_embeddings must be given: a Baichuan without it has ALiBi (13B), which is not supported, "
        "found nothing in {path}",
    ),
    "mistral with windows": (
        mistral(num_key_value_heads=2, max_position_embeddings=32768),
        "sliding_window must be null or at least 32768: sliding windows are not supported, found 4096 in {path}",
    ),
    "two labels": (reward(), "a reward model must have num_labels 1, found 2 in {path}"),
    "three labels": (
        reward(id2label={"0": "a", "1": "b", "2": "c"}),
        "a reward model must have num_labels 1, found 3 in {path}",
    ),
    "qwen3 with biases": (
        qwen3(num_key_value_heads=2, attention_bias=True),
        "attention_bias must be false: this architecture is supported without biases, found true in {path}",
    ),
    "sliding window": (
        qwen2(use_sliding_window=True, max_window_layers=1),
        "use_sliding_window must be false: sliding windows are not supported, they start at layer 1, "
        "found true in {path}",
    ),
    "sliding layer": (
        qwen2(layer_types=["full_attention", "sliding_attention"]),
        "layer_types must be 'full_attention' for every layer, found "
        "['full_attention', 'sliding_attention'] in {path}",
    ),
    "rope type": (
        llama(rope_scaling={"type": "yarn", "factor": 4.0}),
        "rope_type must be 'default' or 'llama3', found 'yarn' in rope_scaling of {path}",
    ),
    "rope per layer type": (
        qwen2(rope_parameters={"full_attention": {"rope_theta": 1.0}}),
        "rope_parameters must be one flat object that is valid for every layer, "
        "found {{'full_attention': {{'rope_theta': 1.0}}}} in {path}",
    ),
    "partial rotary": (
        llama(partial_rotary_factor=0.5),
        "partial_rotary_factor must be 1.0, found 0.5 in rope_parameters of {path}",
    ),
    "llama3 without factor": (
        llama(rope_scaling={"rope_type": "llama3"}),
        "factor must be a positive number, found nothing in rope_scaling of {path}",
    ),
    "llama3 without ramp": (
        llama(rope_scaling={"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}),
        "high_freq_factor must be more than low_freq_factor = 1.0, found 1.0 in rope_scaling of {path}",
    ),
    "activation": (llama(hidden_act="gelu"), "hidden_act must be 'silu', found 'gelu' in {path}"),
    "attention bias": (
        llama(attention_bias=True),
        "attention_bias must be false: this architecture is supported without biases, found true in {path}",
    ),
    "mlp bias": (
        llama(mlp_bias=True),
        "mlp_bias must be false: this architecture is supported without biases, found true in {path}",
    ),
    "quantized": (
        llama(quantization_config={"quant_method": "gptq"}),
        "quantization_config must be absent: training needs fp32, fp16 or bf16 weights, "
        "found {{'quant_method': 'gptq'}} in {path}",
    ),
    "dropout": (
        llama(attention_dropout=0.1),
        "attention_dropout must be 0: results must not depend on the layout, found 0.1 in {path}",
    ),
    "missing size": (
        without(llama(), "hidden_size"),
        "hidden_size must be a positive whole number, found nothing in {path}",
    ),
    "size of a wrong kind": (
        llama(vocab_size="131"),
        "vocab_size must be a positive whole number, found '131' in {path}",
    ),
    "flag of a wrong kind": (
        llama(tie_word_embeddings=1),
        "tie_word_embeddings must be true or false, found 1 in {path}",
    ),
    "groups": (
        llama(num_key_value_heads=3),
        "num_key_value_heads must be a divisor of num_attention_heads = 4, found 3 in {path}",
    ),
    "heads": (
        llama(hidden_size=66),
        "hidden_size must be an even multiple of num_attention_heads = 4 where there is no head_dim, "
        "found 66 in {path}",
    ),
    "odd head": (
        llama(head_dim=5),
        "head_dim must be an even number, as rotary embeddings rotate pairs, found 5 in {path}",
    ),
}


@pytest.mark.parametrize("config, line", REFUSED.values(), ids=REFUSED)
def test_what_we_cannot_compute_is_refused_in_one_line(tmp_path, config, line):
    write(tmp_path, config)
    with pytest.raises(InputError) as error:
        read_shape(tmp_path)
    assert str(error.value) == line.format(path=tmp_path / "config.json")


UNREADABLE = {
    "not JSON": (b"{", "is not valid JSON: Expecting property name enclosed in double quotes"),
    "not text": (b"\xff\xfe", "is not valid JSON: 'utf-8' codec can't decode byte 0xff"),
    "not an object": (b"[]", "must contain a JSON object, found a list"),
}


@pytest.mark.parametrize("content, line", UNREADABLE.values(), ids=UNREADABLE)
def test_an_unreadable_config_is_named(tmp_path, content, line):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError) as error:
        read_shape(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'config.json'} {line}")
    assert "\n" not in str(error.value)


def test_a_folder_without_config_is_named(tmp_path):
    with pytest.raises(InputError) as error:
        read_shape(tmp_path / "absent")
    path = tmp_path / "absent" / "config.json"
    assert str(error.value) == f"a Hugging Face folder needs a file config.json, found none at {path}"


def test_a_reward_model_has_no_head_to_tie(tmp_path):
    write(tmp_path, reward(tie_word_embeddings=True, id2label={"0": "LABEL_0"}))
    shape = read_shape(tmp_path)
    assert (shape.is_reward, shape.tied_embeddings, shape.qkv_bias) == (True, False, True)
