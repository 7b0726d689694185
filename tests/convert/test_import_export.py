"""Law 6: Hugging Face folder -> checkpoint -> Hugging Face folder is byte-identical for every tensor, and for
every other file; a checkpoint trained on another layout gives the folder that its own run exported.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.harness import training_ranks
from tests.harness.marks import mark_slow
from tests.harness.tiny import (
    change_tensors,
    make_baichuan,
    make_model,
    make_reward,
    metrics_of,
    run_arguments,
)


def must(answer):
    assert answer.code == 0, answer
    assert answer.err == ""
    return answer


def tensors_in(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def other_files_in(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and ".safetensors" not in path.name)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def assert_same_tensors(folder, other):
    ours, theirs = tensors_in(folder), tensors_in(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8)), name


def shards_of(folder, out):
    """Save again as transformers shards it."""
    AutoModelForCausalLM.from_pretrained(folder, dtype="auto").save_pretrained(out, max_shard_size="100KB")
    for path in folder.glob("*token*"):
        shutil.copy(path, out)
    assert len(list(out.glob("*.safetensors"))) > 2
    return out


CASES = [
    ("qwen2_tied", torch.float32),
    ("qwen2_tied", torch.bfloat16),
    ("qwen2_untied", torch.bfloat16),
    ("qwen2_untied", torch.float16),
    ("llama3", torch.float32),
    ("llama32_tied", torch.bfloat16),
    ("qwen3", torch.bfloat16),
    ("mistral", torch.float32),
]


ROUND_TRIPS = [(*case, sharded) for sharded in (False, True) for case in CASES]
MORE_SHARDS = [(*case, True) for case in CASES[2:]]


@pytest.mark.parametrize(
    "variant, dtype, sharded",
    mark_slow(ROUND_TRIPS, MORE_SHARDS),
    ids=lambda part: str(part).removeprefix("torch."),
)
def test_round_trip_is_byte_identical(tmp_path, convert, variant, dtype, sharded):
    hf = make_model(tmp_path / "hf", variant, dtype)
    if sharded:
        hf = shards_of(hf, tmp_path / "shards")
    must(convert("import", "--hf", hf, "--out", tmp_path / "new" / "ckpt"))
    must(convert("export", "--checkpoint", tmp_path / "new" / "ckpt", "--out", tmp_path / "out"))
    assert_same_tensors(tmp_path / "out", hf)
    assert other_files_in(tmp_path / "out") == other_files_in(hf)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["ckpt"]
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values()), loading
    assert model.dtype == dtype


OTHERS = {
    "baichuan2": make_baichuan,
    "qwen2 reward": lambda folder: make_reward(folder, "qwen2"),
    "llama reward": lambda folder: make_reward(folder, "llama"),
}


@pytest.mark.parametrize("family", mark_slow(OTHERS, ["qwen2 reward"]))
def test_families_with_tensors_of_their_own(tmp_path, convert, family):
    """W_pack and NormHead; a head of one label. verify's logits are those of the Llama that computes the same, and
    transformers' scores; remote code is copied and never run."""
    hf = OTHERS[family](tmp_path / "hf")
    (hf / "tokenizer.model").write_bytes(b"sentencepiece")
    must(convert("import", "--hf", hf, "--out", tmp_path / "ckpt"))
    must(convert("export", "--checkpoint", tmp_path / "ckpt", "--out", tmp_path / "out"))
    assert_same_tensors(tmp_path / "out", hf)
    assert other_files_in(tmp_path / "out") == other_files_in(hf)
    for extra in ([], ["--deep"]):
        must(convert("verify", "--hf", tmp_path / "out", "--checkpoint", tmp_path / "ckpt", *extra))
    change_tensors(hf, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].mul_(1.5))
    answer = convert("verify", "--hf", hf, "--checkpoint", tmp_path / "ckpt")
    assert answer.code == 1
    assert "module   the first that differs is model.layers.1.mlp (max" in answer.out


def test_numbers_that_are_not_finite_are_counted_and_refused(tmp_path, convert):
    hf = make_model(tmp_path / "hf")

    def make_nonfinite(tensors):
        tensors["model.norm.weight"][:3] = torch.nan
        tensors["model.layers.2.self_attn.k_proj.weight"][5, 5] = torch.inf
        tensors["model.layers.2.self_attn.k_proj.weight"][6, 6] = torch.nan

    change_tensors(hf, make_nonfinite)
    answer = convert("import", "--hf", hf, "--out", tmp_path / "ckpt")
    assert answer.code == 2
    facts = "model.layers.2.self_attn.k_proj.weight holds 1 NaN and 1 infinite; model.norm.weight holds 3 NaN"
    assert answer.err == f"error: weights must be finite: {facts} in {hf}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_an_export_may_cast(tmp_path, convert, tiny_models):
    must(convert("import", "--hf", tiny_models("llama3"), "--out", tmp_path / "ckpt"))
    must(
        convert("export", "--checkpoint", tmp_path / "ckpt", "--out", tmp_path / "out", "--dtype", "bfloat16")
    )
    want = {name: tensor.bfloat16() for name, tensor in tensors_in(tiny_models("llama3")).items()}
    got = tensors_in(tmp_path / "out")
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_imported_checkpoint_has_metadata(tmp_path, convert, tiny_models):
    must(convert("import", "--hf", tiny_models("llama3"), "--out", tmp_path / "ckpt"))
    card = json.loads((tmp_path / "ckpt" / "card.json").read_text())
    assert (card["step"], card["optimizer"], card["dtype"]) == (0, False, "float32")
    assert card["shape"]["vocab_size"] == 259
    assert other_files_in(tmp_path / "ckpt" / "hf_assets") == other_files_in(tiny_models("llama3"))
    names = sorted(path.name for path in (tmp_path / "ckpt").iterdir())
    assert names == ["SHA256SUMS", "card.json", "hf_assets", "state"]


def test_a_cast_is_torchs_cast(tmp_path, convert, tiny_models):
    hf = tiny_models("qwen2_untied")
    must(convert("import", "--hf", hf, "--out", tmp_path / "ckpt", "--dtype", "bfloat16"))
    must(convert("export", "--checkpoint", tmp_path / "ckpt", "--out", tmp_path / "out"))
    want = {name: tensor.bfloat16() for name, tensor in tensors_in(hf).items()}
    got = tensors_in(tmp_path / "out")
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_mixed_dtypes_need_an_explicit_one(tmp_path, convert):
    from safetensors.torch import save_file

    hf = make_model(tmp_path / "hf", dtype=torch.bfloat16)
    tensors = tensors_in(hf)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    answer = convert("import", "--hf", hf, "--out", tmp_path / "ckpt")
    assert answer.code == 2
    assert "tensors have different dtypes: 49 BF16" in answer.err
    assert "1 F32 (such as model.norm.weight)" in answer.err
    assert not (tmp_path / "ckpt").exists()
    must(convert("import", "--hf", hf, "--out", tmp_path / "ckpt", "--dtype", "float32"))
    must(convert("export", "--checkpoint", tmp_path / "ckpt", "--out", tmp_path / "out"))
    assert all(
        torch.equal(tensor, tensors[name].float()) for name, tensor in tensors_in(tmp_path / "out").items()
    )


@pytest.mark.parametrize("equal", [True, False])
def test_a_stored_head_of_tied_embeddings_must_equal_them(tmp_path, convert, equal):
    from safetensors.torch import save_file

    hf = make_model(tmp_path / "hf")
    tensors = tensors_in(hf)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + (0 if equal else 0.5)
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    answer = convert("import", "--hf", hf, "--out", tmp_path / "ckpt")
    if equal:
        must(answer)
        must(convert("verify", "--hf", hf, "--checkpoint", tmp_path / "ckpt"))
    else:
        assert answer.code == 2
        assert "lm_head.weight must be absent or equal model.embed_tokens.weight" in answer.err
        assert "it differs by 0.5" in answer.err
        assert not (tmp_path / "ckpt").exists()


@pytest.fixture(scope="module", params=mark_slow(["fp32", "bf16"], ["fp32"]))
def trained(request, pool, tiny_models, chat_file, tmp_path_factory):
    """A run on two tensor x two pipeline ranks, which padded the vocabulary and split the layers."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    arguments = run_arguments(
        tiny_models(),
        chat_file,
        folder,
        train__steps=2,
        train__precision=request.param,
        checkpoint__save_every=1,
        checkpoint__export_hf=True,
        parallel__tensor=2,
        parallel__pipeline=2,
    )
    pool.run(4, training_ranks.train, arguments)
    return folder


def test_export_equals_that_of_the_run_on_another_layout(tmp_path, convert, trained):
    answer = must(convert("export", "--checkpoint", trained, "--out", tmp_path / "newest"))
    assert "step_000002" in answer.out
    assert_same_tensors(tmp_path / "newest", trained / "hf")
    assert other_files_in(tmp_path / "newest") == other_files_in(trained / "hf")
    must(convert("export", "--checkpoint", trained / "step_000001", "--out", tmp_path / "first"))
    first, newest = tensors_in(tmp_path / "first"), tensors_in(tmp_path / "newest")
    assert not all(torch.equal(first[name], newest[name]) for name in first)


def test_verify_distinguishes_a_trained_model_from_its_base(convert, trained, tiny_models):
    must(convert("verify", "--hf", trained / "hf", "--checkpoint", trained))
    answer = convert("verify", "--hf", tiny_models(), "--checkpoint", trained)
    assert answer.code == 1
    assert "of 50 DIFFER" in answer.out


@pytest.mark.parametrize("precision", mark_slow(["fp32", "bf16"], ["fp32"]))
def test_training_starts_identically_from_checkpoint_and_folder(
    tmp_path, pool, convert, tiny_models, chat_file, precision
):
    must(convert("import", "--hf", tiny_models(), "--out", tmp_path / "ckpt"))
    losses = []
    for number, path in enumerate((tiny_models(), tmp_path / "ckpt")):
        folder = tmp_path / f"run{number}"
        pool.run(
            2,
            training_ranks.train,
            run_arguments(
                path, chat_file, folder, train__steps=2, train__precision=precision, parallel__tensor=2
            ),
        )
        losses.append([row["loss"] for row in metrics_of(folder)])
    assert len(losses[0]) == 2
    assert losses[0] == losses[1]
