"""Every example runs as it is: it parses, fits the GPUs that its first line names, and passes the checks of a run.

The models' own config.json stand in for the models; a tiny model and tiny data for those of the dry run.
"""

import json
import re
from pathlib import Path

import pytest

from megatron_align import train
from megatron_align.cost.memory import GIB
from megatron_align.cost.placement import Placement
from megatron_align.cost.search import memory_of
from megatron_align.cost.work import full_packs, mean
from megatron_align.model.families import read_shape
from megatron_align.objectives.configuration import parse
from megatron_align.training.setup import trained_shape
from tests.harness.sizes import CONFIGS, write_config
from tests.harness.tiny import make_model, write_chat, write_pairs

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
STAGES = ("sft", "reward", "dpo")
ONLINE = ("qwen2_7b", "llama3_8b")  # and the Nova models
NOVA = {"qwen2_nova_72b": "qwen2_72b", "llama3_pbm_nova_70b": "llama3_70b"}
RECIPES = [f"{model}/{stage}" for model in (*CONFIGS, *NOVA) for stage in STAGES]
RECIPES += [f"{model}/grpo" for model in (*ONLINE, *NOVA)]
RECIPES += ["qwen2_7b/pas"]
USABLE = 79.0 * GIB  # of a card sold with 80 GB


def model_of(recipe):
    folder = recipe.partition("/")[0]
    return NOVA.get(folder, folder)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Return tiny models of both families, eight layers so that four stages can merge two, and data of each kind."""
    folder = tmp_path_factory.mktemp("inputs")

    def score(draw):
        return draw.randrange(1, 6)

    return {
        "qwen2": make_model(folder / "qwen2", "qwen2_untied", num_hidden_layers=8),
        "llama3": make_model(folder / "llama3", "llama3", num_hidden_layers=8),
        "qwen2_reward": make_model(folder / "qwen2_reward", "qwen2_reward", num_hidden_layers=8),
        "llama3_reward": make_model(folder / "llama3_reward", "llama_reward", num_hidden_layers=8),
        "chat": write_chat(folder / "chat.jsonl"),
        "prompts": write_prompts(folder / "prompts.jsonl"),
        "pairs": write_pairs(folder / "pairs.jsonl", chosen_score=score, rejected_score=score),
    }


def write_prompts(file):
    file.write_text("".join(json.dumps({"prompt": f"What is {i}?"}) + "\n" for i in range(16)))
    return file


def test_none_is_forgotten():
    found = {f"{path.parent.name}/{path.stem}" for path in EXAMPLES.glob("*/*.yaml")}
    assert found == set(RECIPES) | {
        f"{folder}/{path.stem}"
        for folder in ("quickstart", "pas", "real_data", "baichuan_alignment")
        for path in (EXAMPLES / folder).glob("*.yaml")
    }


@pytest.mark.parametrize("recipe", RECIPES)
def test_fits_the_gpus_it_names(recipe, tmp_path):
    file = EXAMPLES / f"{recipe}.yaml"
    first = file.read_text().splitlines()[0]
    named = re.search(r"on (?:(one GPU)|(?:one|(\d+)) nodes? of (\d+) GPUs) of 80 GB", first)
    gpus = 1 if named[1] else int(named[2] or 1) * int(named[3])
    folder = write_config(tmp_path, model_of(recipe))
    config = parse(["--config", str(file), "--model.path", str(folder)])
    shape = trained_shape(read_shape(folder), config, folder)
    placement = Placement.of_run(config, shape, gpus)
    micro_batches = mean(full_packs(config)(placement)).micro_batches
    assert max(stage.total for stage in memory_of(config, placement, micro_batches)) <= USABLE
    assert config.data.sequence_length <= shape.max_positions


@pytest.mark.parametrize("recipe", RECIPES)
def test_passes_the_checks_of_a_run(recipe, inputs, tmp_path, capsys):
    kind = {"sft": "chat", "pas": "chat", "grpo": "prompts"}.get(recipe.partition("/")[2], "pairs")
    family = recipe.partition("_")[0]
    model, data = inputs[family], inputs[kind]
    rewards = f"[{{kind: model, path: {inputs[f'{family}_reward']}}}]"
    options = {
        "model.path": model,
        "data.train": data,
        "checkpoint.dir": tmp_path / "run",
        "data.sequence_length": 2048,
        "train.global_batch_size": 8,
        **({"rollout.max_tokens": 64, "rewards": rewards} if kind == "prompts" else {}),
        "train.epochs": 40,  # so that the warm-up fits into the tiny data's steps
    }
    arguments = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    assert train.main(["--config", str(EXAMPLES / f"{recipe}.yaml"), *arguments, "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert f"objective  {recipe.partition('/')[2].replace('pas', 'sft')}" in said
    assert kind != "prompts" or "rollouts   8 prompts x 3 completions" in said
    assert "GiB per rank" in said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    "recipe", [*(f"{model}/{stage}" for model in NOVA for stage in (*STAGES, "grpo")), "qwen2_7b/pas"]
)
def test_every_value_of_the_reports_recipes_says_where_it_is_from(recipe):
    values = [
        line
        for line in (EXAMPLES / f"{recipe}.yaml").read_text().splitlines()
        if not line.startswith("#") and not line.endswith(":")
    ]
    assert len(values) > 15
    assert [line for line in values if not re.search(r"  # (report|released|paper|ours)\b", line)] == []
