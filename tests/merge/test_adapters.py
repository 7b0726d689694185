"""Law 10 for several adapters: merged as adapters they are what their merged models are merged to, by every formula.

The judge of one adapter made of several is PEFT's ``add_weighted_adapter``.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_align.merge.adapter import merge_adapter
from megatron_align.tools.main import main
from tests.harness.tiny import change_tensors, make_adapter, make_model, make_reward

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TARGETS = ["q_proj", "down_proj", "embed_tokens", "lm_head"]


def another(folder, base, **options):
    """An adapter of a base with other A and B than ``make_adapter`` draws."""
    make_adapter(folder, base, **options)
    save_file(
        {name: t.flip(0, 1).contiguous() for name, t in load_file(folder / FILE).items()}, folder / FILE
    )
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base, adapters of other ranks and scales, one of the first's rank, and the merged models."""
    root = tmp_path_factory.mktemp("adapters")
    base = make_model(root / "base", "qwen2_untied", num_hidden_layers=1)
    make_adapter(root / "one", base, targets=TARGETS)
    another(root / "two", base, targets=TARGETS, rank=5, alpha=4.0, b=0.2)
    another(root / "same", base, targets=TARGETS, alpha=3.0, b=0.2)
    for name in ("one", "two", "same"):
        merge_adapter(base, root / name, root / f"{name}_model", "float32")
    return root


def merge(method, models, out, *options):
    return main(["merge", method, "--models", *map(str, models), "--out", str(out), *options])


def peft_merged(folders, names, weights, kind, **options):
    """The adapter that PEFT makes, by our names of tensors, and what it adds to each weight."""
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folders / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(model, folders / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(folders / name, adapter_name=name)
    model.base_model.add_weighted_adapter(names, weights, "both", combination_type=kind, **options)
    return get_peft_model_state_dict(model, adapter_name="both", save_embedding_layers=False)


def products(tensors):
    """Return B A of every module, the embedding's too; of scale 1."""
    found = {}
    for name, a in tensors.items():
        if ".lora_A" in name or "embedding_A" in name:
            found[name] = tensors[name.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")] @ a
    return found


@pytest.mark.parametrize("kind", ["cat", "svd", "linear"])
def test_one_adapter_of_several_is_that_of_peft(kind, folders, tmp_path):
    names, weights = ["one", "same" if kind == "linear" else "two"], [0.7, -0.4]
    options = {"svd_rank": 4} if kind == "svd" else {}
    wanted = peft_merged(folders, names, weights, kind, **options)
    given = ["--rank", "4"] if kind == "svd" else []
    base = ["--base", str(folders / "base"), "--weights", *map(str, weights), "--combination", kind]
    assert merge("task_arithmetic", [folders / name for name in names], tmp_path / "out", *base, *given) == 0
    found = load_file(tmp_path / "out" / FILE)
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["r"] == {"cat": 8, "svd": 4, "linear": 3}[kind]
    if kind != "svd":  # whose singular values may be in A or B
        assert found.keys() == wanted.keys()
        for name, want in wanted.items():
            torch.testing.assert_close(found[name], want, rtol=1e-5, atol=1e-7)
    for name, want in products(wanted).items():
        torch.testing.assert_close(products(found)[name], want, rtol=1e-4, atol=1e-6)


METHODS = {
    "linear": ["--weights", "3", "1"],
    "task_arithmetic": ["--weights", "0.5", "1", "--scale", "0.7"],
    "model_stock": [],
    "slerp": ["--t", "0.3"],
    "ties": ["--density", "0.4"],
    "dare": ["--density", "0.5"],
}


@pytest.mark.parametrize("method", METHODS)
def test_every_formula_is_that_of_the_merged_models(method, folders, tmp_path):
    """With --merged, and as one adapter where the result is one: of the sum of the ranks, or of full rank."""
    base, options = ["--base", str(folders / "base")], METHODS[method]
    models, adapters = ([folders / f"{name}{end}" for name in ("one", "two")] for end in ("_model", ""))
    assert merge(method, models, tmp_path / "wanted", *base, *options) == 0
    assert merge(method, adapters, tmp_path / "model", *base, *options, "--merged") == 0
    wanted = load_file(tmp_path / "wanted" / "model.safetensors")
    found = [load_file(tmp_path / "model" / "model.safetensors")]
    if method == "slerp":
        assert merge(method, adapters, tmp_path / "adapter", *base, *options) == 2
    else:
        full = ["--rank", "64"] if method in ("ties", "dare") else []  # the smallest side of the modules
        assert merge(method, adapters, tmp_path / "adapter", *base, *options, *full) == 0
        merge_adapter(folders / "base", tmp_path / "adapter", tmp_path / "again", "float32")
        found.append(load_file(tmp_path / "again" / "model.safetensors"))
    for tensors in found:
        assert tensors.keys() == wanted.keys()
        for name, want in wanted.items():
            # An element on the edge of what ties keeps may fall on either side by rounding.
            far = ((tensors[name] - want).abs() > 2e-5).double().mean()
            assert far <= (1e-3 if method == "ties" else 0), (name, far)


def test_the_base_is_the_one_that_all_adapters_name(folders, tmp_path, capsys):
    assert merge("linear", [folders / "one", folders / "same"], tmp_path / "out") == 0
    assert (
        "merged 2 adapters by linear (cat): LoRA of rank 6, scale 1, on 4 modules, to"
        in capsys.readouterr().out
    )
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config["base_model_name_or_path"] == str(folders / "base")


def changed(folder: Path, source: Path, **options):
    """A copy of an adapter with other options."""
    folder.mkdir()
    (folder / FILE).write_bytes((source / FILE).read_bytes())
    config = {**json.loads((source / CONFIG).read_text()), **options}
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def pickled(folder, source):
    changed(folder, source)
    (folder / FILE).rename(folder / "adapter_model.bin")
    return folder


def run(folder, source):
    folder.mkdir()
    changed(folder / "adapter", source)
    return folder


REFUSED = {
    "ranks": (
        lambda f, t: f / "two",
        ["--combination", "linear"],
        "needs adapters of one rank, got 3 in .* and 5",
    ),
    "targets": (
        lambda f, t: make_adapter(t / "other", f / "base", targets=["q_proj"]),
        [],
        "must change the same modules: lm_head, .* in one of .*one and .*other alone",
    ),
    "dora": (
        lambda f, t: make_adapter(t / "other", f / "base", targets=["q_proj", "down_proj"], dora=True),
        [],
        "adapters with DoRA do not add up.* found use_dora in .*other",
    ),
    "copies": (
        lambda f, t: make_adapter(t / "other", f / "base", targets=["q_proj"], saved=["norm"]),
        [],
        "found modules_to_save .*model.norm.* in .*other",
    ),
    "another base's name": (
        lambda f, t: changed(t / "other", f / "one", base_model_name_or_path="/models/else"),
        [],
        "name different bases, .*base in .*one, /models/else in .*other: give .* as --base",
    ),
    "another size": (
        lambda f, t: make_adapter(t / "other", make_model(t / "big", "qwen2_untied", hidden_size=128)),
        ["--base", "BASE"],
        "the adapter .* in .*other",
    ),
    "pickles": (
        lambda f, t: pickled(t / "other", f / "one"),
        [],
        "adapter_model.bin is a pickle and is not read",
    ),
    "a model": (
        lambda f, t: f / "one_model",
        [],
        "--models must all be adapters .* of the 2, .*one_model is no",
    ),
    "a run": (
        lambda f, t: run(t / "run", f / "one"),
        [],
        ".* is the folder of a run: give its adapter, .*/adapter, or its merged model, .*/hf",
    ),
    "rank with cat": (
        lambda f, t: f / "two",
        ["--rank", "4"],
        "--rank belongs to --combination svd, got 4 with cat",
    ),
    "a rank that is too large": (
        lambda f, t: f / "two",
        ["--rank", "65", "--combination", "svd"],
        "--rank must be at most 64, the smaller side of",
    ),
    "weights": (
        lambda f, t: f / "two",
        ["--weights", "1"],
        "--weights must have one number for each of 2 models",
    ),
    "an option of adapters": (
        lambda f, t: f / "two",
        ["--merged", "--rank", "3"],
        "--rank: of one adapter as the result, which --merged replaces",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, folders, tmp_path, capsys):
    make, options, pattern = REFUSED[name]
    other = make(folders, tmp_path)
    options = [str(folders / "base") if option == "BASE" else option for option in options]
    capsys.readouterr()
    assert merge("linear", [folders / "one", other], tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(f"error: [^\n]*{pattern}[^\n]*\n", error), error
    assert not (tmp_path / "out").exists()


def test_adapters_of_other_weights_are_refused(folders, tmp_path, capsys):
    """By the hash that the adapters hold, of each other and of the base."""
    from megatron_align.hf.load import weights_hash

    base = make_model(tmp_path / "base", "qwen2_untied", num_hidden_layers=1)
    right = make_adapter(tmp_path / "right", base, weights_hash=weights_hash(base))
    wrong = make_adapter(tmp_path / "wrong", base, weights_hash="0" * 64)
    assert merge("linear", [right, wrong], tmp_path / "out") == 2
    assert "the adapters are of different bases: " in capsys.readouterr().err
    assert merge("linear", [right, right], tmp_path / "out") == 0
    change_tensors(base, lambda tensors: tensors["model.norm.weight"].mul_(2))
    assert merge("linear", [right, right], tmp_path / "again") == 2
    assert "the adapter is of another base: it was trained on weights with" in capsys.readouterr().err


def test_reward_models_are_merged_as_complete_models(tmp_path, capsys):
    base = make_reward(tmp_path / "base", "llama")
    adapters = [make_adapter(tmp_path / "one", base), another(tmp_path / "two", base)]
    assert merge("linear", adapters, tmp_path / "out") == 2
    assert "found modules_to_save score in" in capsys.readouterr().err
    assert merge("linear", adapters, tmp_path / "model", "--merged") == 0
    found = load_file(tmp_path / "model" / "model.safetensors")["score.weight"]
    scores = [load_file(folder / FILE)["base_model.model.score.weight"] for folder in adapters]
    torch.testing.assert_close(found, sum(scores) / 2)
