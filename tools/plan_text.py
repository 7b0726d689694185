"""Text output of ``megatron-align plan``."""

from __future__ import annotations

from megatron_align.cost.memory import CONTEXT, FRAGMENTATION, GIB
from megatron_align.cost.placement import Placement
from megatron_align.cost.search import (
    HEADROOM,
    Candidate,
    PlanRequest,
    candidates,
    evaluate,
    require_divided,
    run_seconds,
    smallest_fitting,
)
from megatron_align.cost.state import parameter_count
from megatron_align.cost.text import (
    PARTS,
    before_text,
    columns,
    duration,
    layout,
    memory_table,
    online_text,
    recomputation,
    shape_text,
    step_text,
    trained_text,
)
from megatron_align.cost.time import LINKS, mfu, one_pass_seconds
from megatron_align.cost.traffic import traffic
from megatron_align.cost.work import flops_of
from megatron_align.errors import InputError
from megatron_align.objectives.registry import reference_mode


def head(request: PlanRequest, chip: str, data: str) -> str:
    """Return the model, the run, the GPUs and the assumptions."""
    shape, config = request.shape, request.config
    trained = trained_text(shape, request.adapter, request.frozen)
    peak, link, network = request.chip.bf16, request.chip.link, request.chip.network
    return "\n".join(
        (
            f"model      {shape.architecture}, {parameter_count(shape) / 1e9:.2f} billion weights, "
            f"{shape.num_layers} layers, hidden {shape.hidden_size}, vocabulary {shape.vocab_size}",
            *([f"trained    {trained}"] if trained else []),
            f"run        {config.objective.name}, {config.train.arithmetic}, packs of up to "
            f"{config.data.sequence_length:,} tokens" + _reference(request),
            *(f"{name:10} {shape_text(other)}" for name, other in request.second._asdict().items() if other),
            f"data       {data}",
            f"GPUs       {request.gpus} of {request.bytes / GIB:g} GiB, {chip}: bf16 peak {peak / 1e12:g} TFLOP/s, "
            f"links {link / 1e9:g} GB/s, network {network / 1e9:g} GB/s ({request.chip.source})",
            f"assumed    {request.efficiency:.0%} of the peak, {LINKS:.0%} of links, no overlap; CUDA and NCCL take "
            f"{CONTEXT / GIB:g} GiB, fragmentation {FRAGMENTATION:.0%}",
        )
    )


def _reference(request: PlanRequest) -> str:
    mode = reference_mode(request.config)
    return f", reference {mode}" if mode else ""


def configured_layout(request: PlanRequest) -> str:
    """Return the memory of each stage of the configuration's layout, and the cost of a step."""
    try:
        placement = Placement.of_run(request.config, request.shape, request.gpus, request.second)
        require_divided(request.config, placement)
    except InputError as error:
        return f"\nthe layout of the configuration: {error}"
    one = evaluate(request, placement)
    verdict = "fits" if one.peak <= request.bytes else "does not fit"
    lines = [
        f"\nthe layout of the configuration: {layout(placement)}, {recomputation(placement)}: {verdict}",
        memory_table(one.memory),
        *before_text(one.before),
        *step_lines(request, one),
    ]
    return "\n".join(lines)


def step_lines(request: PlanRequest, one: Candidate) -> list[str]:
    """Return operations, bytes of each collective and the estimated time of a step."""
    placement, work = one.placement, one.work
    flops = flops_of(request.config, placement, work)
    moved = traffic(placement, work.pack_tokens)
    seconds = one.time.total
    lines = [
        step_text(placement, work, flops),
        *online_text(request.online.flops(request.config, placement, work)),
        f"each rank  sends {_mib(moved.tensor)} tensor and {_mib(moved.context)} context a layer and micro-batch, "
        f"{_mib(moved.pipeline)} to the next stage a micro-batch, {_mib(moved.data)} data a step",
        f"estimated  {seconds:.3g} s a step, {work.tokens / seconds:,.0f} tokens/s, "
        f"MFU {mfu(placement, flops, seconds, request.chip):.0%}: {_shares(one)}",
    ]
    if reference_mode(request.config) == "cached":
        once = one_pass_seconds(placement.as_reference(), work, request.chip, request.efficiency)
        lines.append(f"reference  once before training, about {once:.3g} s for the samples of each step")
    lines.append(f"total      {_total(request, one)}")
    return lines


def _total(request: PlanRequest, one: Candidate) -> str:
    """Return time and GPU-hours of all steps."""
    seconds = run_seconds(request, one)
    if seconds is None:
        epochs = request.config.train.epochs
        return f"not known: {epochs} epochs of data that are not tokenised (megatron-align prepare)"
    return (
        f"about {duration(seconds)} and {_gpu_hours(request, seconds)} GPU-hours for {request.steps:,} steps on "
        f"{request.gpus} GPUs, without validation and saving"
    )


def _gpu_hours(request: PlanRequest, seconds: float) -> str:
    hours = seconds / 3600 * request.gpus
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.2g}"


def table(request: PlanRequest, fitting: list[Candidate]) -> str:
    """Return a table of the layouts that fit, with the reasons for each."""
    sizes = ("tensor", "pipeline", "virtual", "context", "data", "recompute")
    rows = [("", *sizes, "GiB", "s/step", "total", "GPU-h", "why")]
    for number, one in enumerate(fitting, 1):
        parallel, seconds = one.placement.parallel, run_seconds(request, one)
        rows.append(
            (
                str(number),
                str(parallel.tensor),
                str(parallel.pipeline),
                str(parallel.virtual_pipeline or "-"),
                str(parallel.context),
                str(one.placement.data),
                str(one.placement.recompute_layers or "-"),
                f"{one.peak / GIB:.1f}",
                f"{one.time.total:.3g}",
                "-" if seconds is None else duration(seconds),
                "-" if seconds is None else _gpu_hours(request, seconds),
                why(request, one),
            )
        )
    title = (
        f"layouts that fit, those with {HEADROOM:.0%} of the memory free before others, then fastest first"
    )
    return f"\n{title}\n" + columns(rows, last_is_text=True)


def why(request: PlanRequest, one: Candidate) -> str:
    """Return the reasons for a layout: free memory, recomputation, and the shares of its time."""
    reasons = [f"{(request.bytes - one.peak) / GIB:.1f} GiB free"]
    if not one.has_headroom(request.bytes):
        reasons[0] += ", little headroom"
    if one.peak_unless_recomputed is not None:
        reasons.append(f"without recomputation it would need {one.peak_unless_recomputed / GIB:.1f}")
    return "; ".join((*reasons, _shares(one)))


def nothing_fits(request: PlanRequest) -> str:
    """Return the layout with the least memory, its largest part, and the number of GPUs that would suffice."""
    every = candidates(request)
    if not every:
        return (
            f"\nno layout of {request.gpus} GPUs divides the model{_others(request)}: its heads, layers and ffn size "
            "allow none"
        )
    least = min(every, key=lambda one: one.peak)
    stages = [*least.memory, *least.before]
    stage = max(range(len(stages)), key=lambda at: stages[at].total)
    fullest = stages[stage]
    when = "" if stage < len(least.memory) else ", before training, of the reference"
    part = max(PARTS, key=lambda name: getattr(fullest, name))
    lines = [
        f"\nnothing fits: the least that {request.gpus} GPUs need is {least.peak / GIB:.1f} GiB each, "
        f"{(least.peak - request.bytes) / GIB:.1f} more than there are",
        f"  with {layout(least.placement)}, {recomputation(least.placement)}; "
        f"most of it is {part}, {getattr(fullest, part) / GIB:.1f} GiB on stage {stage % len(least.memory)}{when}",
    ]
    if larger := smallest_fitting(request):
        placement = larger.placement
        lines.append(
            f"  {placement.world_size} GPUs would suffice: {layout(placement)}, "
            f"{recomputation(placement)}, {larger.peak / GIB:.1f} GiB each"
        )
    return "\n".join(lines)


def _others(request: PlanRequest) -> str:
    """Name the models of another shape that the layout must divide too."""
    return "".join(
        f" and the {name}" for name, shape in request.second._asdict().items() if shape is not None
    )


def _shares(one: Candidate) -> str:
    """Return the parts that take at least 2% of the time, largest first."""
    shares = sorted(one.time.shares().items(), key=lambda share: -share[1])
    return ", ".join(f"{name} {share:.0%}" for name, share in shares if share >= 0.02)


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
