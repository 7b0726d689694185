"""Count the fewest GPUs that hold a 70B run at 16,384 tokens, by how activations are recomputed.

``python -m benchmarks.fewest_gpus`` asks the planner's own counts (``megatron_align/cost``) for every layout of tensor,
pipeline, data and, where said, context ranks on 8, 16, ... GPUs: SFT in bf16, fp32 master weights and Adam, packs
full of one document, 128 of them a step. A layout fits if 8% of the 80 GiB stay free on every stage. Rows go to
``benchmarks/results/fewest_gpus.csv``. Nothing is measured here: the counts equal what ranks hold (docs/planning.md).

The report says that merged layers brought a model of over 70B at this length from 128 GPUs to 40, without its
layout or its GPUs: compare the direction, not the figures.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from transformers import LlamaConfig

from benchmarks.rows import record, stamp
from megatron_align.cost.chips import CHIPS
from megatron_align.cost.placement import Placement
from megatron_align.cost.search import HEADROOM, PlanRequest, memory_of, placements
from megatron_align.cost.work import full_packs, mean
from megatron_align.model.families import read_shape
from megatron_align.objectives.configuration import parse

GIB, MEMORY, TOKENS, MOST = 2**30, 80, 16384, 512
ROOT = Path(__file__).parents[1]
RECOMPUTE = {"none": (0,), "each layer": (1,), "k merged layers": (1, 2, 4, 5, 8, 10)}


def fewest(request: PlanRequest, layers: tuple[int, ...], context: bool) -> tuple[Placement, float] | None:
    """Return the layout on the fewest GPUs that fits, and the GiB of its fullest stage; None: none fits.

    Args:
        request: run and GPUs.
        layers: values of ``train.recompute_layers`` that are tried.
        context: also split packs over context ranks.
    """
    for gpus in range(8, MOST + 1, 8):
        found = list(_fitting(replace(request, gpus=gpus), layers, context))
        if found:
            return min(found, key=lambda one: one[1])
    return None


def _fitting(
    request: PlanRequest, layers: tuple[int, ...], context: bool
) -> Iterator[tuple[Placement, float]]:
    for placement in placements(request):
        if placement.parallel.virtual_pipeline or (placement.parallel.context > 1 and not context):
            continue
        per_stage = placement.chunks(0)[0].layers
        for merged in layers:
            if merged > per_stage:
                continue
            one = replace(placement, recompute_layers=merged)
            micro_batches = mean(request.work(one)).micro_batches
            peak = max(stage.total for stage in memory_of(request.config, one, micro_batches))
            if peak <= request.bytes * (1 - HEADROOM):
                yield one, peak / GIB


def _layout(found: tuple[Placement, float] | None) -> dict[str, object]:
    columns = ("gpus", "tensor", "pipeline", "context", "data", "recompute_layers", "peak_gib")
    if found is None:
        return {column: f"more than {MOST}" if column == "gpus" else "" for column in columns}
    placement, peak = found
    parallel = placement.parallel
    sizes = (parallel.tensor, parallel.pipeline, parallel.context, placement.data)
    gpus = parallel.tensor * parallel.pipeline * parallel.context * placement.data
    return dict(zip(columns, (gpus, *sizes, placement.recompute_layers, f"{peak:.1f}"), strict=True))


def main() -> None:
    """Count, print and append the rows."""
    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(
            architectures=["LlamaForCausalLM"],
            vocab_size=128256,
            hidden_size=8192,
            intermediate_size=28672,
            num_hidden_layers=80,
            num_attention_heads=64,
            num_key_value_heads=8,
            max_position_embeddings=TOKENS,
            rope_theta=500000.0,
        ).save_pretrained(folder)
        options = {"--model.path": folder, "--data.sequence_length": TOKENS, "--train.recompute_layers": 0}
        given = [str(part) for option in options.items() for part in option]
        config = parse(["--config", str(ROOT / "examples/llama3_70b/sft.yaml"), *given])
        request = PlanRequest(
            config=config,
            shape=read_shape(Path(folder)),
            gpus=8,
            bytes=MEMORY * GIB,
            chip=CHIPS["h100"],
            work=full_packs(config),
        )
        rows: list[dict[str, object]] = []
        for context in (False, True):
            for name, layers in RECOMPUTE.items():
                asked = {
                    "model": "Llama-3-70B",
                    "tokens": TOKENS,
                    "gpu_gib": MEMORY,
                    "context_allowed": context,
                }
                found = fewest(request, layers, context)
                rows.append({**stamp("counted"), **asked, "recompute": name, **_layout(found)})
    record("fewest_gpus", rows)


if __name__ == "__main__":
    main()
