"""Search the parallel layouts that fit into memory, fastest first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from megatron_align.config import RunConfig
from megatron_align.cost.activations import stage_bytes
from megatron_align.cost.chips import Chip
from megatron_align.cost.memory import StageMemory, pass_memory, stage_memory
from megatron_align.cost.online import OnlineCosts, engine_bytes
from megatron_align.cost.placement import Placement, SecondShapes
from megatron_align.cost.state import state_bytes
from megatron_align.cost.time import EFFICIENCY, NODE, StepTime, one_pass_seconds, step_time
from megatron_align.cost.work import CRITIC_PASSES, Work, WorkOf, mean, passes_of
from megatron_align.errors import InputError
from megatron_align.hf.adapter_options import resolve_adapter
from megatron_align.model.families import ModelShape
from megatron_align.model.families.adapter import Adapter
from megatron_align.model.families.frozen import frozen_tensors
from megatron_align.model.fp8 import require_widths
from megatron_align.model.kernel_choice import KernelChoice
from megatron_align.model.policy import transformer_config
from megatron_align.model.second_model import second_model_config
from megatron_align.objectives.registry import build_objective, has_critic, reference_mode

HEADROOM = (
    0.08  # share of a GPU's memory that should stay free: temporaries and fragmentation are not measured
)
MAX_GPUS = 4096  # largest number tried when nothing fits


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A layout with its memory and the estimated time of its step.

    Args:
        placement: model and layout.
        work: the mean step.
        memory: memory of each pipeline stage.
        time: estimated time of a step.
        peak_unless_recomputed: peak bytes if all activations were saved; None if they are.
        before: memory of each stage before training, by a cached reference of another shape; empty: there is none.
    """

    placement: Placement
    work: Work
    memory: tuple[StageMemory, ...]
    time: StepTime
    peak_unless_recomputed: int | None
    before: tuple[StageMemory, ...] = ()

    @property
    def peak(self) -> int:
        """Bytes on the stage that needs most."""
        return max(stage.total for stage in (*self.memory, *self.before))

    def has_headroom(self, gpu_bytes: int) -> bool:
        """Return whether the share ``HEADROOM`` of the memory stays free on every stage."""
        return self.peak <= gpu_bytes * (1 - HEADROOM)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """Request for a plan: a run, and the GPUs it may use.

    Args:
        config: configuration of the run.
        shape: dimensions of the trained model.
        gpus: number of GPUs.
        bytes: memory of each GPU.
        chip: peak rates of each GPU.
        work: function that returns the work of steps on a placement.
        efficiency: see :func:`megatron_align.cost.time.step_time`.
        steps: of the run; None: not known, as it follows from data that are not tokenised.
        epochs: passes over the data; None: not known.
        online: what a run on rollouts adds.
        second: shapes of reference and critic where they are not the policy's.
    """

    config: RunConfig
    shape: ModelShape
    gpus: int
    bytes: int
    chip: Chip
    work: WorkOf
    efficiency: float = EFFICIENCY
    steps: int | None = None
    epochs: float | None = None
    online: OnlineCosts = field(default_factory=OnlineCosts)
    second: SecondShapes = SecondShapes()
    adapter: Adapter | None = field(init=False)
    frozen: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        model = self.config.model
        object.__setattr__(self, "adapter", resolve_adapter(model.adapter, self.shape))
        object.__setattr__(self, "frozen", frozen_tensors(self.shape, model.freeze))


def evaluate(request: PlanRequest, placement: Placement) -> Candidate:
    """Return the cost of a placement with its own ``recompute_layers``."""
    work = mean(request.work(placement))
    config = request.config
    time = time_of(config, placement, work, request.chip, request.efficiency)
    other = request.online.seconds(config, placement, work, request.chip, request.efficiency)
    return Candidate(
        placement=placement,
        work=work,
        memory=memory_of(config, placement, work.micro_batches, request.online),
        time=replace(time, other=time.other + other),
        peak_unless_recomputed=None,
        before=memory_before(config, placement),
    )


def memory_of(
    config: RunConfig, placement: Placement, micro_batches: int, online: OnlineCosts | None = None
) -> tuple[StageMemory, ...]:
    """Return the memory of each stage for packs of the maximum length; ``online``: with reward models.

    Raises:
        InputError: the layout does not divide the layers of a reward model.
    """
    tokens = _pack_tokens(config, placement)
    # An adapter's reference is the policy with the adapter off.
    live = reference_mode(config) == "live" and (
        placement.adapter is None or config.reference.path is not None
    )
    top_k = _top_k(config)
    engine = engine_bytes(config, placement)
    critic = placement.as_critic() if has_critic(config) else None

    def of_stage(stage: int) -> StageMemory:
        one = stage_memory(placement, stage, tokens, micro_batches, live_reference=live, top_k=top_k)
        if live and placement.second.reference is not None:
            one = one.with_work_of(pass_memory(placement.as_reference(), stage, tokens))
        if critic is not None and placement.second.critic is not None:
            one = one.with_work_of(stage_memory(critic, stage, tokens, micro_batches))
        return replace(
            one,
            engine=engine,
            rewards=0 if online is None else online.reward_bytes(placement, stage),
            critic=state_bytes(critic, stage).total if critic is not None else 0,
        )

    return tuple(of_stage(stage) for stage in range(placement.parallel.pipeline))


def memory_before(config: RunConfig, placement: Placement) -> tuple[StageMemory, ...]:
    """Return the memory of each stage before training, while a reference of another shape computes cached columns.

    Empty: there is none; one of the policy's shape needs less than training does.
    """
    ptx = getattr(config.objective, "ptx", None)
    cached = reference_mode(config) == "cached" or (ptx is not None and ptx.columns)
    if placement.second.reference is None or not cached:
        return ()
    tokens, teacher = _pack_tokens(config, placement), placement.as_reference()
    return tuple(
        pass_memory(teacher, stage, tokens, _top_k(config)) for stage in range(placement.parallel.pipeline)
    )


def _pack_tokens(config: RunConfig, placement: Placement) -> int:
    """Return the padded length of the longest pack."""
    multiple = placement.token_multiple
    return -(-config.data.sequence_length // multiple) * multiple


def _top_k(config: RunConfig) -> int:
    """Return how many of the reference's likeliest tokens the loss reads of each row."""
    ptx = getattr(config.objective, "ptx", None)
    return max(build_objective(config.objective).top_k, ptx.columns if ptx else 0)


def time_of(
    config: RunConfig, placement: Placement, work: Work, chip: Chip, efficiency: float = EFFICIENCY
) -> StepTime:
    """Estimate the time of a run's step: the policy's, a reference's of another shape, and the critic's after it."""
    of_policy, of_reference = passes_of(config, placement)
    time = step_time(placement, work, chip, of_policy, efficiency)
    if of_reference:
        once = one_pass_seconds(placement.as_reference(), work, chip, efficiency)
        time = replace(time, other=time.other + of_reference * once)
    if not has_critic(config):
        return time
    return time + step_time(placement.as_critic(), work, chip, CRITIC_PASSES, efficiency)


def candidates(request: PlanRequest) -> list[Candidate]:
    """Return every layout that divides the model, with the recomputation it needs.

    The fastest come first, but those with headroom before those without.
    """
    every = [one for placement in placements(request) for one in _with_recompute(request, placement)]
    return sorted(every, key=lambda one: (not one.has_headroom(request.bytes), one.time.total, one.peak))


def best(request: PlanRequest, count: int) -> list[Candidate]:
    """Return the first layouts that fit, at most one per tensor x pipeline x context."""
    fitting: dict[tuple[int, int, int], Candidate] = {}
    for one in candidates(request):
        parallel = one.placement.parallel
        key = (parallel.tensor, parallel.pipeline, parallel.context)
        if one.peak <= request.bytes and key not in fitting:
            fitting[key] = one
    return list(fitting.values())[:count]


def smallest_fitting(request: PlanRequest) -> Candidate | None:
    """Return the fastest layout on the fewest GPUs that suffice, doubling from ``request.gpus``; None if none does."""
    gpus = request.gpus * 2
    while gpus <= MAX_GPUS:
        if fitting := best(replace(request, gpus=gpus), 1):
            return fitting[0]
        gpus *= 2
    return None


def _with_recompute(request: PlanRequest, placement: Placement) -> list[Candidate]:
    """Save all activations if they fit; unless with headroom, also choose the ``recompute_layers`` of least memory."""
    saved = evaluate(request, placement)
    if saved.has_headroom(request.bytes):
        return [saved]
    per_chunk = placement.chunks(0)[0].layers
    choices = [replace(placement, recompute_layers=k) for k in _divisors(per_chunk)]

    def activation_bytes(one: Placement) -> int:
        stage = stage_bytes(one, 0, request.config.data.sequence_length, saved.work.micro_batches)
        return stage.held + stage.recomputed

    recomputed = evaluate(request, min(choices, key=activation_bytes))
    fitting = [saved] if saved.peak <= request.bytes else []
    return [*fitting, replace(recomputed, peak_unless_recomputed=saved.peak)]


def run_seconds(request: PlanRequest, one: Candidate) -> float | None:
    """Estimate the seconds of all steps and of a cached reference's pass over the data; None: the steps are not known.

    Validation, saving and loading are not in it.
    """
    if request.steps is None:
        return None
    seconds = request.steps * one.time.total
    if reference_mode(request.config) == "cached":
        steps_of_a_pass = request.steps / max(1.0, request.epochs or 1.0)
        seconds += steps_of_a_pass * one_pass_seconds(
            one.placement.as_reference(), one.work, request.chip, request.efficiency
        )
    return seconds


def placements(request: PlanRequest) -> Iterator[Placement]:
    """Yield the layouts that divide the GPUs and the model."""
    layers, tokens = request.shape.num_layers, request.config.data.sequence_length
    powers = [2**i for i in range(request.gpus.bit_length())]
    for tensor in (n for n in powers if n <= NODE):
        for pipeline in _divisors(layers):
            for context in (n for n in powers if n * 1024 <= tokens or n == 1):
                model_ranks = tensor * pipeline * context
                if request.gpus % model_ranks:
                    continue
                for chunks in _chunks(layers, pipeline):
                    placement = _placement(request, tensor, pipeline, context, chunks)
                    if placement is not None:
                        yield placement


def _placement(
    request: PlanRequest, tensor: int, pipeline: int, context: int, chunks: int | None
) -> Placement | None:
    """Return the placement, or None if the checks of a run refuse it."""
    config, given = request.config, request.config.parallel
    several = request.gpus > tensor * pipeline * context
    try:
        parallel = replace(
            given,
            tensor=tensor,
            pipeline=pipeline,
            context=context,
            context_kind=config.parallel.context_kind if context > 1 else "auto",
            virtual_pipeline=chunks,
            sequence=True,
            first_stage_layers=None,
            last_stage_layers=None,
            count_embedding=False,
            count_loss=False,
            overlap_grad_reduce=given.overlap_grad_reduce and several,
            overlap_param_gather=given.overlap_param_gather and several,
            overlap_p2p=given.overlap_p2p and chunks is not None,
        )
        placement = Placement(
            shape=request.shape,
            parallel=parallel,
            data=parallel.data_parallel(request.gpus),
            precision=config.train.precision,
            adapter=request.adapter,
            frozen=request.frozen,
            fp8=KernelChoice.of_run(config).fp8,
            second=request.second,
        )
        # divisibility does not depend on the precision
        for shape in (request.shape, *(model.shape for model in request.online.reward_models)):
            transformer_config(shape, parallel, torch.bfloat16)
        require_widths(request.shape, parallel, placement.fp8)
        require_divided(config, placement)
    except InputError:
        return None
    return placement


def require_divided(config: RunConfig, placement: Placement) -> None:
    """Check that a layout divides a reference or a critic of another shape.

    Raises:
        InputError: it does not; naming the model.
    """
    for name, shape in placement.second._asdict().items():
        if shape is not None:
            kernels = KernelChoice(fp8=placement.fp8)
            policy = transformer_config(placement.shape, placement.parallel, torch.bfloat16, kernels=kernels)
            on_layout = replace(config, parallel=placement.parallel)
            second_model_config(f"{name}.path", shape, placement.shape, policy, on_layout)


def _chunks(layers: int, pipeline: int) -> list[int | None]:
    if pipeline == 1:
        return [None]
    return [None, *(n for n in _divisors(layers // pipeline) if 2 <= n <= 8)]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
