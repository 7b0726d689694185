"""The words and tables of ``megatron-align plan``."""

from __future__ import annotations

from megatron_align.cost.memory import CONTEXT, FRAGMENTATION, GIB
from megatron_align.cost.placement import Placement
from megatron_align.cost.search import Candidate, PlanRequest, candidates, evaluate, smallest_fitting
from megatron_align.cost.state import parameter_count
from megatron_align.cost.text import PARTS, columns, layout, memory_table, recomputation, step_text
from megatron_align.cost.time import LINKS, mfu, one_pass_seconds
from megatron_align.cost.traffic import traffic
from megatron_align.cost.work import scoring_passes, step_flops
from megatron_align.errors import InputError
from megatron_align.objectives.registry import reference_mode


def head(ask: PlanRequest, chip: str, told: str) -> str:
    """Return what is planned, and what is assumed."""
    shape, config = ask.shape, ask.config
    return "\n".join(
        (
            f"model      {shape.architecture}, {parameter_count(shape) / 1e9:.2f} billion weights, "
            f"{shape.num_layers} layers, hidden {shape.hidden_size}, vocabulary {shape.vocab_size}",
            f"run        {config.objective.name}, {config.train.precision}, packs of up to "
            f"{config.data.sequence_length:,} tokens" + _reference(ask),
            f"data       {told}",
            f"GPUs       {ask.gpus} of {ask.bytes / GIB:g} GiB, {chip}: bf16 peak {ask.chip.bf16 / 1e12:g} TFLOP/s, "
            f"links {ask.chip.link / 1e9:g} GB/s, network {ask.chip.network / 1e9:g} GB/s ({ask.chip.source})",
            f"assumed    {ask.efficiency:.0%} of the peak, {LINKS:.0%} of links, nothing overlaps; CUDA and NCCL take "
            f"{CONTEXT / GIB:g} GiB, fragments {FRAGMENTATION:.0%}",
        )
    )


def _reference(ask: PlanRequest) -> str:
    mode = reference_mode(ask.config)
    return f", reference {mode}" if mode else ""


def own_layout(ask: PlanRequest) -> str:
    """Return the memory of the configuration's own layout, stage by stage, and what its step costs."""
    try:
        placement = Placement.of_run(ask.config, ask.shape, ask.gpus)
    except InputError as error:
        return f"\nthe layout of the configuration: {error}"
    one = evaluate(ask, placement)
    verdict = "fits" if one.peak <= ask.bytes else "does not fit"
    lines = [
        f"\nthe layout of the configuration: {layout(placement)}, {recomputation(placement)}: {verdict}",
        memory_table(one.memory),
        *step_lines(ask, one),
    ]
    return "\n".join(lines)


def step_lines(ask: PlanRequest, one: Candidate) -> list[str]:
    """Return operations, bytes of each collective and the estimated time of a step."""
    placement, work = one.placement, one.work
    passes = scoring_passes(ask.config)
    flops = step_flops(placement, work, passes)
    moved = traffic(placement, work.pack_tokens)
    seconds = one.time.total
    lines = [
        step_text(placement, work, flops),
        f"each rank  sends {_mib(moved.tensor)} tensor and {_mib(moved.context)} context a layer and micro-batch, "
        f"{_mib(moved.pipeline)} to the next stage a micro-batch, {_mib(moved.data)} data a step",
        f"estimated  {seconds:.3g} s a step, {work.tokens / seconds:,.0f} tokens/s, "
        f"MFU {mfu(placement, flops, seconds, ask.chip):.0%}: {_shares(one)}",
    ]
    if reference_mode(ask.config) == "cached":
        once = one_pass_seconds(placement, work, ask.chip, ask.efficiency)
        lines.append(f"reference  once before training, about {once:.3g} s for the samples of each step")
    return lines


def table(ask: PlanRequest, found: list[Candidate]) -> str:
    """Return the layouts that fit, with the reasons for each."""
    rows = [("", "tensor", "pipeline", "virtual", "context", "data", "recompute", "GiB", "s/step", "why")]
    for place, one in enumerate(found, 1):
        parallel = one.placement.parallel
        rows.append(
            (
                str(place),
                str(parallel.tensor),
                str(parallel.pipeline),
                str(parallel.virtual_pipeline or "-"),
                str(parallel.context),
                str(one.placement.data),
                str(one.placement.recompute_layers or "-"),
                f"{one.peak / GIB:.1f}",
                f"{one.time.total:.3g}",
                why(ask, one),
            )
        )
    return "\nlayouts that fit, quickest first\n" + columns(rows, last_is_text=True)


def why(ask: PlanRequest, one: Candidate) -> str:
    """Return the reasons for a layout: room, recomputation, and where its time goes."""
    reasons = [f"{(ask.bytes - one.peak) / GIB:.1f} GiB free"]
    if one.peak_unless_recomputed is not None:
        reasons.append(f"keeping all activations would need {one.peak_unless_recomputed / GIB:.1f}")
    return "; ".join((*reasons, _shares(one)))


def nothing_fits(ask: PlanRequest) -> str:
    """Return what is missing: the layout that needs least, what fills it, and how many GPUs would do."""
    every = candidates(ask)
    if not every:
        return f"\nno layout of {ask.gpus} GPUs divides the model: its heads, layers and ffn size allow none"
    least = min(every, key=lambda one: one.peak)
    stage = max(range(len(least.memory)), key=lambda at: least.memory[at].total)
    fullest = least.memory[stage]
    part = max(PARTS, key=lambda name: getattr(fullest, name))
    lines = [
        f"\nnothing fits: the least that {ask.gpus} GPUs need is {least.peak / GIB:.1f} GiB each, "
        f"{(least.peak - ask.bytes) / GIB:.1f} more than there are",
        f"  with {layout(least.placement)}, {recomputation(least.placement)}; "
        f"most of it is {part}, {getattr(fullest, part) / GIB:.1f} GiB on stage {stage}",
    ]
    if larger := smallest_fitting(ask):
        placement = larger.placement
        lines.append(
            f"  {placement.world_size} GPUs would do: {layout(placement)}, "
            f"{recomputation(placement)}, {larger.peak / GIB:.1f} GiB each"
        )
    return "\n".join(lines)


def _shares(one: Candidate) -> str:
    """Name what takes at least a fiftieth of the time, the largest first."""
    shares = sorted(one.time.shares().items(), key=lambda share: -share[1])
    return ", ".join(f"{name} {share:.0%}" for name, share in shares if share >= 0.02)


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
