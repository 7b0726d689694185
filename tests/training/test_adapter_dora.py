"""Law 10 for DoRA: PEFT's gradients, on every layout, and files that PEFT loads; a new adapter starts as its base."""

import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file

from megatron_align.evaluation.generation import generate
from megatron_align.hf.adapter import read_tensors
from megatron_align.merge.adapter import merge_adapter
from tests.harness import cli, peft, training_ranks
from tests.harness.marks import mark_slow
from tests.harness.tiny import make_adapter, metrics_of, numbers, run_arguments, write_pairs

WEIGHTS = "adapter/adapter_model.safetensors"
LAYOUTS = {
    "tp4": (4, {"parallel__tensor": 4, "parallel__sequence": False}),
    "tp2_sp_pp2": (4, {"parallel__tensor": 2, "parallel__pipeline": 2, "train__recompute_layers": 1}),
    "tp4_sp": (4, {"parallel__tensor": 4}),
}


@pytest.fixture(scope="module")
def adapter(tiny_models, tmp_path_factory):
    return make_adapter(tmp_path_factory.mktemp("start") / "adapter", tiny_models(), dora=True)


@pytest.fixture(scope="module")
def few(chat_file, tmp_path_factory):
    return peft.first_chats(chat_file, tmp_path_factory.mktemp("few") / "chat.jsonl")


@pytest.fixture(scope="module")
def expected(tiny_models, adapter, few):
    return peft.sft_gradients(tiny_models(), adapter, few)


def run_gradients(pool, tiny_models, adapter, few, run, world=1, **layout):
    options = {"train__global_batch_size": 3, "model__adapter": f"{{path: {adapter}}}", **layout}
    arguments = run_arguments(tiny_models(), few, run, **options)
    pool.run(world, training_ranks.gradients, arguments, run / "adapter")
    return load_file(run / WEIGHTS)


@pytest.mark.parametrize("layout", mark_slow(["one", *LAYOUTS], list(LAYOUTS)))
def test_gradients_are_pefts(layout, pool, tiny_models, adapter, few, expected, tmp_path):
    world, options = LAYOUTS.get(layout, (1, {}))
    found = run_gradients(pool, tiny_models, adapter, few, tmp_path, world, **options)
    assert found.keys() == expected.keys()
    assert sum("magnitude" in name for name in found) == 28
    for name, want in expected.items():
        assert want.norm() > 0, name
        assert (found[name] - want).norm() <= 2e-5 * want.norm(), name  # fp32 sums in another order


@pytest.mark.slow
def test_a_new_adapter_is_its_base_and_moves(pool, tiny_models, tmp_path):
    """Its first reward is exactly 0; a resumed run writes the same rows; PEFT and our tools read the files."""
    base, pairs, run = tiny_models(), write_pairs(tmp_path / "pairs.jsonl"), tmp_path / "run"
    options = {
        "objective__name": "dpo",
        "reference__mode": "live",
        "model__adapter": "{rank: 3, alpha: 6, dora: true}",
        "optimizer__lr": 1e-2,
        "train__steps": 4,
        "checkpoint__save_every": 2,
        "checkpoint__keep": 9,
        "checkpoint__export_hf": True,
        "parallel__tensor": 2,
    }
    pool.run(2, training_ranks.train, run_arguments(base, pairs, run, **options))
    rows = metrics_of(run)
    assert (rows[0]["chosen_reward"], rows[0]["rejected_reward"]) == (0, 0)
    assert rows[-1]["reward_margin"] > 0.01
    cut = shutil.copytree(run, tmp_path / "cut")
    shutil.rmtree(cut / "step_000004")
    pool.run(2, training_ranks.train, run_arguments(base, pairs, cut, **options))
    assert numbers(cut) == numbers(run)

    adapted = PeftModel.from_pretrained(peft.load(base), run / "adapter").eval()
    stored, held = load_file(run / WEIGHTS), get_peft_model_state_dict(adapted)
    assert stored.keys() == held.keys()
    lengths = peft.load(base).get_submodule("model.layers.0.self_attn.o_proj").weight.norm(dim=1)
    moved = stored["base_model.model.model.layers.0.self_attn.o_proj.lora_magnitude_vector"]
    assert 1e-3 < (moved - lengths).abs().max() < 0.1
    tokens = torch.randint(3, 259, (2, 40), generator=torch.Generator().manual_seed(0))
    merge_adapter(base, run / "adapter", tmp_path / "merged")
    with torch.no_grad():
        logits = adapted(tokens).logits
        assert (logits - peft.load(base)(tokens).logits).abs().max() > 1e-2
        for folder in (run / "hf", tmp_path / "merged"):
            assert (logits - peft.load(folder)(tokens).logits).abs().max() < 1e-5
    for folder in ("hf", "adapter"):
        [answer] = pool.run(
            1, cli.call, ["convert", "verify", "--hf", str(run / folder), "--checkpoint", str(run)]
        )
        assert answer.code == 0, answer.out + answer.err
    [[merged]], [[live]] = (
        generate(model, ["2 + 2 ="], adapter=path, temperature=0.0, max_tokens=8)
        for model, path in ((run / "hf", None), (base, run))
    )
    assert live.token_ids == merged.token_ids
    assert read_tensors(run / "adapter").keys() == stored.keys()
