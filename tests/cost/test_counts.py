"""What is counted on paper is what ranks hold and compute: state and activations to the byte, operations to the last.

Ranks run the real model on CPU; nothing here is a tolerance, as nothing is rounded.
"""

from dataclasses import replace

import pytest
import torch

from megatron_align.config import AdapterConfig, ParallelConfig
from megatron_align.cost.activations import interval_bytes, stage_bytes, tables_bytes
from megatron_align.cost.flops import (
    executed_flops,
    forward_flops,
    padded_vocabulary,
)
from megatron_align.cost.placement import Placement
from megatron_align.cost.state import parameter_bytes, parameter_count, state_bytes
from megatron_align.data.batching.attention_cost import visible_keys
from megatron_align.hf.adapter_options import resolve_adapter
from megatron_align.kernels import PackedLayout, packed_attention_reference
from megatron_align.model.families import read_shape
from megatron_align.model.families.frozen import frozen_tensors
from tests.harness import costs
from tests.harness.marks import mark_slow
from tests.harness.pool import Pool
from tests.harness.sizes import CONFIGS, write_config

LENGTHS = [40, 23, 65]
TOKENS = sum(LENGTHS)


def placed(model, options, world_size=1, precision="bf16", recompute=0, reward=False):
    shape, parallel = read_shape(model), ParallelConfig(**options)
    return Placement(
        shape=shape.as_reward() if reward else shape,
        parallel=parallel,
        data=parallel.data_parallel(world_size),
        precision=precision,
        recompute_layers=recompute if isinstance(recompute, int) else 0,
        recompute_modules=() if isinstance(recompute, int) else recompute,
    )


@pytest.mark.parametrize(
    "variant, options, world_size, precision",
    [
        ("qwen2_tied", {}, 1, "bf16"),
        ("qwen2_tied", {}, 2, "bf16"),
        ("qwen2_tied", {"pipeline": 2}, 2, "fp32"),
        ("qwen2_tied", {"tensor": 2, "pipeline": 2}, 4, "bf16"),
        ("qwen3", {"tensor": 2}, 4, "bf16"),
        ("llama3", {"pipeline": 2, "virtual_pipeline": 2}, 4, "bf16"),
        ("llama3", {"tensor": 4}, 4, "fp32"),
        ("llama3", {"pipeline": 2, "first_stage_layers": 1}, 2, "bf16"),
    ],
)
def test_state(pool, tiny_models, variant, options, world_size, precision):
    model = tiny_models(variant)
    placement = placed(model, options, world_size, precision)
    answers = pool.run(world_size, costs.state, model, placement.parallel, precision)
    _compare(placement, answers)


def test_state_of_a_reward_model(pool, tiny_models):
    model = tiny_models("qwen2_tied")
    placement = placed(model, {"pipeline": 2}, 2, reward=True)
    _compare(placement, pool.run(2, costs.state, model, placement.parallel, "bf16", True))


@pytest.mark.parametrize(
    "trained",
    mark_slow(
        ["adapter", "some_layers", "reward", "frozen", "ends", "dora", "pissa", "saved", "saved_tied"],
        ["dora", "saved"],
    ),
)
def test_state_of_what_is_trained(pool, tiny_models, trained):
    """The base of an adapter, and frozen weights, have no gradient and no optimizer state."""
    model, reward = (
        tiny_models("qwen2_untied" if trained in ("ends", "saved") else "qwen2_tied"),
        trained == "reward",
    )
    placement = placed(model, {"tensor": 2, "pipeline": 2}, 4, reward=reward)
    options: dict = {"frozen": frozen_tensors(placement.shape, ["embed_tokens", "layers.0.*", "model.norm"])}
    if trained != "frozen":
        targets = {"some_layers": ["q_proj", "layers.3.mlp.*"], "ends": ["embed_tokens", "lm_head", "o_proj"]}
        own = {"dora": {"dora": True}, "pissa": {"init": "pissa"}}.get(trained, {})
        if trained.startswith("saved"):
            tied = trained == "saved_tied"
            own = {"modules_to_save": ["norm", "embed_tokens", "lm_head"], "ensure_weight_tying": tied}
        adapter = AdapterConfig(rank=3, targets=targets.get(trained, "all-linear"), **own)
        options = {"adapter": resolve_adapter(adapter, placement.shape)}
    placement = replace(placement, **options)
    for found in pool.run(4, costs.state, model, placement.parallel, "bf16", reward, options):
        counted = state_bytes(placement, found["stage"])
        assert found["parameters"] == counted.parameters
        assert found["gradients"] == counted.gradients
        # master and two moments of each trained parameter; the count has the buffers' padding too
        assert found["optimizer"] == 12 * found["trained"] <= counted.optimizer
        assert 0 < found["trained"] < 0.8 * found["plain"] / 2


def _compare(placement, answers):
    for found in answers:
        counted = state_bytes(placement, found["stage"])
        assert found["parameters"] == counted.parameters
        assert found["gradients"] == counted.gradients
        assert found["plain"] == parameter_bytes(placement, found["stage"])
    # The buffers' padding belongs to no weight: with it, a stage's shards are its counted bytes, each at most one.
    for stage in range(placement.parallel.pipeline):
        counted = state_bytes(placement, stage)
        shards = [found["optimizer"] for found in answers if found["stage"] == stage]
        assert max(shards) <= counted.optimizer
        elements = counted.parameters // placement.itemsize
        padding = 1 - parameter_bytes(placement, stage) / counted.parameters
        per_element = counted.optimizer * placement.shard_ranks // elements
        copies = len(shards) // placement.shard_ranks
        assert sum(shards) == copies * round(elements * (1 - padding)) * per_element


@pytest.mark.parametrize(
    "variant, options, precision, recompute",
    [
        ("qwen2_tied", {}, "fp32", 0),
        ("qwen2_tied", {}, "bf16", 0),
        ("qwen2_tied", {"tensor": 2}, "bf16", 0),
        ("qwen2_tied", {"tensor": 2, "sequence": False}, "bf16", 0),
        ("llama3", {"tensor": 4}, "bf16", 0),
        ("qwen3", {}, "fp32", 0),
        ("qwen3", {"tensor": 2}, "bf16", 0),
        ("llama3", {"context": 2, "context_kind": "ulysses"}, "bf16", 0),
        ("qwen2_tied", {"context": 2, "tensor": 2, "context_kind": "ulysses"}, "fp32", 0),
        ("qwen2_tied", {}, "bf16", ("attention",)),
        ("qwen2_tied", {"tensor": 2}, "bf16", ("mlp",)),
        ("llama3", {}, "fp32", ("attention", "mlp")),
        ("qwen3", {}, "bf16", ("attention",)),
        ("qwen2_tied", {}, "bf16", ("norms",)),
        ("llama3", {}, "fp32", ("norms", "mlp")),
        ("qwen2_tied", {}, "bf16", 2),
        ("qwen2_tied", {"tensor": 2}, "fp32", 3),
    ],
)
def test_activations(pool, tiny_models, variant, options, precision, recompute):
    model = tiny_models(variant)
    placement = placed(
        model, options, options.get("tensor", 1) * options.get("context", 1), precision, recompute
    )
    batch = costs.one_pack(LENGTHS, TOKENS)
    found = pool.run(
        placement.world_size, costs.saved, model, placement.parallel, precision, recompute, batch
    )
    held = stage_bytes(placement, 0, TOKENS, 1).held + costs.more_on_cpu(placement, TOKENS)
    # What runs again holds the tables then, not autograd; and on the CPU attention needs no intervals.
    again = placement.runs_again("attention")
    assert set(found) == {held - (tables_bytes if again else interval_bytes)(placement, TOKENS)}


def test_activations_of_dora(pool, tiny_models):
    """They are an upper bound, and the outputs that DoRA saves are counted: nearly what a run saves more than LoRA."""
    model, batch = tiny_models("llama3"), costs.one_pack(LENGTHS, TOKENS)
    found, counted = {}, {}
    for dora in (False, True):
        placement = placed(model, {})
        adapter = resolve_adapter(AdapterConfig(rank=3, dora=dora), placement.shape)
        placement = replace(placement, adapter=adapter)
        [found[dora]] = pool.run(1, costs.saved, model, placement.parallel, "bf16", 0, batch, adapter)
        # A frozen norm saves less on a CPU than one that is trained.
        counted[dora] = stage_bytes(placement, 0, TOKENS, 1).held + costs.more_on_cpu(placement, TOKENS)
        assert found[dora] <= counted[dora]
    more = counted[True] - counted[False]
    assert more == pytest.approx(found[True] - found[False], rel=0.05)


@pytest.mark.parametrize(
    "options, recompute", [({}, 0), ({}, 2), ({"tensor": 2}, 0), ({}, ("attention", "mlp"))]
)
def test_operations(pool, tiny_models, options, recompute):
    model = tiny_models("qwen2_untied")
    placement = placed(model, options, options.get("tensor", 1), "fp32", recompute)
    batch = costs.one_pack(LENGTHS, TOKENS, prompts=[11, 5, 30])
    scored = TOKENS - 11 - 5 - 30
    counts = pool.run(placement.world_size, costs.counted_flops, model, placement.parallel, recompute, batch)
    squares = sum(length**2 for length in LENGTHS)  # the CPU's attention computes what is masked
    forward = forward_flops(placement.shape, TOKENS, squares, scored, vocabulary=padded_vocabulary(placement))
    assert sum(count[0] for count in counts) == forward.total
    assert sum(count[1] for count in counts) == executed_flops(placement, forward)


def test_weights_of_known_models(tmp_path):
    """transformers builds the models on the meta device and counts."""
    from transformers import AutoModelForCausalLM

    for name in ("qwen2_0_5b", "llama3_70b"):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(CONFIGS[name]())
        shape = read_shape(write_config(tmp_path / name, name))
        assert parameter_count(shape) == sum(p.numel() for p in model.parameters())


def test_visible_keys():
    """Attention without preference spreads a token's weight over all that it sees, and over nothing else."""
    groups = [(5, [3, 2]), (0, [7]), (4, [1, 1, 6])]
    shared = PackedLayout.from_groups(groups)
    assert _seen(shared) == sum(visible_keys([prompt], [len(own)], own)[0] for prompt, own in groups)
    assert _seen(PackedLayout.from_lengths([8, 7])) == visible_keys([5], [2], [3, 2], shared=False)[0]


def _seen(layout):
    q_THD = torch.zeros(layout.tokens, 1, layout.tokens)
    values_THD = torch.eye(layout.tokens)[:, None]
    return packed_attention_reference(q_THD, q_THD, values_THD, layout).count_nonzero().item()


@pytest.mark.slow
def test_activations_with_the_kernels_attention(tiny_models, monkeypatch):
    """What a GPU keeps: the kernels run in Triton's interpreter, in a process that was started for it."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    kernels = Pool(forked=False)
    batch = costs.one_pack(LENGTHS, TOKENS)
    gather, swap = ({"context": 2, "context_kind": kind} for kind in ("allgather", "ulysses"))
    cases = [
        ("qwen2_tied", {}),
        ("qwen3", {}),
        ("qwen2_tied", gather),
        ("qwen3", gather),
        ("qwen2_tied", swap),
    ]
    try:
        for variant, options in cases:
            model = tiny_models(variant)
            ranks = options.get("context", 1)
            placement = placed(model, options, ranks, "fp32")
            found = kernels.run(ranks, costs.saved, model, placement.parallel, "fp32", 0, batch, timeout=500)
            assert set(found) == {stage_bytes(placement, 0, TOKENS, 1).held}
    finally:
        kernels.stop()
