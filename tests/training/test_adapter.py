"""Law 10 on layouts: an adapter has the same losses, gradients and weights on every one; its base never changes.

Also law 4 for adapters: a resumed run writes the very rows of the uninterrupted one.
"""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from megatron_align.checkpoint.torch_metadata import read_stored_tensors
from megatron_align.errors import InputError
from megatron_align.model.parallel import RankInfo
from megatron_align.objectives.configuration import parse
from megatron_align.training.setup import prepare_run
from tests.harness import training_ranks
from tests.harness.marks import mark_slow
from tests.harness.pool import RankFailed
from tests.harness.tiny import (
    change_tensors,
    make_adapter,
    make_model,
    metrics_of,
    numbers,
    run_arguments,
    write_pairs,
)

ALONE = RankInfo(rank=0, local_rank=0, world_size=1)
# Law 1's tolerance: fp32 sums in another order (7e-8 measured).
LAYOUT = 1e-5
ADAPTER = {"model__adapter": "{rank: 3, alpha: 6}", "optimizer__lr": 1e-2}
WEIGHTS = "adapter/adapter_model.safetensors"
# Rank 3 is divided by no number of ranks. On 4 tensor ranks two share a key/value head, so their rows of B differ.
SHORT = {**ADAPTER, "train__steps": 3}  # at the second the optimizer's moments are no longer 0
LAYOUTS = {
    "tp4": (4, {"parallel__tensor": 4, "parallel__sequence": False}),
    "tp4_sp": (4, {"parallel__tensor": 4}),
    "tp2_sp_pp2": (4, {"parallel__tensor": 2, "parallel__pipeline": 2}),
    "ulysses2_tp2": (
        4,
        {
            "parallel__context": 2,
            "parallel__context_kind": "ulysses",
            "parallel__tensor": 2,
            "parallel__sequence": False,
        },
    ),
    "vpp2_recompute": (
        2,
        {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2, "train__recompute_layers": 1},
    ),
    "allgather2_dp2": (4, {"parallel__context": 2, "parallel__context_kind": "allgather"}),
    "dp2_overlap": (2, {"parallel__overlap_grad_reduce": True, "parallel__overlap_param_gather": True}),
    "recompute_modules": (1, {"train__recompute_modules": "[attention, mlp, norms]"}),
}


@pytest.fixture(scope="module")
def one_rank(pool, tiny_models, chat_file, tmp_path_factory):
    run = tmp_path_factory.mktemp("one")
    pool.run(1, training_ranks.train, run_arguments(tiny_models(), chat_file, run, **SHORT))
    return run


# Of 4 tensor ranks the gradients are compared below.
@pytest.mark.parametrize("layout", mark_slow(LAYOUTS, ["tp4", "tp4_sp", "allgather2_dp2"]))
def test_layouts_agree(layout, pool, tiny_models, chat_file, tmp_path, one_rank):
    world, options = LAYOUTS[layout]
    pool.run(
        world, training_ranks.train, run_arguments(tiny_models(), chat_file, tmp_path, **SHORT, **options)
    )
    for row, same in zip(metrics_of(tmp_path), metrics_of(one_rank), strict=True):
        assert row["loss"] == pytest.approx(same["loss"], rel=LAYOUT)
        assert row["grad_norm"] == pytest.approx(same["grad_norm"], rel=LAYOUT)
    found, wanted = load_file(tmp_path / WEIGHTS), load_file(one_rank / WEIGHTS)
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        # Rounding of sums in another order, and what Adam makes of gradients that are nearly 0 (1e-5 measured).
        assert (found[name] - want).norm() <= 1e-4 * want.norm(), name


@pytest.fixture(scope="module")
def gradients(pool, tiny_models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gradients")
    pairs = write_pairs(folder / "pairs.jsonl")
    adapters = {}

    def run(world=1, model=None, **layout):
        model = model or tiny_models()
        if model not in adapters:
            adapters[model] = make_adapter(folder / f"start_{len(adapters)}", model)
        run = tmp_path_factory.mktemp("run")
        options = {"objective__name": "dpo", "reference__mode": "none"}
        options["model__adapter"] = f"{{path: {adapters[model]}}}"
        arguments = run_arguments(model, pairs, run, **options, **layout)
        pool.run(world, training_ranks.gradients, arguments, run / "adapter")
        return load_file(run / WEIGHTS)

    return run


@pytest.fixture(scope="module")
def gradients_of_one_rank(gradients):
    return gradients()


@pytest.mark.parametrize(
    "layout", mark_slow(["tp4", "tp4_sp", "tp2_sp_pp2", "ulysses2_tp2"], ["tp2_sp_pp2", "ulysses2_tp2"])
)
def test_every_gradient_is_that_of_one_rank(layout, gradients, gradients_of_one_rank):
    """What must be summed over tensor, sequence and context ranks is, in every A and every B."""
    world, options = LAYOUTS[layout]
    assert_same_gradients(gradients(world, **options), gradients_of_one_rank)


def test_one_key_value_head_belongs_to_one_of_two_ranks(gradients, tmp_path):
    """The other rank has no row of k and v, and yet sums their gradients with it."""
    model = make_model(tmp_path / "model", num_key_value_heads=1)
    assert_same_gradients(gradients(2, model, parallel__tensor=2), gradients(1, model))


def assert_same_gradients(found, wanted):
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        assert want.norm() > 0, name
        # fp32 sums in another order: rounding of each element, measured against its tensor.
        assert (found[name] - want).norm() <= 1e-5 * want.norm(), name


def test_the_reference_of_a_new_adapter_is_the_policy_itself(pool, tiny_models, tmp_path):
    """B is 0 at first, so the model is its base, bit for bit; a live reference needs no second model."""
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    runs = {}
    for mode in ("cached", "live"):
        runs[mode] = tmp_path / mode
        options = {"objective__name": "dpo", "reference__mode": mode, **SHORT}
        pool.run(1, training_ranks.train, run_arguments(tiny_models(), pairs, runs[mode], **options))
    rows = metrics_of(runs["cached"])
    assert (rows[0]["chosen_reward"], rows[0]["rejected_reward"]) == (0, 0)
    assert rows[-1]["reward_margin"] > 0.01
    assert numbers(runs["live"]) == numbers(runs["cached"])


@pytest.mark.parametrize(
    "layout",
    [
        {},
        pytest.param({"parallel__tensor": 2, "train__precision": "bf16"}, marks=pytest.mark.slow),
    ],
    ids=["one", "tp2_bf16"],
)
def test_resumed_rows_are_bit_identical(layout, pool, tiny_models, chat_file, tmp_path):
    options = {"checkpoint__save_every": 2, "checkpoint__keep": 9, **SHORT, **layout}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    world = layout.get("parallel__tensor", 1)
    base = {path: path.read_bytes() for path in tiny_models().iterdir()}
    pool.run(world, training_ranks.train, run_arguments(tiny_models(), chat_file, whole, **options))
    shutil.copytree(whole, cut)
    for path in ("step_000003", "adapter"):
        shutil.rmtree(cut / path)
    pool.run(world, training_ranks.train, run_arguments(tiny_models(), chat_file, cut, **options))
    assert numbers(cut) == numbers(whole)
    found, wanted = load_file(cut / WEIGHTS), load_file(whole / WEIGHTS)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert {path: path.read_bytes() for path in tiny_models().iterdir()} == base


def test_a_checkpoint_holds_the_adapter_and_resumes_on_another_layout(pool, tiny_models, chat_file, tmp_path):
    options = {"checkpoint__save_every": 1, "checkpoint__keep": 9, **SHORT}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    pool.run(1, training_ranks.train, run_arguments(tiny_models(), chat_file, whole, **options))
    stored = read_stored_tensors(whole / "step_000001" / "state")
    assert len(stored) == 4 * 7 * 2 * (1 + 3)  # layers x modules x (A, B) x (weight; master, two moments)
    assert all(".adapter." in name for name in stored)
    shutil.copytree(whole, cut)
    for path in ("step_000002", "step_000003"):
        shutil.rmtree(cut / path)
    layout = {"parallel__tensor": 2}
    pool.run(2, training_ranks.train, run_arguments(tiny_models(), chat_file, cut, **options, **layout))
    for got, want in zip(metrics_of(cut), metrics_of(whole), strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=LAYOUT)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=LAYOUT)


def test_a_resumed_adapter_needs_its_base_and_options(pool, chat_file, tmp_path):
    model, run = make_model(tmp_path / "model"), tmp_path / "run"
    pool.run(1, training_ranks.train, run_arguments(model, chat_file, run, train__steps=1, **ADAPTER))
    for options in ({}, {"model__adapter": "{rank: 4, alpha: 6}"}):
        arguments = run_arguments(model, chat_file, run, **{"train__steps": 2, **options})
        with pytest.raises(InputError, match=r"model\.adapter was .*'rank': 3.* and is"):
            prepare_run(parse(arguments), ALONE)
    for path in (run, run / "step_000001"):
        with pytest.raises(InputError, match=r"holds an adapter only, of .*adapter/ the adapter for"):
            prepare_run(parse(run_arguments(path, chat_file, tmp_path / "other")), ALONE)
    change_tensors(model, lambda tensors: tensors["model.norm.weight"].mul_(2))
    with pytest.raises(RankFailed, match=r"the base has changed: .*sha256 \w+, those in .* have \w+; give"):
        pool.run(1, training_ranks.train, run_arguments(model, chat_file, run, train__steps=2, **ADAPTER))


def test_only_some_layers_on_two_stages(pool, tiny_models, chat_file, tmp_path):
    """The second stage trains nothing then, and the first must still receive its gradients."""
    options = {**SHORT, "model__adapter": "{rank: 3, alpha: 6, targets: [layers.0.self_attn.q_proj]}"}
    for name, layout in (("one", {}), ("two", {"parallel__pipeline": 2})):
        arguments = run_arguments(tiny_models(), chat_file, tmp_path / name, **options, **layout)
        pool.run(2 if layout else 1, training_ranks.train, arguments)
    for got, want in zip(metrics_of(tmp_path / "two"), metrics_of(tmp_path / "one"), strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=LAYOUT)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=LAYOUT)
    tensors = load_file(tmp_path / "two" / WEIGHTS)
    assert len(tensors) == 2
    assert all(tensor.abs().max() > 0 for tensor in tensors.values())
