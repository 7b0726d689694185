"""Count memory, operations and fewest GPUs of a 72B run of PPO and of one of GRPO, by the planner's counts.

``python -m benchmarks.ppo_resources`` takes the recipe ``examples/qwen2_nova_72b/grpo.yaml`` (policy, live reference
and reward model of one shape, generation on other GPUs) and gives it a critic. A step has 384 completions of 1,024
tokens after prompts of 1,024: GRPO and PPO with 128 prompts of 3, and PPO with 384 of 1, its usual form. Operations are
matrix products: of training with recomputation, of scoring by reference, reward model and critic, and of generation,
one forward pass over all tokens. Rows go to ``benchmarks/results/ppo_resources.csv``. Nothing is measured here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.rows import record, stamp
from megatron_align.config import RunConfig
from megatron_align.cost.chips import CHIPS
from megatron_align.cost.flops import forward_flops
from megatron_align.cost.memory import GIB
from megatron_align.cost.online import OnlineCosts, RewardModelCost
from megatron_align.cost.placement import Placement
from megatron_align.cost.search import HEADROOM, PlanRequest, memory_of, placements
from megatron_align.cost.work import Work, WorkOf, flops_of
from megatron_align.data.batching.attention_cost import visible_keys
from megatron_align.model.families import ModelShape, read_shape
from megatron_align.objectives.configuration import parse
from tests.harness.sizes import write_config

RECIPE = Path(__file__).parents[1] / "examples" / "qwen2_nova_72b" / "grpo.yaml"
GPUS, MEMORY, MOST = 32, 80, 256  # of the recipe; GiB of each; most that are tried
PROMPT, COMPLETION = 1024, 1024  # tokens
MERGED = (1, 2, 4)  # values of ``train.recompute_layers`` that are tried for the fewest GPUs
CASES = {"grpo": ("grpo", 128, 3), "ppo": ("ppo", 128, 3), "ppo, 1 completion": ("ppo", 384, 1)}


def work_of(config: RunConfig, prompts: int, completions: int) -> WorkOf:
    """Return a step of packs filled with prompts and their completions, prompts shared."""
    tokens = PROMPT + completions * COMPLETION
    in_pack = config.data.sequence_length // tokens
    seen = int(visible_keys([PROMPT], [completions], [COMPLETION] * completions).sum())

    def work(placement: Placement) -> list[Work]:
        micro_batches = -(-prompts // (in_pack * placement.data))
        return [
            Work(
                samples=prompts,
                micro_batches=micro_batches,
                pack_tokens=in_pack * tokens,
                tokens=prompts * tokens,
                visible_keys=prompts * seen,
                scored=prompts * completions * COMPLETION,
                padded_tokens=placement.data * micro_batches * in_pack * tokens,
            )
        ]

    return work


def fewest(request: PlanRequest) -> tuple[Placement, float] | None:
    """Return the layout on the fewest GPUs that leaves 8% free on every stage, and the GiB of its fullest one."""
    for gpus in range(8, MOST + 1, 8):
        found = list(_fitting(replace(request, gpus=gpus)))
        if found:
            return min(found, key=lambda one: one[1])
    return None


def _fitting(request: PlanRequest) -> Iterator[tuple[Placement, float]]:
    for placement in placements(request):
        parallel = placement.parallel
        if parallel.virtual_pipeline or parallel.context > 1 or parallel.tensor < 8:
            continue
        for merged in MERGED:
            if merged <= placement.chunks(0)[0].layers:
                one = replace(placement, recompute_layers=merged)
                if (peak := _peak(request, one)) <= MEMORY * (1 - HEADROOM):
                    yield one, peak


def _peak(request: PlanRequest, placement: Placement) -> float:
    work = request.work(placement)[0]
    memory = memory_of(request.config, placement, work.micro_batches, request.online)
    return max(stage.total for stage in memory) / GIB


def row(name: str, shape: ModelShape, folder: str) -> dict[str, object]:
    """Count one case."""
    objective, prompts, completions = CASES[name]
    options = {
        "--model.path": folder,
        "--objective.name": objective,
        "--rollout.completions": completions,
        "--train.global_batch_size": prompts,
    }
    config = parse(["--config", str(RECIPE), *(str(part) for option in options.items() for part in option)])
    online = OnlineCosts((RewardModelCost("model", shape.as_reward(), config.train.precision),))
    request = PlanRequest(
        config=config,
        shape=shape,
        gpus=GPUS,
        bytes=MEMORY * GIB,
        chip=CHIPS["h100"],
        work=work_of(config, prompts, completions),
        online=online,
    )
    placement = Placement.of_run(config, shape, GPUS)
    [work] = request.work(placement)
    stages = memory_of(config, placement, work.micro_batches, online)
    fullest = max(stages, key=lambda stage: stage.total)
    trained = flops_of(config, placement, work).executed
    rewarded = sum(flops.executed for flops in online.flops(config, placement, work).values())
    generated = forward_flops(shape, work.tokens, work.visible_keys, work.scored).total
    found = fewest(request)
    state = fullest.parameters + fullest.gradients + fullest.optimizer
    return {
        **stamp("counted"),
        "model": "Qwen2-72B",
        "gpus": GPUS,
        "objective": name,
        "prompts": prompts,
        "completions": completions,
        "peak_gib": f"{fullest.total / GIB:.1f}",
        "policy_gib": f"{state / GIB:.1f}",
        "critic_gib": f"{fullest.critic / GIB:.1f}",
        "reference_gib": f"{fullest.reference / GIB:.1f}",
        "reward_gib": f"{fullest.rewards / GIB:.1f}",
        "training_pflop": f"{(trained + rewarded) / 1e15:.0f}",
        "generation_pflop": f"{generated / 1e15:.0f}",
        "fewest_gpus": f"more than {MOST}" if found is None else found[0].world_size,
        "fewest_peak_gib": "" if found is None else f"{found[1]:.1f}",
    }


def main() -> None:
    """Count, print and append the rows."""
    with tempfile.TemporaryDirectory() as folder:
        shape = read_shape(write_config(Path(folder), "qwen2_72b"))
        record("ppo_resources", [row(name, shape, folder) for name in CASES])


if __name__ == "__main__":
    main()
