"""Law 2 by command: exit code 0 means that shape, bytes and logits are equal to Hugging Face's. Whatever is
changed on either side, if only one bit, the answer is 1 and names it; NaN is never equal.
"""

import hashlib
import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_align.convert.state_writer import StateWriter
from megatron_align.hf.load import open_hf
from megatron_align.model.families import rows, to_megatron
from megatron_align.storage.journal import Journal
from tests.harness.corruption import flip, rewrite_checksums
from tests.harness.marks import mark_slow
from tests.harness.tiny import VARIANTS, make_model

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def imported(convert, tiny_models, tmp_path_factory):
    """``imported(variant)`` -> (HF folder, its checkpoint), created once."""
    made = {}

    def get(variant="qwen2_untied"):
        if variant not in made:
            made[variant] = tmp_path_factory.mktemp("imported") / "ckpt"
            assert convert("import", "--hf", tiny_models(variant), "--out", made[variant]).code == 0
        return tiny_models(variant), made[variant]

    return get


@pytest.fixture
def copied(imported, tmp_path):
    """A copy of an HF folder to be changed, and the checkpoint of the original."""

    def get(variant="qwen2_untied"):
        hf, checkpoint = imported(variant)
        return shutil.copytree(hf, tmp_path / "copy"), checkpoint

    return get


def change_tensor(folder, name, change):
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name].clone())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def next_float_at(*index):
    def change(tensor):
        tensor[index] = torch.nextafter(tensor[index], torch.tensor(torch.inf))
        return tensor

    return change


def fill_at(index, value):
    def change(tensor):
        tensor[index] = value
        return tensor

    return change


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_model_gives_0(tmp_path, convert, imported, variant):
    hf, checkpoint = imported(variant)
    report = tmp_path / "report.json"
    answer = convert("verify", "--hf", hf, "--checkpoint", checkpoint, "--json", report)
    assert answer.code == 0, answer
    assert answer.err == ""
    assert "tensors  " in answer.out
    assert "equal, byte for byte" in answer.out
    assert answer.out.splitlines()[-1] == f"the same model: {checkpoint} and {hf}"
    found = json.loads(report.read_text())
    assert (found["equal"], found["failed"], found["shape"], found["tensors"]["differ"]) == (True, [], {}, [])
    assert found["tensors"]["compared"] == len(load_file(hf / "model.safetensors"))
    assert [logits["kind"] for logits in found["logits"]] == ["random tokens", "built-in sentences"]
    assert all(0 < logits["max_abs_difference"] <= 1e-4 for logits in found["logits"])


def test_bf16_weights_are_judged_in_fp32(tmp_path, convert):
    hf = make_model(tmp_path / "hf", "llama3", torch.bfloat16)
    assert convert("import", "--hf", hf, "--out", tmp_path / "ckpt").code == 0
    answer = convert("verify", "--hf", hf, "--checkpoint", tmp_path / "ckpt", "--tolerance", "1e-5")
    assert answer.code == 0, answer


@pytest.mark.parametrize(
    "name, change, shown",
    [
        (DOWN, next_float_at(3, 5), "differs, max abs difference"),
        (DOWN, fill_at((0, 0), 7.0), "differs, max abs difference"),
        (DOWN, lambda tensor: tensor.bfloat16(), "float32 in the checkpoint, bfloat16 in the HF folder"),
        ("model.norm.weight", fill_at(0, torch.nan), "differs, max abs difference nan"),
    ],
    ids=["one bit", "one number", "dtype", "NaN"],
)
def test_one_tensor_that_differs_is_named(tmp_path, convert, copied, name, change, shown):
    hf, checkpoint = copied()
    change_tensor(hf, name, change)
    answer = convert("verify", "--hf", hf, "--checkpoint", checkpoint, "--json", tmp_path / "report.json")
    assert answer.code == 1
    assert "tensors  1 of 51 DIFFER" in answer.out
    [line] = [line.strip() for line in answer.out.splitlines() if line.strip().startswith("model.")]
    assert line.startswith(f"{name}: {shown}")
    assert answer.out.splitlines()[-1].startswith("FAILED (tensors")
    [tensor] = json.loads((tmp_path / "report.json").read_text())["tensors"]["differ"]
    assert tensor["name"] == name


@pytest.mark.parametrize("depth", [[], ["--deep"]], ids=["complete", "deep"])
def test_nan_on_both_sides_is_not_equal(tmp_path, convert, copied, depth):
    hf, checkpoint = copied("llama3")
    change_tensor(hf, DOWN, fill_at((1, 1), torch.nan))
    copy = shutil.copytree(checkpoint, tmp_path / "ckpt")
    shutil.rmtree(copy / "state")
    write_state(copy, hf)  # import would have refused it
    rewrite_checksums(copy)
    report = tmp_path / "report.json"
    answer = convert("verify", "--hf", hf, "--checkpoint", copy, "--json", report, *depth)
    assert answer.code == 1
    assert f"{DOWN}: not finite: 1 NaN, 0 infinite" in answer.out
    assert "max abs difference nan DIFFERS: not <= 0.0001" in answer.out
    assert "module   the first that differs is model.layers.1.mlp" in answer.out
    found = json.loads(report.read_text())
    assert found["failed"] == ["tensors", "logits"]
    assert found["logits"][0]["max_abs_difference"] is None


def write_state(folder, hf):
    weights, shape = open_hf(hf)
    journal = Journal(folder / "x", None)
    state = StateWriter(journal, "state", shape, torch.float32)
    for row in rows(shape):
        parts = {name: next(weights.blocks(name)).view(weights.shape(name)) for name in row.hf}
        state.write(row, 0, to_megatron(row, parts, shape))
    state.finish()
    (journal.partial / "state").rename(folder / "state")


@pytest.mark.parametrize("variant", mark_slow(["qwen2_tied", "llama3", "qwen3"], ["llama3"]))
def test_deep_gives_the_logits_of_the_complete_model(tmp_path, convert, imported, variant):
    hf, checkpoint = imported(variant)
    found = []
    for number, depth in enumerate(([], ["--deep"])):
        report = tmp_path / f"{number}.json"
        assert convert("verify", "--hf", hf, "--checkpoint", checkpoint, "--json", report, *depth).code == 0
        found.append(json.loads(report.read_text()))
    complete, deep = ([row["max_abs_difference"] for row in each["logits"]] for each in found)
    assert all(0 < number < 2e-6 for number in complete + deep)  # fp32 rounding of logits below 1
    assert found[0]["tensors"] == found[1]["tensors"]


def test_hashes_are_those_of_the_files_bytes(tmp_path, convert, imported):
    hf, checkpoint = imported("llama3")
    report = tmp_path / "report.json"
    convert("verify", "--hf", hf, "--checkpoint", checkpoint, "--json", report)
    tensors = load_file(hf / "model.safetensors")
    want = {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}
    assert json.loads(report.read_text())["tensors"]["sha256"] == want


FIRST_APART = {
    "embedding": ("model.embed_tokens.weight", "model.embed_tokens"),
    "norm": ("model.layers.2.input_layernorm.weight", "model.layers.2.input_layernorm"),
    "attention": ("model.layers.2.self_attn.k_proj.weight", "model.layers.2.self_attn"),
    "mlp": ("model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp"),
    "final norm": ("model.norm.weight", "model.norm"),
    "head": ("lm_head.weight", "lm_head"),
}


# Each module at one of the two depths on every commit.
BOTH_DEPTHS = [(place, depth) for place in FIRST_APART for depth in ("complete", "deep")]
OTHER_DEPTH = [case for i, case in enumerate(BOTH_DEPTHS) if i % 4 in (1, 2)]


@pytest.mark.parametrize("place, depth", mark_slow(BOTH_DEPTHS, OTHER_DEPTH))
def test_the_first_module_that_differs_is_named(tmp_path, convert, copied, place, depth):
    (name, module), options = FIRST_APART[place], ["--deep"] if depth == "deep" else []
    hf, checkpoint = copied()
    change_tensor(hf, name, lambda tensor: tensor * 1.5)
    report = tmp_path / "report.json"
    answer = convert("verify", "--hf", hf, "--checkpoint", checkpoint, "--json", report, *options)
    assert answer.code == 1
    assert f"module   the first that differs is {module} (max abs difference" in answer.out
    assert json.loads(report.read_text())["first_module_apart"].startswith(f"{module} (")


def swap_theta(config):
    config["rope_parameters"]["rope_theta"] = 12345.0


def swap_eps(config):
    config["rms_norm_eps"] = 0.1


@pytest.mark.parametrize(
    "change, key",
    [(swap_theta, "rope_theta is 10000.0"), (swap_eps, "norm_eps is 1e-06")],
    ids=["theta", "eps"],
)
def test_a_constant_that_differs_is_named_and_shows_in_the_logits(convert, copied, change, key):
    hf, checkpoint = copied()
    change_config(hf, change)
    answer = convert("verify", "--hf", hf, "--checkpoint", checkpoint)
    assert answer.code == 1
    assert f"shape    DIFFERS: {key} in the checkpoint," in answer.out
    assert "51 equal, byte for byte" in answer.out
    assert "FAILED (shape, logits)" in answer.out


def test_models_of_different_tensors_are_not_compared_further(convert, imported):
    (hf, _), (_, checkpoint) = imported("qwen2_tied"), imported("qwen2_untied")
    answer = convert("verify", "--hf", hf, "--checkpoint", checkpoint)
    assert answer.code == 1
    assert "DIFFERS: vocab_size is 301 in the checkpoint, 259 in the HF folder" in answer.out
    assert "DIFFERS: tied_embeddings is False in the checkpoint, True in the HF folder" in answer.out
    assert "not compared, nor logits" in answer.out
    assert "FAILED (shape, logits)" in answer.out


def test_a_head_that_is_not_tied_after_all_is_named(convert, copied):
    hf, checkpoint = copied("qwen2_tied")
    tensors = load_file(hf / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 0.25
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    answer = convert("verify", "--hf", hf, "--checkpoint", checkpoint)
    assert answer.code == 1
    line = "lm_head.weight: differs from the embedding that it should be tied to, max abs difference 0.25"
    assert line in answer.out


def test_tolerance_is_kept(convert, imported):
    hf, checkpoint = imported()
    answer = convert("verify", "--hf", hf, "--checkpoint", checkpoint, "--tolerance", "0")
    assert answer.code == 1
    assert "byte for byte" in answer.out
    assert "DIFFERS: not <= 0, at token " in answer.out


def test_real_text_of_ones_own(convert, imported, chat_file):
    hf, checkpoint = imported()
    answer = convert("verify", "--hf", hf, "--checkpoint", checkpoint, "--data", chat_file)
    assert answer.code == 0, answer
    assert f"logits   {chat_file}: 16 texts, " in answer.out


def test_without_a_tokenizer_it_says_what_was_left_out(convert, copied):
    hf, checkpoint = copied()
    for path in hf.glob("token*"):
        path.unlink()
    answer = convert("verify", "--hf", hf, "--checkpoint", checkpoint)
    assert answer.code == 0
    assert f"note     no tokenizer in {hf}: logits were compared on random tokens only" in answer.out


def test_texts_fit_a_short_model(tmp_path, convert):
    hf = make_model(tmp_path / "hf", max_position_embeddings=16)
    assert convert("import", "--hf", hf, "--out", tmp_path / "ckpt").code == 0
    answer = convert("verify", "--hf", hf, "--checkpoint", tmp_path / "ckpt")
    assert answer.code == 0, answer
    assert "random tokens: 5 texts, 56 tokens" in answer.out


def make_tokenizer_too_large(hf):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(hf)
    tokenizer.add_tokens([f"<{n}>" for n in range(60)] + ["fox"])
    tokenizer.save_pretrained(hf)


CORRUPTED = {
    "no HF folder": (lambda hf: shutil.rmtree(hf), "no Hugging Face folder at {hf}"),
    "no config": (
        lambda hf: (hf / "config.json").unlink(),
        "{hf}/config.json",
    ),
    "no weights": (lambda hf: (hf / "model.safetensors").unlink(), "found neither in {hf}"),
    "corrupt": (lambda hf: (hf / "model.safetensors").write_bytes(b"x" * 99), "{hf}/model.safetensors"),
    "sizes": (
        lambda hf: change_config(hf, lambda c: c.update(vocab_size=300)),
        "tensor shapes do not match config.json: ",
    ),
    "tokenizer": (
        make_tokenizer_too_large,
        "tokenizer does not fit the model's vocabulary of 301: it produces token ",
    ),
}


@pytest.mark.parametrize("corrupt, line", CORRUPTED.values(), ids=CORRUPTED)
def test_a_bad_folder_gives_2_and_one_line(tmp_path, convert, copied, corrupt, line):
    hf, checkpoint = copied()
    corrupt(hf)
    answer = convert("verify", "--hf", hf, "--checkpoint", checkpoint, "--json", tmp_path / "report.json")
    assert answer.code == 2
    assert answer.out == ""
    assert answer.err.startswith("error: ")
    assert answer.err.count("\n") == 1
    assert line.format(hf=hf) in answer.err
    assert not (tmp_path / "report.json").exists()


def edit_card(checkpoint, **changes):
    path = checkpoint / "card.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(path):
    path.write_bytes(path.read_bytes()[:100_000])


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def forge(checkpoint):
    (checkpoint / "state" / ".metadata").write_bytes(pickle.dumps(Evil()))


BROKEN = {
    "format": (lambda ckpt: edit_card(ckpt, format=3), "checkpoint format must be 2, found 3"),
    "dtype": (lambda ckpt: edit_card(ckpt, dtype="int8"), "dtype must be one of "),
    "dtype of the metadata": (
        lambda ckpt: edit_card(ckpt, dtype="bfloat16"),
        "checkpoint tensors must be bfloat16 (card.json); found embedding.word_embeddings.weight is float32, ",
    ),
    "no shape": (lambda ckpt: edit_card(ckpt, shape=None), "does not match hf_assets/config.json: no shape"),
    "other shape": (
        lambda ckpt: change_config(ckpt / "hf_assets", lambda c: c.update(rms_norm_eps=0.5)),
        "card.json does not match hf_assets/config.json: norm_eps 1e-06 instead of 0.5 in ",
    ),
    "truncated": (lambda ckpt: truncate(ckpt / "state" / "__0_0.distcp"), "checkpoint is incomplete: "),
    "forged metadata": (forge, "cannot be read: it names posix.mkdir, which is not part of"),
    "file gone": (
        lambda ckpt: (ckpt / "state" / "__0_0.distcp").unlink(),
        "incomplete: no file {ckpt}/state/__0",
    ),
    "no metadata": (lambda ckpt: (ckpt / "state" / ".metadata").unlink(), "no file {ckpt}/state/.metadata"),
    "no state": (lambda ckpt: shutil.rmtree(ckpt / "state"), "no file {ckpt}/state/.metadata"),
    "no card": (
        lambda ckpt: (ckpt / "card.json").unlink(),
        "checkpoint is incomplete: no file {ckpt}/card.json",
    ),
    "no checksums": (lambda ckpt: (ckpt / "SHA256SUMS").unlink(), "{ckpt}/SHA256SUMS cannot be read"),
    "flipped": (lambda ckpt: flip(ckpt / "state" / "__0_0.distcp"), "__0_0.distcp: SHA-256 mismatch"),
}


@pytest.mark.parametrize("tool", ["verify", "export"])
@pytest.mark.parametrize("corrupt, line", BROKEN.values(), ids=BROKEN)
def test_a_bad_checkpoint_gives_2_and_one_line(tmp_path, convert, imported, corrupt, line, tool):
    hf, checkpoint = imported()
    corrupt(copy := shutil.copytree(checkpoint, tmp_path / "ckpt"))
    ends = ("--hf", hf) if tool == "verify" else ("--out", tmp_path / "out")
    answer = convert(tool, "--checkpoint", copy, *ends)
    assert answer.code == 2
    assert answer.out == ""
    assert answer.err.startswith("error: ")
    assert answer.err.count("\n") == 1
    assert line.format(ckpt=copy) in answer.err
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]
