"""Every term of the planner's memory and traffic, by hand on a tiny shape; traffic between stages and data ranks too.

Terms are those that the classes declare: one that is added fails here until it has a number.
"""

from dataclasses import asdict, fields, replace

import pytest

from megatron_align.config import ParallelConfig
from megatron_align.cost.activations import layer_bytes, stage_bytes, tables_bytes
from megatron_align.cost.head import OF_ROW
from megatron_align.cost.memory import CONTEXT, StageMemory, stage_memory
from megatron_align.cost.online import BATCH_TOKENS, OnlineCosts, RewardModelCost
from megatron_align.cost.placement import Placement
from megatron_align.cost.search import memory_of
from megatron_align.cost.state import StateBytes, state_bytes
from megatron_align.cost.traffic import Traffic, traffic
from megatron_align.model.families import read_shape
from megatron_align.model.tied_embedding import EMBEDDING
from megatron_align.objectives.configuration import parse
from tests.harness import costs
from tests.harness.tiny import run_arguments

TOKENS = 128
H, FFN, HEAD = 64, 96, 8  # hidden, MLP and head sizes; 8 heads, 2 key/value heads
VOCABULARY = 384 // 2  # 301 tokens, padded to a multiple of 128, on two tensor ranks
QKV = (8 + 2 * 2) * HEAD // 2  # columns on a tensor rank
LAYER = QKV * H + QKV + H * 8 * HEAD // 2 + 3 * H * FFN // 2 + 2 * H  # with biases and two norms
PADDING = 64 - QKV  # of a layer's biases, in a buffer of tensors that start at multiples of 64
STAGES = (2 * LAYER + VOCABULARY * H, 2 * LAYER + H + VOCABULARY * H)  # embedding; final norm and head
BUFFERS = tuple(-(-(size + 2 * PADDING) // 128) * 128 for size in STAGES)
BF16, FP32 = 2, 4


@pytest.fixture
def placement(tiny_models):
    """Two tensor ranks and two stages of two layers, in bf16."""
    shape = read_shape(tiny_models("qwen2_untied"))
    return Placement(shape=shape, parallel=ParallelConfig(tensor=2, pipeline=2), data=1, precision="bf16")


@pytest.mark.parametrize("stage", [0, 1])
def test_memory(placement, stage):
    layer = 3 * BF16 * TOKENS * FFN // 2 + BF16 * 2 * FFN // 2 * H + BF16 * TOKENS * H
    hidden = 3 * BF16 * TOKENS * H + OF_ROW * TOKENS
    # The final norm's output, and the micro-batch before: what was received, and its gradient.
    kept = 3 * BF16 * TOKENS // 2 * H
    head = hidden + kept + TOKENS * VOCABULARY * BF16
    held = stage_bytes(placement, stage, TOKENS, 2).held  # measured in test_counts.py
    expected = {
        "parameters": BUFFERS[stage] * BF16,
        "gradients": BUFFERS[stage] * FP32,
        "optimizer": BUFFERS[stage] * 3 * FP32,
        "reference": 0,
        "activations": held + (3 - stage) * TOKENS * (2 * 8 + 3 * 8 + 4 + 1 + 6 * 4),  # packs, one ahead
        "temporary": max(layer, head) if stage else layer,
        "communication": TOKENS * H * BF16,
        "rewards": 0,
        "engine": 0,
        "critic": 0,
    }
    found = stage_memory(placement, stage, TOKENS, 2)
    assert asdict(found) == expected
    live = stage_memory(placement, stage, TOKENS, 2, live_reference=True)
    assert asdict(live) == {**expected, "reference": STAGES[stage] * BF16}  # a second model
    if stage:  # tokens, indices, the reference's logits, those in fp32, the policy's, their gradient
        likeliest = stage_memory(placement, stage, TOKENS, 2, top_k=90)
        assert likeliest.temporary == head + TOKENS * 90 * (4 + 8 + BF16 + 3 * FP32)
        again = replace(placement, recompute_layers=1)  # a checkpoint keeps the pack before, and its tables
        kept = TOKENS * (2 * 8 + 3 * 8 + 4 + 1 + 6 * 4) + tables_bytes(placement, TOKENS)
        assert stage_memory(again, stage, TOKENS, 2, top_k=90).temporary == likeliest.temporary + kept
    alone = replace(placement, parallel=ParallelConfig(tensor=2, pipeline=2, sequence=False))
    assert stage_memory(alone, stage, TOKENS, 2).communication == 0  # nothing is gathered


def test_a_tied_weight_of_one_stage_waits_for_its_last_gradient(tiny_models):
    """Rehearsals peak there: see tests/rehearsal."""
    tied, untied = (read_shape(tiny_models(variant)) for variant in ("llama32_tied", "llama3"))
    weight = 384 * H * BF16
    layer = 3 * BF16 * FFN + BF16 * 2 * FFN * H  # of one token
    for shape, stands in ((tied, True), (untied, False)):
        one = Placement(shape=shape, parallel=ParallelConfig(), data=1, precision="bf16")
        found, held = stage_memory(one, 0, 1, 1), stage_bytes(one, 0, 1, 1).held
        hidden = 2 * BF16 * H + OF_ROW
        expected = (
            max(layer + weight, 3 * weight + BF16 * H - held)
            if stands
            else max(layer, hidden + BF16 * H + weight)
        )
        assert found.temporary == expected


def test_the_embeddings_gradient_is_the_peak_of_a_stage_of_few_layers(tiny_models):
    """At the end of its micro-batch's backward, with those of the others in flight: see tests/rehearsal."""
    shape = read_shape(tiny_models("llama3"))
    chunks = ParallelConfig(pipeline=2, virtual_pipeline=2)
    one = Placement(shape=shape, parallel=chunks, data=1, precision="bf16")
    found = stage_memory(one, 0, 1, 4).temporary
    assert found == 384 * H * BF16 + 3 * H * BF16 - layer_bytes(one, 1)
    frozen = replace(one, frozen=frozenset({EMBEDDING}))
    assert stage_memory(frozen, 0, 1, 4).temporary < found


def test_every_term_is_in_the_total():
    for kind in (StageMemory, StateBytes):
        sizes = {field.name: 1 << 10 * i for i, field in enumerate(fields(kind))}
        one = kind(**sizes)
        assert (one.tensors if kind is StageMemory else one.total) == sum(sizes.values())
    assert StageMemory(**sizes_of(StageMemory, 1000)).total == CONTEXT + round(
        1000 * len(fields(StageMemory)) * 1.05
    )


def sizes_of(kind, size):
    return dict.fromkeys((field.name for field in fields(kind)), size)


def test_further_models_are_counted_where_a_run_has_them(placement, tmp_path):
    options = {"objective__beta": 0.1, "rewards": "[{kind: length, max: 3}]", "rollout__max_tokens": 8}
    run, dpo = {}, {"objective__name": "dpo"}
    judge = RewardModelCost("judge", placement.shape, "bf16")
    for name, more in (
        ("cached", dpo),
        ("live", {**dpo, "reference__mode": "live"}),
        ("grpo", {**options, "objective__name": "grpo", "reference__mode": "live"}),
        ("ppo", {**options, "objective__name": "ppo", "reference__mode": "live"}),
    ):
        config = parse(run_arguments("model", "data.jsonl", tmp_path, **more))
        run[name] = memory_of(config, placement, 2, OnlineCosts((judge, judge)) if name == "grpo" else None)
    layer = 2 * QKV * (H + 1) + 8 * HEAD * H + 3 * H * FFN + 2 * H  # of the engine's, which is on one rank
    model = 4 * layer + H + 2 * 301 * H
    engine = (model + 2 * 4 * 2 * HEAD * BATCH_TOKENS) * BF16  # and keys and values of four layers
    for stage in (0, 1):
        second = STAGES[stage] * BF16
        assert run["live"][stage].tensors - run["cached"][stage].tensors == second
        critic = state_bytes(replace(placement, shape=placement.shape.as_reward()), stage).total
        found = {
            name: (each[stage].reference, each[stage].rewards, each[stage].engine, each[stage].critic)
            for name, each in run.items()
        }
        assert found == {
            "cached": (0, 0, 0, 0),
            "live": (second, 0, 0, 0),
            "grpo": (second, 2 * second, engine, 0),
            "ppo": (second, 0, engine, critic),
        }


def test_traffic(placement):
    half = BF16 * TOKENS * H // 2  # what a rank of two sends to gather a pack's hidden states
    expected = {"tensor": (4 + 6) * half, "context": 0, "pipeline": BF16 * TOKENS * H // 2, "data": 0}
    assert asdict(traffic(placement, TOKENS)) == expected
    both = replace(placement, data=2)
    expected["data"] = max(BUFFERS) * (FP32 + BF16) // 2
    assert asdict(traffic(both, TOKENS)) == expected
    chunks = replace(both, parallel=ParallelConfig(tensor=2, pipeline=2, virtual_pipeline=2))
    assert traffic(chunks, TOKENS).pipeline == 2 * expected["pipeline"]
    one = replace(placement, parallel=ParallelConfig())
    assert asdict(traffic(one, TOKENS)) == sizes_of(Traffic, 0)
    gathers = replace(one, parallel=ParallelConfig(context=2))
    assert traffic(gathers, TOKENS).context > 0  # counted in tests/model/test_context_kind.py


@pytest.mark.parametrize("layout", [{"parallel__pipeline": 2}, {}], ids=["stages", "data"])
def test_bytes_between_stages_and_data_ranks(pool, tiny_models, chat_file, tmp_path, layout):
    """Counted as they are sent in a step of a run."""
    arguments = run_arguments(tiny_models("qwen2_untied"), chat_file, tmp_path / "run", **layout)
    config = parse(arguments)
    placement = Placement.of_run(config, read_shape(tiny_models("qwen2_untied")), 2)
    for stages, data, packs in pool.run(2, costs.sent_in_a_step, arguments):
        [tokens] = set(packs)
        counted = traffic(placement, tokens)
        assert stages == len(packs) * counted.pipeline
        assert data == counted.data
        assert (stages > 0, data > 0) == (bool(layout), not layout)
