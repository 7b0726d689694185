"""Law 10 for files: merged weights are base + scale B A exactly, and an adapter that exists is found again.

The judge of merging is PEFT's formula in fp32; PEFT's own ``merge_and_unload`` is held against a run's export in
``tests/training/test_adapter_trl.py``.
"""

import hashlib
import re

import pytest
import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from megatron_align.errors import InputError
from megatron_align.hf.adapter import read_adapter
from megatron_align.merge.adapter import extract_adapter, merge_adapter
from megatron_align.model.dora import row_norms
from megatron_align.model.families import read_shape
from megatron_align.tools.main import main
from tests.harness.peft import load
from tests.harness.tiny import change_tensors, make_adapter, make_baichuan, make_model, make_reward

FILE = "adapter_model.safetensors"


def expected(base, adapter, dtype=None):
    """Return the merged tensors, computed as PEFT does."""
    tensors, shape = load_file(adapter / FILE), read_shape(base)
    scale = read_adapter(adapter, shape).scale
    merged = load_file(base / "model.safetensors")
    for name, weight in merged.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in tensors:
            weight = weight.float() + scale * (
                tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
            )
        elif f"{stem}.weight" in tensors:
            weight = tensors[f"{stem}.weight"]
        merged[name] = weight.to(dtype or merged[name].dtype)
    return merged


@pytest.mark.parametrize("kind", ["fp32", "bf16", "to_bf16", "reward", "baichuan", "saved"])
def test_merged_weights(kind, tmp_path):
    base = tmp_path / "base"
    if kind == "reward":
        make_reward(base, "llama")
    elif kind == "baichuan":
        make_baichuan(base)
    else:
        make_model(base, dtype=torch.bfloat16 if kind == "bf16" else torch.float32)
    before = hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest()
    saved = ["norm", "embed_tokens"] if kind == "saved" else []
    adapter = make_adapter(tmp_path / "adapter", base, saved=saved)
    dtype = torch.bfloat16 if kind == "to_bf16" else None
    merge_adapter(base, adapter, tmp_path / "out", "bfloat16" if dtype else None)
    found, wanted = load_file(tmp_path / "out" / "model.safetensors"), expected(base, adapter, dtype)
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        assert found[name].dtype == want.dtype
        # fp32 products of rank 3 may be summed in another order; bf16 rounds that away but for ties
        torch.testing.assert_close(
            found[name], want, rtol=8e-3 if want.dtype == torch.bfloat16 else 1e-6, atol=1e-7
        )
    assert hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest() == before


def test_magnitudes_over_lengths_are_rounded_as_in_training(tmp_path):
    """The factor of a row is of the magnitudes' dtype and the weights', the wider: of a bf16 run it is bf16."""
    base = make_model(tmp_path / "base", dtype=torch.bfloat16)
    adapter = make_adapter(tmp_path / "adapter", base, dora=True)
    name = "model.layers.1.mlp.up_proj"
    weight = load_file(base / "model.safetensors")[f"{name}.weight"]
    for dtype in (torch.float32, torch.bfloat16):
        tensors = {key: tensor.to(dtype) for key, tensor in load_file(adapter / FILE).items()}
        save_file(tensors, adapter / FILE)
        a, b, magnitude = (
            tensors[f"base_model.model.{name}.{part}"]
            for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
        )
        factor = magnitude / row_norms(weight, a, b, 2.0, None)
        assert factor.dtype == dtype
        merge_adapter(base, adapter, tmp_path / str(dtype), "float32")
        found = load_file(tmp_path / str(dtype) / "model.safetensors")[f"{name}.weight"]
        wanted = factor.float()[:, None] * (weight.float() + 2 * (b.float() @ a.float()))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


def test_a_result_that_overflows_is_refused(tmp_path):
    base = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, b=1e6)
    with pytest.raises(
        InputError, match="the merged weights are not finite in float16: model.layers.0.*--dtype"
    ):
        merge_adapter(base, adapter, tmp_path / "out", "float16")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_have_no_difference(tmp_path):
    base = make_model(tmp_path / "base")
    bad = make_model(tmp_path / "bad")
    change_tensors(
        bad, lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].view(-1)[:1].fill_(float("nan"))
    )
    with pytest.raises(
        InputError, match="weights must be finite, model.layers.0.mlp.up_proj.weight is not in .*bad"
    ):
        extract_adapter(base, bad, tmp_path / "out", rank=2)


def test_an_adapter_is_found_again_in_the_merged_model(tmp_path):
    base = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, targets=["q_proj", "down_proj"])
    merge_adapter(base, adapter, tmp_path / "merged")
    found = extract_adapter(base, tmp_path / "merged", tmp_path / "found", 3, ["q_proj", "down_proj"])
    assert (found.modules, found.left_out) == (8, {})
    assert found.share > 1 - 1e-5  # fp32
    merge_adapter(base, tmp_path / "found", tmp_path / "again")
    again, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("again", "merged"))
    for name, want in merged.items():
        torch.testing.assert_close(again[name], want, rtol=1e-5, atol=1e-6)


def test_a_smaller_rank_holds_the_largest_singular_values(tmp_path):
    base, model = make_model(tmp_path / "base"), make_model(tmp_path / "model")
    name = "model.layers.1.mlp.up_proj.weight"
    difference = torch.randn(96, 64, generator=torch.Generator().manual_seed(1))

    def change(tensors):
        tensors[name] += difference
        tensors["model.norm.weight"] += 0.5

    change_tensors(model, change)
    found = extract_adapter(base, model, tmp_path / "adapter", 5, ["up_proj"])
    squares = torch.linalg.svdvals(difference.double()).square()
    assert found.share == pytest.approx((squares[:5].sum() / squares.sum()).item(), rel=1e-5)
    assert found.worst_module == name.removesuffix(".weight")
    assert found.left_out == pytest.approx({"model.norm.weight": 0.5}, rel=1e-5)


@pytest.mark.parametrize("variant", ["qwen2_tied", "qwen3", "llama3"])
def test_nothing_is_lost_at_full_rank_with_copies(variant, tmp_path, capsys):
    """Every tensor differs: PEFT finds neither a missing nor an unexpected key, and has the complete model's logits."""
    base, model = (make_model(tmp_path / name, variant, num_hidden_layers=2) for name in ("base", "model"))
    draw = torch.Generator().manual_seed(4)
    change_tensors(
        model, lambda tensors: [t.add_(torch.randn(t.shape, generator=draw) * 0.03) for t in tensors.values()]
    )
    extract = ["adapter", "extract", "--base", str(base), "--model", str(model), "--rank", "full", "--out"]
    assert main([*extract, str(tmp_path / "part")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "it holds 100.00% of the squared difference" in lines[0]
    assert any(
        re.match(r"not in the adapter: model.norm.weight \[64\], 256 bytes, differs by up to 0\.\d", line)
        for line in lines
    )
    assert re.match(
        r"\d+ tensors that differ, .*, are not in the adapter: --modules-to-save all writes", lines[-1]
    )
    assert main([*extract, str(tmp_path / "adapter"), "--modules-to-save", "all"]) == 0
    out = capsys.readouterr().out
    assert "not in the adapter" not in out
    assert "complete copies of " in out
    tokens, logits = torch.arange(40)[None] * 5, []
    adapted = PeftModel.from_pretrained(load(base), tmp_path / "adapter")
    result = set_peft_model_state_dict(adapted, load_file(tmp_path / "adapter" / FILE))
    assert not result.unexpected_keys
    assert not [name for name in result.missing_keys if "lora" in name or "modules_to_save" in name]
    with torch.no_grad():
        logits = [one(tokens).logits for one in (adapted, load(model))]
    assert (logits[0] - logits[1]).abs().max() < 1e-4
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    found, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "model"))
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        torch.testing.assert_close(found[name], want, rtol=1e-4, atol=1e-5)


def test_copies_are_named(base, tmp_path, capsys):
    """What is neither adapted nor copied is listed; a name that matches nothing is an error."""
    model = make_model(tmp_path / "model")

    def change(tensors):
        for name in (
            "model.norm.weight",
            "model.layers.0.input_layernorm.weight",
            "model.embed_tokens.weight",
        ):
            tensors[name] += 0.5
        tensors["model.layers.1.self_attn.q_proj.bias"] += 0.25
        tensors["model.layers.1.mlp.up_proj.weight"] += 0.5

    change_tensors(model, change)
    found = extract_adapter(base, model, tmp_path / "out", 2, None, ["model.norm", "embed_tokens"])
    assert found.adapter.saved == {"model.norm", "model.embed_tokens"}
    assert found.left_out == pytest.approx(
        {"model.layers.0.input_layernorm.weight": 0.5, "model.layers.1.self_attn.q_proj.bias": 0.25}
    )
    found = extract_adapter(base, model, tmp_path / "all", 2, None, ["all"])
    assert found.left_out == {}
    assert "model.layers.1.self_attn.q_proj" in found.adapter.saved - found.adapter.modules
    extract = [
        "adapter",
        "extract",
        "--base",
        str(base),
        "--model",
        str(model),
        "--out",
        str(tmp_path / "no"),
    ]
    assert main([*extract, "--rank", "2", "--modules-to-save", "embed_token"]) == 2
    assert "--modules-to-save: 'embed_token' matches no embedding" in capsys.readouterr().err
    assert main([*extract, "--rank", "some"]) == 2
    assert "must be a number or full, got some" in capsys.readouterr().err


def test_large_matrices_are_decomposed_by_projections(tmp_path, monkeypatch):
    from megatron_align.merge import adapter as module

    monkeypatch.setattr(module, "EXACT", 8)
    a, b = (torch.randn(*size, generator=torch.Generator().manual_seed(2)) for size in ((4, 60), (90, 4)))
    noise = 1e-3 * torch.randn(90, 60, generator=torch.Generator().manual_seed(3))
    found_a, found_b, held = module.nearest_factors(b @ a + noise, 4)
    u, s, vh = torch.linalg.svd((b @ a + noise).double())
    torch.testing.assert_close(found_b @ found_a, ((u[:, :4] * s[:4]) @ vh[:4]).float(), rtol=1e-3, atol=1e-3)
    assert held == pytest.approx(s[:4].square().sum().item(), rel=1e-5)


@pytest.fixture
def base(tmp_path):
    return make_model(tmp_path / "base")


def test_an_adapter_of_other_weights_is_refused(base, tmp_path, capsys):
    model = make_model(tmp_path / "model")
    change_tensors(model, lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].add_(1))
    extract_adapter(base, model, tmp_path / "adapter", 2)
    arguments = ["adapter", "merge", "--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--base", str(model)]) == 2
    assert (
        "error: the adapter is of another base: it was trained on weights with sha256"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "--base", str(base)]) == 0
    assert "merged 28 adapted tensors" in capsys.readouterr().out


def test_what_cannot_be_merged_or_extracted(base, tmp_path):
    adapter, other = make_adapter(tmp_path / "adapter", base), make_model(tmp_path / "other")
    with pytest.raises(InputError, match="must differ in the adapted layers, .* equals"):
        extract_adapter(base, other, tmp_path / "out", 2)
    with pytest.raises(InputError, match="--rank must be at most 16, the smaller side of .*k_proj, got 17"):
        extract_adapter(base, other, tmp_path / "out", 17)
    with pytest.raises(InputError, match="output must be a new or empty folder"):
        merge_adapter(base, adapter, other)
    tensors = load_file(adapter / FILE)
    tensors[next(iter(tensors))][0, 0] = float("nan")
    save_file(tensors, adapter / FILE)
    with pytest.raises(InputError, match="adapter weights must be finite, .*lora_"):
        merge_adapter(base, adapter, tmp_path / "out")
