"""Law 10 for adapters of embedding and output head: PEFT's gradients, on every layout, and files that PEFT loads."""

import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoTokenizer

from megatron_align.evaluation.generation import generate
from tests.harness import cli, peft, training_ranks
from tests.harness.marks import mark_slow
from tests.harness.tiny import make_adapter, metrics_of, run_arguments, write_pairs

TARGETS = ["embed_tokens", "lm_head", "q_proj", "down_proj"]
WEIGHTS = "adapter/adapter_model.safetensors"
VARIANT = "qwen2_untied"
LAYOUTS = {
    "tp2_sp": (2, {"parallel__tensor": 2}),
    "tp2_pp2": (4, {"parallel__tensor": 2, "parallel__sequence": False, "parallel__pipeline": 2}),
    "allgather2_tp2": (
        4,
        {"parallel__context": 2, "parallel__context_kind": "allgather", "parallel__tensor": 2},
    ),
}


@pytest.fixture(scope="module")
def adapter(tiny_models, tmp_path_factory):
    return make_adapter(tmp_path_factory.mktemp("start") / "adapter", tiny_models(VARIANT), targets=TARGETS)


@pytest.fixture(scope="module")
def gradients(pool, tiny_models, adapter, tmp_path_factory):
    pairs = write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", samples=12)

    def run(world=1, data=pairs, dropout=0.3, **options):
        run = tmp_path_factory.mktemp("run")
        if data == pairs:
            options = {"objective__name": "dpo", "reference__mode": "none", **options}
        options["model__adapter"] = f"{{path: {adapter}, dropout: {dropout}}}"
        pool.run(
            world,
            training_ranks.gradients,
            run_arguments(tiny_models(VARIANT), data, run, **options),
            run / "adapter",
        )
        return load_file(run / WEIGHTS)

    return run


@pytest.fixture(scope="module")
def of_one_rank(gradients):
    return gradients()


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        assert want.norm() > 0, name
        assert (found[name] - want).norm() <= 2e-5 * want.norm(), name  # fp32 sums in another order


@pytest.mark.parametrize("layout", mark_slow(LAYOUTS, ["tp2_pp2", "allgather2_tp2"]))
def test_every_gradient_is_that_of_one_rank(layout, gradients, of_one_rank):
    world, options = LAYOUTS[layout]
    assert_same(gradients(world, **options), of_one_rank)


def test_gradients_are_pefts(gradients, adapter, tiny_models, chat_file, tmp_path):
    few = peft.first_chats(chat_file, tmp_path / "chat.jsonl")
    found = gradients(data=few, dropout=0, train__global_batch_size=3)
    assert_same(found, peft.sft_gradients(tiny_models(VARIANT), adapter, few))


@pytest.mark.slow
def test_a_run_is_saved_resumed_and_exported(pool, tiny_models, chat_file, tmp_path):
    """Another layout goes on with its checkpoint; PEFT and our tools read the files."""
    base, run = tiny_models(VARIANT), tmp_path / "run"
    options = {
        "model__adapter": f"{{rank: 3, alpha: 6, dropout: 0.2, targets: [{', '.join(TARGETS)}]}}",
        "optimizer__lr": 1e-2,
        "train__steps": 4,
        "checkpoint__save_every": 2,
        "checkpoint__keep": 9,
    }
    arguments = run_arguments(base, chat_file, run, checkpoint__export_hf=True, parallel__tensor=2, **options)
    pool.run(2, training_ranks.train, arguments)
    cut = tmp_path / "cut"
    shutil.copytree(run, cut)
    shutil.rmtree(cut / "step_000004")
    pool.run(1, training_ranks.train, run_arguments(base, chat_file, cut, **options))
    assert [row["loss"] for row in metrics_of(cut)] == pytest.approx(
        [row["loss"] for row in metrics_of(run)], rel=1e-5
    )

    adapted = PeftModel.from_pretrained(peft.load(base), run / "adapter").eval()
    stored, held = load_file(run / WEIGHTS), get_peft_model_state_dict(adapted, save_embedding_layers=False)
    assert stored.keys() == held.keys()
    assert stored["base_model.model.model.embed_tokens.lora_embedding_A"].norm() > 0
    tokens = torch.randint(3, 259, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = adapted(tokens).logits
        assert (logits - peft.load(run / "hf")(tokens).logits).abs().max() < 1e-5
        assert (logits - peft.load(base)(tokens).logits).abs().max() > 1e-2
    ids = AutoTokenizer.from_pretrained(base)("2 + 2 =", return_tensors="pt", add_special_tokens=False)[
        "input_ids"
    ]
    with torch.no_grad():
        wanted = adapted.generate(input_ids=ids, max_new_tokens=8, do_sample=False)[
            0, ids.shape[1] :
        ].tolist()
    [[completion]] = generate(base, ["2 + 2 ="], adapter=run, temperature=0.0, max_tokens=8)
    assert list(completion.token_ids) == wanted

    for arguments in (
        ["export", "--checkpoint", run, "--out", tmp_path / "out"],
        ["verify", "--hf", run / "hf", "--checkpoint", run],
        ["verify", "--hf", tmp_path / "out/adapter", "--checkpoint", run],
    ):
        [answer] = pool.run(1, cli.call, ["convert", *map(str, arguments)])
        assert answer.code == 0, answer.out + answer.err
    adapted.save_pretrained(tmp_path / "peft")  # with the base's embedding and head, as PEFT does
    [[again]] = generate(base, ["2 + 2 ="], adapter=tmp_path / "peft", temperature=0.0, max_tokens=8)
    assert again.token_ids == completion.token_ids
