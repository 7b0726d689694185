"""Adapters that do not fit are refused in one line that says why; those that fit are read as PEFT reads them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_align.config import AdapterConfig
from megatron_align.errors import InputError
from megatron_align.hf.adapter import read_adapter
from megatron_align.hf.adapter_options import resolve_adapter
from megatron_align.model.families import read_shape
from megatron_align.model.families.saved_modules import saveable_modules
from tests.harness.tiny import make_adapter, make_model

LAYERS, MODULES = 4, 7


@pytest.fixture(scope="module")
def model(tiny_models):
    return tiny_models()


@pytest.fixture(scope="module")
def shape(model):
    return read_shape(model)


@pytest.fixture
def adapter(model, tmp_path):
    return make_adapter(tmp_path / "adapter", model)


def change(folder, **options):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | options))


def edit(folder, call):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    call(tensors)
    save_file(tensors, file)


def test_what_is_configured(shape):
    made = resolve_adapter(AdapterConfig(), shape)
    assert (made.rank, made.scale, len(made.modules)) == (16, 2.0, LAYERS * MODULES)
    assert resolve_adapter(None, shape) is None
    rslora = resolve_adapter(AdapterConfig(rank=4, alpha=8, rslora=True), shape)
    assert rslora.scale == 8 / 4**0.5


@pytest.mark.parametrize(
    "targets, count",
    [
        (["q_proj"], 4),
        (["q_proj", "v_proj"], 8),
        (["layers.1.mlp.*"], 3),
        (["model.layers.0.self_attn.o_proj"], 1),
        (["*_proj"], 28),
        ("all-linear", 28),
    ],
)
def test_targets(shape, targets, count):
    assert len(resolve_adapter(AdapterConfig(targets=targets), shape).modules) == count


@pytest.mark.parametrize(
    "options, message",
    [
        ({"alpha": 0}, "model.adapter.alpha must be positive .* got 0"),
        ({"alpha": float("nan")}, "model.adapter.alpha must be positive .* got nan"),
        ({"rank": 0}, "model.adapter.rank must be at least 1, got 0"),
        ({"dropout": 1.0}, "model.adapter.dropout must be at least 0 and below 1, got 1.0"),
        ({"dora": True, "dropout": 0.1}, "dropout must be 0 with dora, .* got 0.1"),
        ({"targets": "q_proj"}, "targets must be all-linear or a list of module names, got 'q_proj'"),
        ({"targets": []}, "targets must name at least one module"),
        ({"targets": ["q_prj"]}, r"'q_prj' matches no linear layer of Qwen2.*; did you mean 'q_proj'\?"),
        ({"targets": ["layers.9.*"]}, "'layers.9.*' matches no linear layer"),
        ({"targets": ["embed_tokens"]}, "must not name embed_tokens where it is tied to lm_head"),
        ({"targets": ["lm_head"]}, "must not name lm_head, which is tied to embed_tokens: PEFT would"),
        (
            {"targets": ["*norm", "lm_*"]},
            "'\\*norm' matches model.layers.0.* not built; model.adapter.modules_to",
        ),
        ({"targets": ["layers.0.*"]}, "'layers.0.*' matches model.layers.0.input_layernorm: .* not built"),
    ],
)
def test_options_that_cannot_be(shape, options, message):
    with pytest.raises(InputError, match=message):
        resolve_adapter(AdapterConfig(**options), shape)


def test_a_reward_model_has_no_head(shape):
    with pytest.raises(InputError, match="must not name lm_head, which a reward model does not have"):
        resolve_adapter(AdapterConfig(targets=["lm_head"]), shape.as_reward())


def test_an_adapter_brings_its_own_options(shape, adapter):
    found = resolve_adapter(AdapterConfig(path=str(adapter)), shape)
    assert (found.rank, found.alpha, found.rslora) == (3, 6.0, False)
    assert resolve_adapter(AdapterConfig(path=str(adapter), rank=3, targets="all-linear"), shape) == found
    for options in ({"rank": 4}, {"alpha": 5.0}, {"rslora": True}, {"targets": ["q_proj"]}):
        with pytest.raises(
            InputError, match=f"model.adapter.{next(iter(options))} must be left out or be that"
        ):
            resolve_adapter(AdapterConfig(path=str(adapter), **options), shape)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"peft_type": "IA3"}, "peft_type must be LORA, found 'IA3'"),
        ({"use_dora": True}, "does not match Qwen2ForCausalLM: missing .*lora_magnitude_vector"),
        ({"bias": "all"}, "an adapter with bias 'all' is not built"),
        ({"init_lora_weights": "pissa"}, "an adapter with init_lora_weights 'pissa' is not built"),
        ({"some_new_kind": 3}, "an adapter with some_new_kind 3 is not built"),
        ({"rank_pattern": {"q_proj": 4}}, "an adapter with rank_pattern .* is not built"),
        ({"modules_to_save": ["score"]}, "a reward model's adapter of a language model is not merged"),
        ({"modules_to_save": ["norm"]}, r"missing .*layers\.0\.input_layernorm\.weight"),
        ({"r": 0}, "needs a positive r and lora_alpha, found 0 and 6"),
        ({"lora_alpha": 0}, "needs a positive r and lora_alpha, found 3 and 0"),
        (
            {"r": 4},
            r"of another size than the model or its r: .*lora_A.weight must be \[4, 64\], found \[3, 64\]",
        ),
    ],
)
def test_configurations_that_are_refused(shape, adapter, options, message):
    change(adapter, **options)
    with pytest.raises(InputError, match=message):
        read_adapter(adapter, shape)


def test_tensors_that_do_not_fit(shape, adapter):
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    edit(
        adapter, lambda tensors: tensors.update({"base_model.model.lm_head.lora_A.weight": tensors.pop(name)})
    )
    with pytest.raises(
        InputError, match=f"does not match Qwen2ForCausalLM: missing {name}; unexpected .*lm_head"
    ):
        read_adapter(adapter, shape)


def test_adapters_of_other_models(shape, tmp_path):
    wide = make_adapter(tmp_path / "wide", make_model(tmp_path / "one", hidden_size=128))
    with pytest.raises(
        InputError, match=r"another size than the model or its r: .*\[3, 64\], found \[3, 128\]"
    ):
        read_adapter(wide, shape)
    deep = make_adapter(tmp_path / "deep", make_model(tmp_path / "two", num_hidden_layers=5))
    with pytest.raises(InputError, match=r"unexpected .*layers\.4\."):
        read_adapter(deep, shape)
    shallow = make_adapter(tmp_path / "shallow", make_model(tmp_path / "three", num_hidden_layers=2))
    with pytest.raises(
        InputError,
        match=r"target_modules name model\.layers\.2\..*, of which it has no tensors: .* in .*shallow",
    ):
        read_adapter(shallow, shape)
    change(shallow, layers_to_transform=[0, 1])  # so it was trained on a model of as many layers as this one
    assert len(read_adapter(shallow, shape).modules) == 14


def test_folders_that_cannot_be_read(shape, adapter, tmp_path):
    with pytest.raises(InputError, match="no adapter folder at"):
        read_adapter(tmp_path / "absent", shape)
    weights = adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="adapter_model.safetensors: corrupt or truncated"):
        read_adapter(adapter, shape)
    weights.unlink()
    torch.save({}, adapter / "adapter_model.bin")
    with pytest.raises(InputError, match=r"adapter_model.bin is a pickle and is not read: convert it"):
        read_adapter(adapter, shape)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(InputError, match="must hold adapter_config.json, found none"):
        read_adapter(adapter, shape)
    (tmp_path / "run").mkdir()
    make_adapter(tmp_path / "run" / "adapter", make_model(tmp_path / "other"))
    with pytest.raises(InputError, match=r"found none in \S+run: give \S+run/adapter$"):
        read_adapter(tmp_path / "run", shape)


@pytest.mark.parametrize(
    ("variant", "names", "count"),
    [
        ("qwen2_untied", ["norm"], 2 * LAYERS + 1),
        ("qwen2_untied", ["lm_head", "embed_tokens", "model.norm"], 3),
        ("qwen2_untied", ["layers.2.*layernorm"], 2),
        ("qwen3", ["norm"], 4 * LAYERS + 1),
        ("qwen2_reward", ["score", "post_attention_layernorm"], LAYERS),
        ("qwen2_reward", ["score"], 0),
    ],
)
def test_modules_to_save_are_those_of_peft(variant, names, count, tiny_models, tmp_path):
    """PEFT wraps every module whose name ends with one of these; a folder names exactly the modules that it holds."""
    model = tiny_models(variant)
    shape = read_shape(model)
    saved = resolve_adapter(AdapterConfig(modules_to_save=names), shape).saved
    assert len(saved) == count
    if not any("*" in name for name in names):
        endings = tuple(set(names) - {"score"})
        assert saved == {name for name in saveable_modules(shape) if endings and name.endswith(endings)}
    folder = make_adapter(tmp_path / "adapter", model, saved=names)
    assert resolve_adapter(AdapterConfig(path=str(folder)), shape).saved == saved
    stored = json.loads((folder / "adapter_config.json").read_text())["modules_to_save"] or []
    assert {name for name in saveable_modules(shape) if name.endswith(tuple(stored))} == saved


@pytest.mark.parametrize(
    ("variant", "options", "line"),
    [
        (
            "qwen2_tied",
            {"modules_to_save": ["embed_tokens"]},
            "embed_tokens without ensure_weight_tying: true",
        ),
        (
            "qwen2_tied",
            {"modules_to_save": ["lm_head", "norm"]},
            "not name lm_head without ensure_weight_tying",
        ),
        (
            "qwen2_tied",
            {"modules_to_save": ["norm"], "ensure_weight_tying": True},
            "is of embed_tokens or lm_head",
        ),
        (
            "qwen2_untied",
            {"modules_to_save": ["norm"], "ensure_weight_tying": True},
            "has separate weights for",
        ),
        ("qwen2_tied", {"ensure_weight_tying": True}, "is of modules_to_save, which names none"),
        ("qwen2_tied", {"modules_to_save": []}, "must name at least one module"),
        ("qwen2_tied", {"modules_to_save": ["score"]}, "'score' matches no embedding, output head or norm"),
        ("qwen2_tied", {"modules_to_save": ["embed_token"]}, r"did you mean 'embed_tokens'\?"),
        (
            "qwen2_tied",
            {"modules_to_save": ["q_proj"]},
            "'q_proj' matches model.layers.0.self_attn.q_proj: complete",
        ),
        ("qwen2_tied", {"modules_to_save": ["layers.1"]}, "'layers.1' matches model.layers.1: complete"),
        ("qwen2_reward", {"modules_to_save": ["lm_head"]}, "'lm_head' matches no embedding"),
        (
            "qwen2_untied",
            {"modules_to_save": ["lm_head", "norm"], "targets": ["lm_head", "q_proj"]},
            "modules_to_save must not name lm_head, which the low-rank adapter changes too",
        ),
    ],
)
def test_modules_that_cannot_be_saved(variant, options, line, tiny_models):
    with pytest.raises(InputError, match=line):
        resolve_adapter(AdapterConfig(**options), read_shape(tiny_models(variant)))


def test_a_folder_of_copies_brings_its_modules(tiny_models, tmp_path):
    model = tiny_models("qwen2_tied")
    shape, folder = read_shape(model), make_adapter(tmp_path / "adapter", model, saved=["lm_head"])
    assert resolve_adapter(AdapterConfig(path=str(folder)), shape).saved == {"model.embed_tokens"}
    with pytest.raises(InputError, match="modules_to_save must be left out or be that of the adapter"):
        resolve_adapter(AdapterConfig(path=str(folder), modules_to_save=["norm"]), shape)
    change(folder, ensure_weight_tying=False)
    with pytest.raises(InputError, match="modules_to_save in .* must not name model.embed_tokens without"):
        read_adapter(folder, shape)
    change(folder, ensure_weight_tying=True)
    edit(folder, lambda tensors: tensors["base_model.model.lm_head.weight"].add_(1))
    with pytest.raises(InputError, match="must be equal; they differ in"):
        read_adapter(folder, shape)


def test_whoever_may_read_the_folder_may_read_the_weights(adapter):
    assert (adapter / "adapter_model.safetensors").stat().st_mode & 0o777 == adapter.stat().st_mode & 0o666
