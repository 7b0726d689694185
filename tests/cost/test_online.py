"""What a run on rollouts adds is counted: reward models and the engine's cache to the byte, PTX's samples as packed."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_align import train
from megatron_align.config.rollout import BATCH_TOKENS
from megatron_align.cost.online import OnlineCosts, RewardModelCost, engine_bytes
from megatron_align.cost.placement import Placement
from megatron_align.cost.search import memory_of
from megatron_align.cost.state import parameter_bytes, parameter_count
from megatron_align.cost.text import step_text
from megatron_align.cost.work import Work, full_packs, mean, of_ptx, step_flops
from megatron_align.data.batching.packing import PackOptions
from megatron_align.data.batching.sampler import EpochOrder, SampleSteps
from megatron_align.data.batching.step_batches import DataRank, StepBatches
from megatron_align.data.store import TokenStore
from megatron_align.data.tokenize.cache_key import StoreSpec
from megatron_align.data.tokenize.prepare import prepare
from megatron_align.model.families import read_shape
from megatron_align.objectives.configuration import parse
from tests.harness.tiny import make_reward, run_arguments

LENGTH = 256


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    return make_reward(tmp_path_factory.mktemp("reward") / "reward", "qwen2")


@pytest.fixture(scope="module")
def arguments(tiny_models, reward, chat_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": f"{i}?"}) for i in range(8)))
    return run_arguments(
        tiny_models(),
        folder / "prompts.jsonl",
        folder / "run",
        objective__name="grpo",
        objective__iterations=2,
        objective__ptx=f"{{data: {chat_file}, top_k: 50, samples: 5}}",
        rewards=f"[{{kind: model, path: {reward}, name: good}}]",
        rollout__max_tokens=8,
        rollout__dynamic_sampling="{max_batches: 4}",
        rollout__completions=3,
        train__global_batch_size=4,
    )


@pytest.fixture(scope="module")
def placement(arguments):
    config = parse(arguments)
    return Placement.of_run(config, read_shape(config.model.path), 1)


def test_reward_models_and_the_cache_are_memory(arguments, placement, reward):
    config = parse(arguments)
    plain = memory_of(config, placement, 1)[0]
    model = RewardModelCost("good", read_shape(reward), "bf16")
    both = memory_of(config, placement, 1, OnlineCosts((model, replace(model, precision="fp32"))))[0]
    counted = parameter_bytes(replace(placement, shape=model.shape), 0)
    assert both == replace(plain, rewards=counted + counted // 2)
    assert counted > 0


def test_the_cache_holds_what_transformers_puts_there(arguments, placement):
    config = parse(arguments)
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    with torch.no_grad():
        cache = model(torch.ones(1, 10, dtype=torch.int64), use_cache=True).past_key_values
    layers = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    of_ten = sum(tensor.numel() * tensor.element_size() for tensor in layers)
    weights = 4 * parameter_count(placement.shape)
    assert engine_bytes(config, placement) == weights + BATCH_TOKENS * of_ten // 10
    servers = replace(config, rollout=replace(config.rollout, engine="vllm", url="http://127.0.0.1:1"))
    assert engine_bytes(servers, placement) == 0


def test_columns_of_the_reference_are_memory(arguments, placement):
    config = parse(arguments)
    wide = replace(config, objective=replace(config.objective, ptx=replace(config.objective.ptx, top_k=100)))
    more, less = (memory_of(each, placement, 1)[0].temporary for each in (wide, config))
    assert more - less == LENGTH * 50 * (4 + 8 + 4 + 12)


def test_the_samples_of_ptx_are_those_of_the_steps(arguments, placement, tmp_path):
    config = parse(arguments)
    spec = StoreSpec.of_run(config, "ptx", config.model.path)
    store = TokenStore(prepare(replace(spec, cache=str(tmp_path))))
    order = EpochOrder(store.sources, (1.0,), config.train.seed, config.data.shuffle)
    options = PackOptions.of_data(config.data, multiple=1, micro_batch_multiple=1)
    batches = StepBatches(store, SampleSteps(order, 5, steps=8), options, DataRank(), "token")
    counted = of_ptx(store, config)(placement)
    assert counted == [Work.of_counts(batches.step(i).counts, 1, reward=False) for i in range(8)]
    costs = OnlineCosts(ptx=of_ptx(store, config))
    [(name, flops)] = costs.flops(config, placement, mean(full_packs(config)(placement))).items()
    assert (name, flops) == ("ptx", step_flops(placement, mean(counted), 0))
    assert np.isfinite(flops.executed)


def test_a_dry_run_and_a_plan_say_it(arguments, tmp_path, capsys):
    from megatron_align.tools.main import main

    assert train.main([*arguments, "--dry_run"]) == 0
    dry = capsys.readouterr().out
    file = tmp_path / "run.yaml"
    file.write_text("{}")
    assert main(["plan", "--config", str(file), "--gpus", "1", "--gpu-memory", "80", *arguments]) == 0
    plan = capsys.readouterr().out
    for said in (dry, plan):
        assert re.search(r"reward +\S+ FLOPs executed besides these, forward of good", said)
        assert re.search(r"ptx +\S+ FLOPs executed besides these, on supervised samples", said)
        assert "1.33 times those of SFT" in said  # iterations 2: a pass of the policy before the first
        assert re.search(r"communication +rewards +engine +total", said)
    assert "replaced in up to 3 further batches" in dry
    assert "8 prompts, each with 3 completions of 8 tokens" in plan


@pytest.mark.parametrize("passes, said", [(0, None), (1, "1.33"), (2, "1.67")])
def test_what_a_step_needs_besides_training_is_named_with_sfts(passes, said, arguments, placement):
    """Training is three passes."""
    work = mean(full_packs(parse(arguments))(placement))
    text = step_text(placement, work, step_flops(placement, work, passes))
    found = re.findall(r"required by the model, (\S+) times those of SFT on the same tokens", text)
    assert found == ([said] if said else [])
