"""Law 12 with adapters: what is generated and scored with ``--adapter`` is what PEFT computes, on a layout too.

An adapter of another base, architecture or size, and a folder of pickles, are one line of error before anything runs.
"""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_align.errors import InputError
from megatron_align.evaluation import adapters as adapters_module
from megatron_align.evaluation import run as run_module
from megatron_align.evaluation.adapter_names import parse_adapters
from megatron_align.evaluation.adapters import attach_adapters, open_adapter_of
from megatron_align.evaluation.engines import open_engine
from megatron_align.evaluation.generation import generate
from megatron_align.hf.adapter import BASE_HASH
from megatron_align.hf.load import weights_hash
from megatron_align.merge.adapter import merge_adapter
from megatron_align.tools.main import main
from tests.harness import training_ranks
from tests.harness.tiny import make_adapter, make_baichuan, make_model, write_pairs

PROMPT = "2 + 2 ="


@pytest.fixture(scope="module")
def adapters(tiny_models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "one": make_adapter(folder / "one", tiny_models(), b=0.5),
        "two": make_adapter(folder / "two", tiny_models(), rank=2, b=0.5, targets=["q_proj", "down_proj"]),
    }


def of_peft(model, adapter):
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return PeftModel.from_pretrained(loaded, adapter).eval()


def greedy(model, tokenizer):
    ids = tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        return model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()


def test_generated_tokens_are_those_of_peft(tiny_models, adapters, tmp_path, capsys):
    model = tiny_models()
    tokenizer = AutoTokenizer.from_pretrained(model)
    wanted = {name: greedy(of_peft(model, path), tokenizer) for name, path in adapters.items()}
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    wanted["base"] = greedy(base, tokenizer)
    assert len({str(tokens) for tokens in wanted.values()}) == 3  # each adapter does something

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": PROMPT}) + "\n")
    named = [f"{name}={path}" for name, path in adapters.items()]
    arguments = ["--model", str(model), "--prompts", str(prompts), "--max-tokens", "12", "--temperature", "0"]
    out = tmp_path / "out.jsonl"
    assert main(["generate", *arguments, "--tokens", "--out", str(out), "--adapter", *named]) == 0
    for name in adapters:
        [row] = [json.loads(line) for line in (tmp_path / f"out.{name}.jsonl").read_text().splitlines()]
        assert row["completions"][0]["token_ids"] == wanted[name]
    assert not out.exists()

    engine = open_engine(model, "fp32")
    attached = attach_adapters(engine, model, {name: str(path) for name, path in adapters.items()})
    for name in ("one", None, "two"):
        attached.use(name)
        [[completion]] = generate(engine, [PROMPT], temperature=0.0, max_tokens=12)
        assert list(completion.token_ids) == wanted[name or "base"]


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_of_baichuan2_generates_as_the_merged_model(dora, tmp_path):
    """Its packed query, key and value are separate in the engine's Llama."""
    base = make_baichuan(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, b=0.5, dora=dora)
    merge_adapter(base, adapter, tmp_path / "merged", None)
    engines = open_engine(base, "fp32", adapter), open_engine(tmp_path / "merged", "fp32")
    ids = torch.arange(1, 25)[None]
    with torch.no_grad():
        found, wanted = (engine.model(ids).logits for engine in engines)
        plain = open_engine(base, "fp32").model(ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert (plain - wanted).abs().max() > 1e-2


def test_scores_on_a_layout_are_those_of_peft(pool, tiny_models, adapters, tmp_path):
    """The implicit reward too, whose reference is the base without the adapter."""
    model, pairs = tiny_models(), write_pairs(tmp_path / "pairs.jsonl", samples=6)
    tasks = [
        {"name": "logprob", "kind": "preference", "data": str(pairs), "score": "logprob"},
        {"name": "reward", "kind": "preference", "data": str(pairs), "reference": str(model)},
    ]
    config = {
        "model": str(model),
        "adapter": {name: str(path) for name, path in adapters.items()},
        "out": str(tmp_path / "out"),
        "precision": "fp32",
        "sequence_length": 256,
        "parallel": {"tensor": 2},
        "tasks": tasks,
    }
    pool.run(2, training_ranks.evaluate, config)
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for name, adapter in adapters.items():
        adapted = of_peft(model, adapter)
        for task in tasks:
            file = tmp_path / "out" / name / "items" / f"{task['name']}.jsonl"
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            for row, pair in zip(rows, map(json.loads, pairs.read_text().splitlines()), strict=True):
                score = logprob(adapted, tokenizer, pair)
                if task["name"] == "reward":
                    score -= logprob(base, tokenizer, pair)
                assert row["chosen"] == pytest.approx(score, abs=1e-3)


def logprob(model, tokenizer, pair):
    def chat(messages, prompt=False):
        return tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)

    ids, prompt = chat(pair["prompt"] + pair["chosen"]), len(chat(pair["prompt"], True))
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(logprobs[i - 1, ids[i]].item() for i in range(prompt, len(ids)))


def test_adapters_that_do_not_fit(tiny_models, adapters, tmp_path):
    model = tiny_models()
    other = make_model(tmp_path / "other", hidden_size=32)
    with pytest.raises(InputError, match="the adapter is of another size than the model or its r"):
        generate(model, [PROMPT], adapter=make_adapter(tmp_path / "wide", other))
    pickles = tmp_path / "pickles"
    pickles.mkdir()
    (pickles / "adapter_config.json").write_text((adapters["one"] / "adapter_config.json").read_text())
    (pickles / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(InputError, match="adapter_model.bin is a pickle and is not read"):
        generate(model, [PROMPT], adapter=pickles)
    tensors = {"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.zeros(3, 64)}
    strange = make_adapter(tmp_path / "strange", model)
    save_file(tensors, strange / "adapter_model.safetensors")
    with pytest.raises(InputError, match="the adapter does not match Qwen2ForCausalLM: .*unexpected"):
        generate(model, [PROMPT], adapter=strange)
    with pytest.raises(InputError, match="an adapter folder must hold adapter_config.json, found none in"):
        generate(model, [PROMPT], adapter=model)
    with pytest.raises(InputError, match="no adapter folder at"):
        generate(model, [PROMPT], adapter=tmp_path / "none")


def test_all_adapters_are_checked_before_the_first_is_used(
    tiny_models, adapters, tmp_path, monkeypatch, capsys
):
    """The last of several is of another base: no file is written, and the base was hashed once."""
    model, bases = tiny_models(), []
    right, wrong = (make_adapter(tmp_path / name, model) for name in ("right", "wrong"))
    for folder, base in ((right, weights_hash(model)), (wrong, "0" * 64)):
        file = folder / "adapter_model.safetensors"
        save_file(load_file(file), file, {BASE_HASH: base})
    monkeypatch.setattr(
        adapters_module, "weights_hash", lambda path: bases.append(path) or weights_hash(path)
    )
    monkeypatch.setattr(run_module, "hash_of_rank_0", lambda path: bases.append(path) or weights_hash(path))
    adapters_module._hash_of.cache_clear()
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": PROMPT}) + "\n")
    arguments = ["--model", str(model), "--prompts", str(prompts), "--out", str(tmp_path / "out.jsonl")]
    named = [f"one={adapters['one']}", f"right={right}", f"wrong={wrong}"]
    assert main(["generate", *arguments, "--max-tokens", "1", "--adapter", *named]) == 2
    assert "the adapter is of another base" in capsys.readouterr().err
    assert not list(tmp_path.glob("*out*"))
    assert len(bases) == 1
    setups = [
        SimpleNamespace(config=SimpleNamespace(model=str(model)), adapter=open_adapter_of(model, path))
        for path in (adapters["one"], right, wrong)
    ]
    with pytest.raises(InputError, match="the adapter is of another base"):
        run_module._require_base(setups, SimpleNamespace(patient=lambda _: nullcontext()))
    assert len(bases) == 2


def test_names():
    assert parse_adapters(["a=x/y", "b=z"]) == {"a": "x/y", "b": "z"}
    assert parse_adapters(["runs/lora"]) == {"adapter": "runs/lora"}
    assert parse_adapters([]) == {}
    for texts, line in {
        ("x", "y"): "several adapters need names, --adapter NAME=PATH",
        ("a=x", "a=y"): "each adapter needs a name of its own, got 'a' twice",
        ("base=x",): "an adapter must not be named 'base'",
    }.items():
        with pytest.raises(InputError, match=line):
            parse_adapters(texts)
