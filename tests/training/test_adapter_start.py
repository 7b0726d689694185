"""Law 10 for adapters that start as PiSSA: PEFT's losses, one rank's numbers on every layout, PEFT's conversion.

Training holds the base without what A and B started with; everything that is written is of the unchanged base.
"""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from megatron_align.convert.export_adapter import export_adapter
from megatron_align.convert.verify_adapter import verify_adapter
from megatron_align.errors import InputError
from megatron_align.merge.adapter import merge_adapter
from megatron_align.model.adapter_start import principal_factors
from megatron_align.model.parallel import RankInfo
from megatron_align.objectives.configuration import parse
from megatron_align.training.setup import prepare_run
from tests.harness import training_ranks
from tests.harness.marks import mark_slow
from tests.harness.peft import load
from tests.harness.tiny import make_model, metrics_of, numbers, run_arguments, write_pairs
from tests.harness.trl import BATCH, LENGTH, STEPS, trl_rows

ALONE = RankInfo(rank=0, local_rank=0, world_size=1)
PISSA = {"model__adapter": "{rank: 3, alpha: 6, init: pissa}", "optimizer__lr": 3e-3, "train__steps": 3}
WEIGHTS = "adapter/adapter_model.safetensors"
LAYOUTS = {
    "one": (1, {}),
    "tp4": (4, {"parallel__tensor": 4, "parallel__sequence": False}),
    "dp2_vpp2": (4, {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2}),
}
TP2_PP2 = {"parallel__tensor": 2, "parallel__pipeline": 2}


@pytest.mark.slow  # the start is held against PEFT's code in the fast tests
def test_ten_steps_equal_trl_with_peft_and_its_pissa(pool, tiny_models, tmp_path):
    """Nothing is handed over: both decompose the same weights. Signs are free, and Adam does not see them."""
    from peft import LoraConfig

    data = write_pairs(tmp_path / "data.jsonl", samples=STEPS * BATCH)
    records = [json.loads(line) for line in data.read_text().splitlines()]
    records = [{"prompt": record["prompt"], "completion": record["chosen"]} for record in records]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = LoraConfig(
        r=3, lora_alpha=6, target_modules="all-linear", init_lora_weights="pissa", task_type="CAUSAL_LM"
    )
    arguments = run_arguments(
        tiny_models(),
        data,
        tmp_path / "ours",
        data__sequence_length=LENGTH,
        data__shuffle=False,
        train__global_batch_size=BATCH,
        **{**PISSA, "train__steps": STEPS},
        **TP2_PP2,
    )
    pool.run(4, training_ranks.train, arguments)
    ours = [row["loss"] for row in metrics_of(tmp_path / "ours")]
    theirs = trl_rows(
        "trl", "SFT", tiny_models(), records, tmp_path / "trl", adapter=config, learning_rate=3e-3
    )
    assert ours == pytest.approx([row["loss"] for row in theirs], rel=1e-4)
    assert max(ours) - min(ours) > 1e-2


@pytest.fixture(scope="module")
def trained(pool, tiny_models, chat_file, tmp_path_factory):
    """A run on four ranks, and the bytes of its base before it."""
    run = tmp_path_factory.mktemp("trained") / "run"
    base = {path: path.read_bytes() for path in tiny_models().iterdir()}
    options = {"checkpoint__save_every": 2, "checkpoint__keep": 9, "checkpoint__export_hf": True}
    pool.run(
        4, training_ranks.train, run_arguments(tiny_models(), chat_file, run, **PISSA, **TP2_PP2, **options)
    )
    return run, base


def test_what_a_run_writes_is_of_the_unchanged_base(trained, tiny_models, tmp_path):
    """PEFT on the base, hf/, a merged folder and an exported checkpoint all compute what was trained."""
    from peft import PeftModel

    run, base = trained
    assert {path: path.read_bytes() for path in tiny_models().iterdir()} == base
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (6, 12, True)
    adapted = PeftModel.from_pretrained(load(tiny_models()), run / "adapter").eval()
    tokens = torch.randint(3, 259, (2, 40), generator=torch.Generator().manual_seed(0))
    merge_adapter(tiny_models(), run / "adapter", tmp_path / "merged")
    export_adapter(run / "step_000003", tmp_path / "exported")
    with torch.no_grad():
        logits = adapted(tokens).logits
        for folder in (run / "hf", tmp_path / "merged", tmp_path / "exported" / "hf"):
            # Logits of size 2. The base is rounded once more without the start (1e-6 measured).
            assert (logits - load(folder)(tokens).logits).abs().max() < 1e-5
        assert (logits - load(tiny_models())(tokens).logits).abs().max() > 1e-2
    for name, tensor in load_file(tmp_path / "exported" / WEIGHTS).items():
        assert torch.equal(tensor, load_file(run / WEIGHTS)[name])
    for folder in (run / "adapter", run / "hf"):
        findings = verify_adapter(folder, run / "step_000003")
        assert findings.equal, findings.lines()
        assert findings.logits


@pytest.mark.parametrize("layout", mark_slow(["same", "other"], ["other"]))
def test_a_resumed_run_is_bit_identical(layout, trained, pool, tiny_models, chat_file, tmp_path):
    """Checkpoints hold what A and B started with: the base is not decomposed again. Another layout agrees by law 1."""
    run, _ = trained
    cut = tmp_path / "cut"
    shutil.copytree(run, cut)
    for path in ("step_000003", "adapter", "hf"):
        shutil.rmtree(cut / path)
    options = {"checkpoint__save_every": 2, "checkpoint__keep": 9}
    world, own = (4, TP2_PP2) if layout == "same" else LAYOUTS["one"]
    arguments = run_arguments(tiny_models(), chat_file, cut, **PISSA, **own, **options)
    pool.run(world, training_ranks.train, arguments)
    found, wanted = load_file(cut / WEIGHTS), load_file(run / WEIGHTS)
    if layout == "same":
        assert numbers(cut) == numbers(run)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        return
    for row, same in zip(metrics_of(cut), metrics_of(run), strict=True):
        assert row["loss"] == pytest.approx(same["loss"], rel=1e-5)
    assert all((found[name] - want).norm() <= 1e-4 * want.norm() for name, want in wanted.items())


@pytest.mark.parametrize("layout", mark_slow(LAYOUTS, ["tp4", "dp2_vpp2"]))
def test_layouts_agree(layout, trained, pool, tiny_models, chat_file, tmp_path):
    world, options = LAYOUTS[layout]
    pool.run(
        world, training_ranks.train, run_arguments(tiny_models(), chat_file, tmp_path, **PISSA, **options)
    )
    for row, same in zip(metrics_of(tmp_path), metrics_of(trained[0]), strict=True):
        assert row["loss"] == pytest.approx(same["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(same["grad_norm"], rel=1e-5)
    found, wanted = load_file(tmp_path / WEIGHTS), load_file(trained[0] / WEIGHTS)
    for name, want in wanted.items():
        assert (found[name] - want).norm() <= 1e-4 * want.norm(), name


def test_the_reference_is_the_unchanged_base(pool, tiny_models, tmp_path):
    """Live: the reduced base with what A and B started with; cached: the base itself. Not the reduced base."""
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    rows = {}
    for mode in ("cached", "live"):
        options = {"objective__name": "dpo", "reference__mode": mode, **PISSA}
        pool.run(1, training_ranks.train, run_arguments(tiny_models(), pairs, tmp_path / mode, **options))
        rows[mode] = metrics_of(tmp_path / mode)
    # Not 0, as BLAS may sum in another order where a matrix lies elsewhere in memory.
    assert abs(rows["live"][0]["reward_margin"]) < 1e-5
    # Sums of 30 log-probs of a base that is rounded once more.
    assert rows["cached"][0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows["live"][-1]["reward_margin"] > 0.01
    for live, cached in zip(rows["live"], rows["cached"], strict=True):
        assert live["loss"] == pytest.approx(cached["loss"], rel=1e-4)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_8"])
def test_the_start_is_the_nearest_matrix(init):
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 4, generator=draw) @ torch.randn(4, 24, generator=draw)
    weight += 1e-3 * torch.randn(40, 24, generator=draw)
    a, b = principal_factors(weight, 4, 2.5, init)
    u, s, vh = torch.linalg.svd(weight.double())
    nearest = (u[:, :4] * s[:4]) @ vh[:4]
    assert (2.5 * b @ a - nearest).norm() <= 1e-5 * nearest.norm()
    assert torch.allclose(a.norm(dim=1), b.norm(dim=0), rtol=1e-5)  # the root of each value on either side
    assert (a.gather(1, a.abs().argmax(1, keepdim=True)) > 0).all()
    again = principal_factors(weight, 4, 2.5, init)
    assert torch.equal(a, again[0])
    assert torch.equal(b, again[1])


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("{init: olora}", r"init must be default, pissa or pissa_niter_N, got 'olora'"),
        ("{init: pissa, path: somewhere}", r"init must be left out with path"),
        ("{init: pissa, rank: 17}", r"rank must be at most 16 with .*init pissa, .*k_proj, got 17"),
        (
            "{init: pissa, targets: [embed_tokens]}",
            r"init pissa is of linear layers, as in PEFT, got embed_tokens",
        ),
    ],
)
def test_what_it_cannot_be_is_refused(options, line, chat_file, tmp_path):
    model = make_model(tmp_path / "model", "qwen2_untied")
    with pytest.raises(InputError, match=line):
        prepare_run(parse(run_arguments(model, chat_file, tmp_path / "run", model__adapter=options)), ALONE)
