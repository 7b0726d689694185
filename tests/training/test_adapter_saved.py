"""Law 10 for ``modules_to_save``: complete copies are trained as PEFT trains them, on every layout.

The base never changes. The reference, with the adapter off, has its modules; files are those that PEFT loads.
"""

import json
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoTokenizer

from megatron_align.convert import verify_logits
from megatron_align.convert.our_model import empty_model, one_process
from megatron_align.evaluation.generation import generate
from megatron_align.hf.adapter import load_adapter, read_adapter
from megatron_align.model.families import read_shape
from megatron_align.model.lora import adapters_off
from megatron_align.training.weights import read_model_weights
from tests.harness import cli, peft, training_ranks
from tests.harness.marks import mark_slow
from tests.harness.tiny import make_adapter, metrics_of, run_arguments, write_pairs
from tests.harness.trl import BATCH, LENGTH, STEPS, trl_rows
from tests.training.test_adapter_trl import PAIRS, data_file

SAVED = ["embed_tokens", "lm_head", "norm"]
TARGETS = ["q_proj", "down_proj"]
WEIGHTS = "adapter/adapter_model.safetensors"
HEAD = "base_model.model.lm_head.weight"
# Its norms of query and key are summed over tensor ranks by megatron-core for another reason than the others.
VARIANT = "qwen3"
LAYOUTS = {
    "tp2_sp": (2, {"parallel__tensor": 2}),
    "tp2_pp2": (4, {"parallel__tensor": 2, "parallel__sequence": False, "parallel__pipeline": 2}),
    "vpp2_recompute": (
        2,
        {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2, "train__recompute_layers": 1},
    ),
    "recompute_modules": (1, {"train__recompute_modules": "[attention, mlp, norms]"}),
    "allgather2_tp2": (
        4,
        {"parallel__context": 2, "parallel__context_kind": "allgather", "parallel__tensor": 2},
    ),
}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        assert want.norm() > 0, name
        assert (found[name] - want).norm() <= 2e-5 * want.norm(), name  # fp32 sums in another order


@pytest.fixture(scope="module")
def gradients(pool, tiny_models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    pairs = write_pairs(folder / "pairs.jsonl", samples=12)
    adapters = {}

    def adapter_of(variant):
        if variant not in adapters:
            start = folder / variant
            adapters[variant] = make_adapter(start, tiny_models(variant), targets=TARGETS, saved=SAVED)
        return adapters[variant]

    def run(world=1, variant=VARIANT, data=pairs, **options):
        out = tmp_path_factory.mktemp("run")
        if data == pairs:
            options = {"objective__name": "dpo", "reference__mode": "none", **options}
        options["model__adapter"] = f"{{path: {adapter_of(variant)}}}"
        arguments = run_arguments(tiny_models(variant), data, out, **options)
        pool.run(world, training_ranks.gradients, arguments, out / "adapter")
        return load_file(out / WEIGHTS)

    run.adapter_of = adapter_of
    return run


@pytest.fixture(scope="module")
def of_one_rank(gradients):
    return gradients()


@pytest.mark.parametrize("layout", mark_slow(LAYOUTS, [name for name in LAYOUTS if name != "tp2_sp"]))
def test_every_gradient_is_that_of_one_rank(layout, gradients, of_one_rank):
    world, options = LAYOUTS[layout]
    assert_same(gradients(world, **options), of_one_rank)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2_pp2", "vpp2_recompute"])
def test_a_tied_copy_has_one_gradient(layout, gradients):
    """The first and the last stage hold it, and sum what the embedding and the head contribute."""
    world, options = LAYOUTS[layout]
    found, wanted = gradients(world, "qwen2_tied", **options), gradients(1, "qwen2_tied")
    assert_same(found, wanted)
    assert torch.equal(wanted[HEAD], wanted["base_model.model.model.embed_tokens.weight"])


@pytest.mark.parametrize("variant", mark_slow([VARIANT, "qwen2_tied"], [VARIANT]))
def test_gradients_are_pefts(variant, gradients, tiny_models, chat_file, tmp_path):
    few = peft.first_chats(chat_file, tmp_path / "chat.jsonl")
    found = gradients(variant=variant, data=few, train__global_batch_size=3)
    wanted = peft.sft_gradients(tiny_models(variant), gradients.adapter_of(variant), few)
    if variant == "qwen2_tied":  # PEFT's parameter is one, of two names in the file
        wanted[HEAD] = wanted["base_model.model.model.embed_tokens.weight"]
    assert_same(found, wanted)


def logits_on_and_off(rank_info, model, folder, tokens):
    """In a process of the pool: logits with an adapter, with it off, and of the base."""
    with one_process() as groups, torch.no_grad():
        shape, found = read_shape(model), []
        batch = verify_logits._packed([tokens])
        for adapter in (read_adapter(folder, shape), None):
            chunks = empty_model(shape, torch.float32, groups, adapter)
            read_model_weights(chunks, str(model), shape, groups)
            if adapter is not None:
                load_adapter(folder, chunks)
                found.append(chunks[0].logits(batch))
            with adapters_off(chunks):
                found.append(chunks[0].logits(batch))
        return found


def test_off_the_model_is_its_base(pool, tiny_models, tmp_path):
    """Bit for bit, as every reference is computed so; on, the logits are PEFT's."""
    model, tokens = tiny_models("qwen2_tied"), torch.arange(1, 60)
    adapter = make_adapter(tmp_path / "adapter", model, targets=TARGETS, saved=SAVED)
    [(on, off, base)] = pool.run(1, logits_on_and_off, model, adapter, tokens)
    assert torch.equal(off, base)
    with torch.no_grad():
        [wanted] = PeftModel.from_pretrained(peft.load(model), adapter).eval()(tokens[None]).logits
    assert (on - wanted).abs().max() < 1e-5
    assert (on - base).abs().max() > 0.1


TRL = {
    "sft": ("qwen2_untied", {}, {}),
    "dpo": (
        "qwen2_untied",
        PAIRS,
        {"reference__mode": "live", "parallel__tensor": 2, "parallel__pipeline": 2},
    ),
    "dpo_tied": ("qwen2_tied", PAIRS, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", TRL)
def test_ten_steps_equal_trl_with_peft(case, pool, tiny_models, tmp_path):
    """From copies that differ from the base, so that a reference with the trained modules has other rewards."""
    variant, names, options = TRL[case]
    objective, model = case.partition("_")[0], tiny_models(variant)
    adapter = make_adapter(tmp_path / "adapter", model, b=0.05, saved=SAVED)
    data = data_file(objective, tmp_path)
    arguments = run_arguments(
        model,
        data,
        tmp_path / "ours",
        data__sequence_length=LENGTH,
        data__shuffle=False,
        train__steps=STEPS,
        train__global_batch_size=BATCH,
        optimizer__lr=1e-3,
        objective__name=objective,
        model__adapter=f"{{path: {adapter}}}",
        **options,
    )
    before = {path: path.read_bytes() for path in model.iterdir()}
    pool.run(4 if options else 1, training_ranks.train, arguments)
    ours = metrics_of(tmp_path / "ours")
    records = [json.loads(line) for line in data.read_text().splitlines()]
    theirs = trl_rows(
        "trl", objective.upper(), model, records, tmp_path / "trl", adapter=adapter, learning_rate=1e-3
    )
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=1e-4, abs=1e-5)
    for name, own in names.items():
        assert [row[own] for row in ours] == pytest.approx([row[name] for row in theirs], abs=1e-4), name
    if names:
        assert abs(ours[0]["chosen_reward"]) > 1e-3
    assert {path: path.read_bytes() for path in model.iterdir()} == before


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["qwen3", "qwen2_tied"])
def test_a_run_is_saved_resumed_and_exported(variant, pool, tiny_models, chat_file, tmp_path):
    """Resumed bit for bit, also on another layout to rounding; PEFT and our tools read the files."""
    base, run = tiny_models(variant), tmp_path / "run"
    tied = ", ensure_weight_tying: true" if variant == "qwen2_tied" else ""
    options = {
        "model__adapter": f"{{rank: 3, alpha: 6, targets: [q_proj], modules_to_save: [{', '.join(SAVED)}]{tied}}}",
        "optimizer__lr": 1e-2,
        "train__steps": 4,
        "checkpoint__save_every": 2,
        "checkpoint__keep": 9,
        "checkpoint__export_hf": True,
    }
    layout = {"parallel__tensor": 2, "parallel__pipeline": 2}
    pool.run(4, training_ranks.train, run_arguments(base, chat_file, run, **options, **layout))
    for name, world, again in (("same", 4, layout), ("other", 1, {})):
        cut = tmp_path / name
        shutil.copytree(run, cut)
        for path in ("step_000004", "adapter", "hf"):
            shutil.rmtree(cut / path)
        pool.run(world, training_ranks.train, run_arguments(base, chat_file, cut, **options, **again))
        exact = 0 if name == "same" else 1e-5
        losses = [[row["loss"] for row in metrics_of(folder)] for folder in (cut, run)]
        assert losses[0] == pytest.approx(losses[1], rel=exact, abs=0)
    found, wanted = load_file(tmp_path / "same" / WEIGHTS), load_file(run / WEIGHTS)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)

    adapted = PeftModel.from_pretrained(peft.load(base), run / "adapter").eval()
    stored, held = load_file(run / WEIGHTS), get_peft_model_state_dict(adapted)
    assert stored.keys() == held.keys()
    assert all(torch.equal(stored[name], held[name]) for name in stored)
    tokens = torch.randint(3, 259, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = adapted(tokens).logits
        assert (logits - peft.load(run / "hf")(tokens).logits).abs().max() < 1e-5
        with adapted.disable_adapter():
            assert torch.equal(adapted(tokens).logits, peft.load(base)(tokens).logits)
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer("2 + 2 =", return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        made = adapted.generate(
            input_ids=ids, max_new_tokens=8, do_sample=False, eos_token_id=tokenizer.eos_token_id
        )[0, ids.shape[1] :]
    for folder in (run, run / "adapter"):
        [[completion]] = generate(base, ["2 + 2 ="], adapter=folder, temperature=0.0, max_tokens=8)
        assert list(completion.token_ids) == made.tolist()
    merged = tmp_path / "merged"
    for arguments in (
        ["convert", "export", "--checkpoint", run, "--out", tmp_path / "out"],
        ["convert", "verify", "--hf", run / "hf", "--checkpoint", run],
        ["convert", "verify", "--hf", tmp_path / "out/adapter", "--checkpoint", run],
        ["adapter", "merge", "--base", base, "--adapter", run / "adapter", "--out", merged],
    ):
        [answer] = pool.run(1, cli.call, [*map(str, arguments)])
        assert answer.code == 0, answer.out + answer.err
    weights = [
        load_file(folder / "model.safetensors") for folder in (merged, run / "hf", tmp_path / "out/hf")
    ]
    for name in weights[0]:
        if "norm" in name or "embed" in name or "lm_head" in name:
            assert torch.equal(weights[0][name], wanted[f"base_model.model.{name}"])
            assert all(torch.equal(weights[0][name], other[name]) for other in weights[1:])
    adapted.save_pretrained(tmp_path / "peft")
    [[again]] = generate(base, ["2 + 2 ="], adapter=tmp_path / "peft", temperature=0.0, max_tokens=8)
    assert list(again.token_ids) == made.tolist()
