"""A merge gives a Hugging Face folder that transformers loads, whose tensors are the formula's and whose model card
identifies the inputs. Folders that do not fit each other are refused in one line, and leave no files.
"""

import hashlib
import json
import shutil
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_align.errors import InputError
from megatron_align.hf.writer import ShardWriter
from megatron_align.merge.merge import merge
from megatron_align.merge.methods import METHODS, Block, Dare, Linear, ModelStock, Slerp
from megatron_align.storage.journal import Journal
from megatron_align.tools.main import main
from tests.harness.tiny import change_tensors, make_model

NORM = "model.norm.weight"


def tensors_in(folder):
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def change_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def relative_of(base, folder, seed, dtype=torch.float32):
    """A copy whose every number was moved a little."""
    shutil.copytree(base, folder)
    draw = torch.Generator().manual_seed(seed)
    change_tensors(
        folder,
        lambda tensors: tensors.update(
            {
                name: (tensor + 0.02 + 0.05 * torch.randn(tensor.shape, generator=draw)).to(dtype)
                for name, tensor in tensors.items()
            }
        ),
    )
    return folder


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A base and three models trained from it."""
    folder = tmp_path_factory.mktemp("family")
    base = make_model(folder / "base", "llama3")
    return base, [relative_of(base, folder / f"model{i}", i) for i in range(3)]


@pytest.fixture
def own(family, tmp_path):
    """A copy of the base and of one model to be changed, in a folder with nothing else."""
    base, models = family
    return shutil.copytree(base, tmp_path / "base"), shutil.copytree(models[0], tmp_path / "model")


def by_formula(method, base, models, name):
    inputs = [
        tensors_in(folder)[name].reshape(1, -1) for folder in ([base] if method.needs_base else []) + models
    ]
    block = torch.cat(inputs)

    class Once:
        def __iter__(self):
            fresh = block.clone()
            yield Block(fresh[0], fresh[1:]) if method.needs_base else Block(None, fresh)

    return torch.cat(list(method.merge(Once(), name)))


@pytest.mark.parametrize("name", METHODS)
def test_a_merged_folder_is_what_the_formula_gives(tmp_path, family, monkeypatch, name):
    """Also where tensors are read in several windows, of several blocks each."""
    monkeypatch.setattr("megatron_align.merge.merge.WINDOW_ELEMENTS", 5000)
    monkeypatch.setattr("megatron_align.merge.merge.BLOCK_ELEMENTS", 1500)
    base, models = family
    method, models = METHODS[name](), models[: 2 if name == "slerp" else 3]
    merge(method, base, models, tmp_path / "out")
    got = tensors_in(tmp_path / "out")
    assert got.keys() == tensors_in(base).keys()
    for tensor in got:
        want = by_formula(method, base, models, tensor).view_as(got[tensor])
        assert torch.allclose(got[tensor], want, rtol=0, atol=2e-6), (
            tensor
        )  # sums over blocks round otherwise
        assert not torch.equal(got[tensor], tensors_in(models[0])[tensor])


def test_transformers_loads_it_and_everything_else_is_the_first_models(tmp_path, family):
    base, models = family
    merge(ModelStock(), base, models, tmp_path / "out")
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values()), loading
    assert model.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert names_in(tmp_path / "out") == sorted([*names_in(models[0]), "README.md", "merge.json"])
    for name in set(names_in(models[0])) - {"model.safetensors"}:
        assert (tmp_path / "out" / name).read_bytes() == (models[0] / name).read_bytes()


def test_the_model_card_identifies_the_inputs(tmp_path, family):
    base, models = family
    merge(Dare(density=0.5, seed=7), base, models, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert record["method"] == "dare"
    assert record["options"] == {"weights": None, "density": 0.5, "scale": 1.0, "seed": 7}
    assert [entry["role"] for entry in record["inputs"]] == ["base", "model 1", "model 2", "model 3"]
    card = (tmp_path / "out" / "README.md").read_text()
    for folder, entry in zip([base, *models], record["inputs"], strict=True):
        hashes = {
            name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
            for name, tensor in tensors_in(folder).items()
        }
        assert entry["tensors"] == hashes
        lines = "".join(f"{name} {hashes[name]}\n" for name in sorted(hashes))
        assert entry["sha256"] == hashlib.sha256(lines.encode()).hexdigest()
        assert entry["folder"] == str(folder)
        assert entry["sha256"] in card
    assert "Options: weights = None, density = 0.5, scale = 1.0, seed = 7." in card


@pytest.mark.parametrize("kind", ["bfloat16", "float32"])
def test_bf16_is_merged_in_fp32_and_rounded_once(tmp_path, family, kind):
    base, _ = family
    models = [relative_of(base, tmp_path / f"m{i}", i, torch.bfloat16) for i in range(2)]
    merge(Linear(), None, models, tmp_path / "out", dtype=kind)
    one, other = (tensors_in(folder) for folder in models)
    for name, tensor in tensors_in(tmp_path / "out").items():
        want = (one[name].float() * 0.5 + other[name].float() * 0.5).to(getattr(torch, kind))
        assert torch.equal(tensor, want), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == kind


def test_slerp_starts_at_the_base_where_there_is_one_model(tmp_path, family):
    base, models = family
    merge(Slerp(t=0.3), base, models[:1], tmp_path / "one")
    merge(Slerp(t=0.3), None, [base, models[0]], tmp_path / "two")
    ours, theirs = tensors_in(tmp_path / "one"), tensors_in(tmp_path / "two")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


class Killed(BaseException):
    pass


def test_a_merge_that_was_killed_resumes_where_it_stopped(tmp_path, family, monkeypatch):
    base, models = family
    merge(ModelStock(), base, models, tmp_path / "complete", shard_bytes=60_000)
    written = []
    finish = ShardWriter.finish

    def note(self, name, notes=None):
        written.append(name)
        finish(self, name, notes)
        if len(written) == 20:
            raise Killed

    monkeypatch.setattr(ShardWriter, "finish", note)
    monkeypatch.setattr(Journal, "abandon", lambda self, kind: self._unlock())  # as the end of a process does
    with pytest.raises(Killed):
        merge(ModelStock(), base, models, tmp_path / "out", shard_bytes=60_000)
    assert names_in(tmp_path) == [".out.partial", "complete"]
    merge(ModelStock(), base, models, tmp_path / "out", shard_bytes=60_000)
    assert 39 <= len(written) < 45  # what was complete is not written twice
    for path in (tmp_path / "complete").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    assert names_in(tmp_path) == ["complete", "out"]


def change_shape(base, model):
    change_tensors(model, lambda tensors: tensors.update({NORM: torch.zeros(65)}))
    return f"tensor shapes do not match config.json: {NORM} must be [64], found [65] in {model}"


def change_names(base, model):
    change_tensors(model, lambda tensors: tensors.update({"x.weight": tensors.pop(NORM)}))
    return f"weights do not match LlamaForCausalLM: missing {NORM}; unexpected x.weight in {model}"


def change_vocabulary(base, model):
    change_json(model / "config.json", lambda config: config.update(vocab_size=260))

    def longer(tensors):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.cat([tensors[name], tensors[name][:1]])

    change_tensors(model, longer)
    return f"models differ: {model} has vocab_size 260 instead of 259 as in {base}"


def change_constant(base, model):
    change_json(model / "config.json", lambda config: config["rope_parameters"].update(rope_theta=1.0))
    return f"models differ: {model} has rope_theta 1.0 instead of 500000.0 as in {base}"


def change_tokenizer(base, model):
    def swap(content):
        content["model"]["vocab"].update(a=content["model"]["vocab"]["b"], b=content["model"]["vocab"]["a"])

    change_json(model / "tokenizer.json", swap)
    return f'tokenizers differ: 2 tokens differ, for example "b" (64 and 65) in {model} and {base}'


def change_merges(base, model):
    change_json(model / "tokenizer.json", lambda content: content["model"].update(merges=[["a", "b"]]))
    return f"tokenizers differ: merges differs in {model} and {base}"


def drop_tokenizer(base, model):
    (model / "tokenizer.json").unlink()
    return (
        f"tokenizers must share a file format to be compared, found tokenizer.json in {base}, none in {model}"
    )


def change_dtype(base, model):
    change_tensors(model, lambda tensors: tensors.update({NORM: tensors[NORM].bfloat16()}))
    return f"{NORM} has different dtypes: F32 in {base}, BF16 in {model}; choose one by --dtype"


def change_numbers(base, model):
    def change(tensors):
        tensors[NORM][3] = torch.nan
        tensors["lm_head.weight"][0, :1500] = torch.inf
        tensors["lm_head.weight"][1, 1] = torch.nan

    change_tensors(model, change)
    return (
        f"weights must be finite: {NORM} holds 1 NaN; lm_head.weight holds 1 NaN and 64 infinite in {model}"
    )


def drop_architecture(base, model):
    change_json(model / "config.json", lambda config: config.update(architectures=["MambaForCausalLM"]))
    return "architectures must be one of Qwen2ForCausalLM, LlamaForCausalLM, Qwen3ForCausalLM"


CHANGES = [
    change_shape,
    change_names,
    change_vocabulary,
    change_constant,
    change_tokenizer,
    change_merges,
    drop_tokenizer,
    change_dtype,
    change_numbers,
    drop_architecture,
]


@pytest.mark.parametrize("change", CHANGES, ids=[change.__name__ for change in CHANGES])
def test_folders_that_do_not_fit_are_refused_and_leave_no_trace(tmp_path, own, change):
    base, model = own
    line = change(base, model)
    with pytest.raises(InputError) as error:
        merge(METHODS["task_arithmetic"](), base, [model], tmp_path / "out")
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)
    assert names_in(tmp_path) == ["base", "model"]


def test_other_settings_of_a_tokenizer_may_differ(tmp_path, own):
    """Padding and truncation are settings of a caller; chat templates come with the first model."""
    base, model = own
    change_json(base / "tokenizer.json", lambda content: content.update(truncation=None, padding=None))
    (base / "chat_template.jinja").unlink()
    merge(METHODS["task_arithmetic"](), base, [model], tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").is_file()


def test_a_full_disk_is_seen_beforehand(tmp_path, family, monkeypatch):
    base, models = family
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    with pytest.raises(InputError, match=r"not enough disk space for .*out: 0\.0 GB needed, 0\.0 GB free"):
        merge(ModelStock(), base, models, tmp_path / "out")
    assert names_in(tmp_path) == []


def test_sentencepiece_files_are_compared_and_copied(tmp_path, own):
    base, model = own
    for folder in own:
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer.model").write_bytes(b"pieces")
    merge(METHODS["task_arithmetic"](), base, [model], tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"pieces"
    (model / "tokenizer.model").write_bytes(b"other")
    with pytest.raises(InputError, match=r"tokenizers differ: tokenizer.model differs"):
        merge(METHODS["task_arithmetic"](), base, [model], tmp_path / "other")


def command(*words):
    return main(["merge", *map(str, words)])


def test_the_command(tmp_path, family, capsys):
    base, models = family
    code = command("ties", "--base", base, "--models", *models, "--out", tmp_path / "out", "--density", "0.5")
    assert code == 0
    out, err = capsys.readouterr()
    assert (out, err) == (f"merged 3 models by ties: 39 tensors, to {tmp_path / 'out'}\n", "")
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["options"]["density"] == 0.5
    assert command("linear", "--models", *models, "--weights", 1, 1, 2, "--out", tmp_path / "linear") == 0
    assert json.loads((tmp_path / "linear" / "merge.json").read_text())["options"] == {"weights": [1, 1, 2]}


MISTAKES = {
    "method": ("stock", "no command 'stock', it has linear, task_arithmetic, model_stock"),
    "no base": ("model_stock --models {m} {m} --out {out}", "the following arguments are required: --base"),
    "an option of another": (
        "model_stock --base {b} --models {m} {m} --out {out} --weights 1 1",
        "megatron-align merge model_stock has no option --weights",
    ),
    "one model": ("model_stock --base {b} --models {m} --out {out}", "needs two models or more, got 1"),
    "weights": ("linear --models {m} {m} --weights 1 --out {out}", "one number for each of 2 models, got 1"),
    "no folder": ("linear --models {m} {out} --out {out}", "no Hugging Face folder at"),
    "in the way": (
        "linear --models {m} {m} --out {m}",
        "output must be a new or empty folder, found files in",
    ),
}


@pytest.mark.parametrize("words, line", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(tmp_path, family, capsys, words, line):
    base, models = family
    assert command(*words.format(b=base, m=models[0], out=tmp_path / "out").split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert line in err
    assert names_in(tmp_path) == []
