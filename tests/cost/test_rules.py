"""The rules behind the counts are those of the code that runs: schedules, slabs, passes ahead, collectives."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches

from megatron_align.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    ReferenceConfig,
    RunConfig,
    TrainConfig,
)
from megatron_align.cost.chips import CHIPS
from megatron_align.cost.head import slab_bytes
from megatron_align.cost.placement import Placement
from megatron_align.cost.search import memory_of
from megatron_align.cost.state import state_bytes
from megatron_align.cost.time import step_time
from megatron_align.cost.traffic import traffic
from megatron_align.cost.work import Work, flops_of, full_packs, of_store, scoring_passes, step_flops
from megatron_align.data.batching.packing import PackOptions
from megatron_align.data.batching.sampler import step_order
from megatron_align.data.batching.step_batches import DataRank, StepBatches
from megatron_align.data.store import TokenStore
from megatron_align.data.tokenize.cache_key import StoreSpec
from megatron_align.data.tokenize.prepare import prepare
from megatron_align.kernels import slab_rows
from megatron_align.kernels.token_logprobs import slab
from megatron_align.model.families import read_shape
from megatron_align.objectives.configuration import parse
from megatron_align.objectives.sft import SFTOptions
from tests.harness import costs
from tests.harness.sizes import write_config
from tests.harness.tiny import make_model, run_arguments, write_chat, write_pairs


def placed(model, data=1, precision="bf16", recompute=0, **options):
    return Placement(
        shape=read_shape(model),
        parallel=ParallelConfig(**options),
        data=data,
        precision=precision,
        recompute_layers=recompute if isinstance(recompute, int) else 0,
        recompute_modules=() if isinstance(recompute, int) else recompute,
    )


@pytest.fixture(scope="module")
def seven(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("seven"), "qwen2_7b")


@pytest.mark.parametrize("stages, chunks", [(1, 1), (2, 1), (4, 1), (2, 2), (4, 7), (7, 4)])
@pytest.mark.parametrize("micro_batches", [1, 2, 4, 64])
def test_in_flight_is_what_megatron_core_schedules(seven, stages, chunks, micro_batches):
    placement = placed(seven, pipeline=stages, virtual_pipeline=chunks if chunks > 1 else None)
    for stage in range(stages):
        ranks = SimpleNamespace(size=lambda: stages, rank=lambda stage=stage: stage)
        sender = SimpleNamespace(
            pp_group=ranks, virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None
        )
        total, _, warm_up, left = get_pp_rank_microbatches(
            micro_batches, chunks, stages, p2p_communicator=sender
        )
        if stages == 1:  # without a pipeline each forward is followed by its backward
            warm_up, left = 0, total
        assert placement.in_flight(stage, micro_batches) == warm_up + (left > 0)


@pytest.mark.parametrize("rows", [5, 10**6])
@pytest.mark.parametrize("tensor, precision", [(1, "bf16"), (4, "fp32")])
def test_a_slab_is_as_long_as_the_engine_makes_it(seven, monkeypatch, tensor, precision, rows):
    placement = placed(seven, tensor=tensor, precision=precision)
    monkeypatch.setitem(slab.SLAB_BYTES, "cpu", slab.SLAB_BYTES["cuda"])
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    weight_VH = torch.empty(152064 // tensor, 1, dtype=dtype)
    expected = min(slab_rows(weight_VH), rows) * weight_VH.shape[0] * dtype.itemsize
    assert slab_bytes(placement, rows) == expected


def run_of(objective, reference=None):
    return RunConfig(
        model=ModelConfig(path="m"),
        data=DataConfig(train="d", sequence_length=1024),
        objective=objective,
        reference=reference or ReferenceConfig(),
        train=TrainConfig(steps=1),
        checkpoint=CheckpointConfig(dir="c"),
    )


@pytest.mark.parametrize(
    "options, recompute",
    [
        ({"tensor": 2}, 0),
        ({"tensor": 2, "sequence": False}, 0),
        ({"tensor": 4}, 2),
        ({"tensor": 2}, ("mlp",)),
    ],
)
def test_bytes_of_tensor_parallel_collectives(pool, tmp_path, options, recompute):
    """Counted as they are called; two depths, so that what is not of a layer falls out."""
    config = ParallelConfig(**options)
    batch = costs.one_pack([60, 68], 128)
    sent = []
    for layers in (2, 4):
        model = make_model(tmp_path / str(layers), num_hidden_layers=layers)
        sent.append(pool.run(config.tensor, costs.sent_bytes, model, config, recompute, batch)[0])
    placement = placed(model, precision="fp32", recompute=recompute, **options)
    assert (sent[1] - sent[0]) / 2 == traffic(placement, 128).tensor


def test_time_follows_from_operations_and_bytes(seven):
    config = run_of(SFTOptions())
    placement = placed(seven, data=2, tensor=4)
    [work] = full_packs(config)(placement)
    chip = CHIPS["h100"]
    once, twice = (step_time(placement, work, chip, efficiency=share) for share in (0.4, 0.8))
    run = step_flops(placement, work, 0).executed
    assert once.compute == pytest.approx(
        run / (8 * chip.bf16 * 0.4), rel=1e-12
    )  # no stage is busier than another
    assert once.compute == pytest.approx(2 * twice.compute, rel=1e-12)
    assert once.total - once.compute == pytest.approx(twice.total - twice.compute, rel=1e-12)
    assert once.bubble == 0
    piped = placed(seven, data=2, pipeline=4)
    assert (
        step_time(piped, work, chip).bubble
        > step_time(placed(seven, data=2, pipeline=4, virtual_pipeline=7), work, chip).bubble
    )


@pytest.mark.parametrize("objective", ["sft", "dpo", "reward", "orpo"])
def test_the_work_planned_is_the_work_done(tiny_models, tmp_path, objective):
    """A plan reads the index alone; the steps of a run count what their packs hold."""
    write = write_chat if objective == "sft" else write_pairs
    data = write(tmp_path / "data.jsonl")
    options = {
        "objective__name": objective,
        "parallel__tensor": 2,
        "data__share_prefix": objective != "reward",
    }
    config = parse(run_arguments(tiny_models("qwen2_untied"), data, tmp_path / "run", **options))
    store = TokenStore(prepare(StoreSpec.of_run(config, "train", config.model.path)))
    shape = read_shape(config.model.path)
    placement = Placement.of_run(
        config, shape.as_reward() if objective == "reward" else shape, 4 if objective == "sft" else 2
    )
    options = PackOptions.of_data(
        config.data, score_prompt=objective == "orpo", multiple=placement.token_multiple
    )
    order = step_order(store, config.data, config.train, config.data.train)
    steps = StepBatches(store, order, options, DataRank(ranks=placement.data), "sample")
    rows = sum(batch.rows.row_N.shape[0] for batch in steps.step(0).batches)
    assert placement.data > 1 or rows == steps.step(0).counts.scored_rows
    done = [
        Work.of_counts(steps.step(step).counts, placement.data, reward=objective == "reward")
        for step in range(config.train.steps)
    ]
    assert of_store(store, config)(placement) == done


def test_a_critic_is_counted(seven):
    """Its state is that of a reward model on the same layout, its work that of its training and a pass for values."""
    arguments = ["--model.path=m", "--data.train=d", "--checkpoint.dir=c", "--train.steps=1"]
    arguments += ["--rollout.engine=data", "--data.sequence_length=512"]
    ppo, grpo = (
        parse([*arguments, f"--objective.name={name}", "--objective.beta=0.05"]) for name in ("ppo", "grpo")
    )
    placement = placed(seven, data=2, tensor=2, pipeline=2)
    reward = replace(placement, shape=placement.shape.as_reward())
    [of_ppo, of_grpo] = (memory_of(config, placement, 4) for config in (ppo, grpo))
    for stage, (one, other) in enumerate(zip(of_ppo, of_grpo, strict=True)):
        assert (one.critic, other.critic) == (state_bytes(reward, stage).total, 0)
        assert one.tensors - other.tensors == one.critic
    [work] = full_packs(ppo)(placement)
    more = flops_of(ppo, placement, work).model - step_flops(placement, work, scoring_passes(ppo)).model
    assert more == step_flops(reward, work, 1).model > 0
    assert flops_of(grpo, placement, work) == step_flops(placement, work, scoring_passes(grpo))
