"""Checks around a run's first step (``train.self_check``): layout bugs that would otherwise train silently wrong.

Before the first step, resumed or not, over all ranks:

- step plan: every rank computed the same packs.
- replicas: every copy of a parameter is bit-identical: on data-parallel ranks, on tensor-parallel ranks that do not
  split it, on the first and last pipeline stage if embeddings are tied.
- packing: two truncated samples of the step give the same gradient in one pack as in one pack each. The gradients are
  subtracted in the gradient buffer itself, which is zeroed before every step anyway, so no extra memory is needed.

After step 1 of a run whose policy starts as its own reference: rewards are 0, and DPO's loss is ln 2.

A failed check is raised as one TrainingFault on every rank. No check changes a number of the run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_align.config import RunConfig
from megatron_align.data.batching.collate import PackValues, pack
from megatron_align.data.batching.context_parts import take_part
from megatron_align.data.batching.step_batches import StepBatches
from megatron_align.errors import TrainingFault
from megatron_align.objectives.base import Objective, Sums
from megatron_align.objectives.registry import build_objective, reference_mode
from megatron_align.records import LossRows, PackedBatch, Sample
from megatron_align.training.step import Stepper

# Bounds on |difference| / |gradient| with and without packing. Sums are taken in another order, in bf16 with 8-bit
# mantissas and, as shapes differ, in other kernels. A leak between samples changes the gradient by O(1).
PACKING_BOUND = {torch.float32: 1e-4, torch.bfloat16: 0.1}
# In FP8, where samples of a pack also share scales and gradients have 2 bits of mantissa.
FP8_PACKING_BOUND = 0.3
# A gradient that nearly cancels (of a key's bias, which softmax ignores) is rounding noise: its difference is compared
# with this fraction of the norm of all gradients instead.
NOISE_FLOOR = 0.01
# Bounds on |reward| / |beta x log-prob|: a cached reference may have been computed on another layout.
IDENTITY_BOUND = {torch.float32: 1e-4, torch.bfloat16: 0.02}
FP8_IDENTITY_BOUND = 0.05  # the reference's packs of the same samples have other scales on another layout
KEPT_TOKENS = 32  # of a prompt, and of each completion, in the packing check
HASHED_ELEMENTS = 2**20  # hashed at a time, in 32 MiB: no step needs less memory


def before_first_step(
    model: Sequence[DistributedDataParallel],
    batches: StepBatches,
    step: int,
    groups: ProcessGroupCollection,
    critic: Sequence[DistributedDataParallel] = (),
) -> None:
    """Check step plan, replicas (of a critic too) and packing; ``step`` is the next one, 0-based.

    Raises:
        TrainingFault: on every rank, naming the first rank and tensor where something differs.
    """
    _require_none(_plan_faults(batches, step))
    _require_none(_replica_faults(model, groups))
    _require_none([f"critic: {fault}" for fault in _replica_faults(critic, groups)])
    _require_none(_packing_faults(model, batches, step, groups))


def after_first_step(config: RunConfig, metrics: Mapping[str, float], dtype: torch.dtype) -> None:
    """Check step 1 of a policy that starts as its own reference; ``metrics`` are that step's.

    Raises:
        TrainingFault: on every rank, as metrics are global.
    """
    objective = build_objective(config.objective)
    if reference_mode(config) in (None, "none") or objective.beta is None:
        return
    if config.reference.path not in (None, config.model.path):
        return
    if config.model.adapter and config.model.adapter.path:
        return  # its reference is the base, without the adapter
    adapter = config.model.adapter
    if adapter and adapter.init != "default" and (adapter.dropout or reference_mode(config) == "cached"):
        return  # A's input is dropped; the cached base is rounded once less than that without A's and B's start
    bound = IDENTITY_BOUND[dtype] if config.train.fp8 is None else FP8_IDENTITY_BOUND
    bounds = {side: bound * objective.beta * abs(metrics[f"{side}_logps"]) for side in ("chosen", "rejected")}
    for side, bound in bounds.items():
        reward = metrics[f"{side}_reward"]
        if not abs(reward) <= bound:
            raise TrainingFault(
                f"self-check: the policy starts as its reference, so {side}_reward of step 1 must be 0 within "
                f"{bound:.2g}, got {reward:.6g}"
            )
    # A margin m moves -log sigmoid(m) by m / 2 at 0.
    expected = objective.loss_at_reference
    if expected is not None and not abs(metrics["loss"] - expected) <= sum(bounds.values()) / 2:
        raise TrainingFault(
            f"self-check: the policy starts as its reference, so the loss of step 1 must be {expected:.6f}, "
            f"got {metrics['loss']:.6f}"
        )


def _require_none(faults: list[str]) -> None:
    """Raise on every rank if any rank found a fault; each calls this."""
    found: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, faults)
    if every := [fault for of_rank in found for fault in of_rank]:
        rest = f" (and {len(every) - 1} similar)" if len(every) > 1 else ""
        raise TrainingFault(f"self-check: {every[0]}{rest}")


def _plan_faults(batches: StepBatches, step: int) -> list[str]:
    own = batches.fingerprint(step)
    found = [""] * dist.get_world_size()
    dist.all_gather_object(found, own)
    if own == found[0]:
        return []
    return [
        f"rank {dist.get_rank()} must compute the same packs as rank 0; its step plan of step {step + 1} is "
        f"{own[:12]}, rank 0's is {found[0][:12]}"
    ]


def _replica_faults(model: Sequence[DistributedDataParallel], groups: ProcessGroupCollection) -> list[str]:
    parameters = {name: p for chunk in model for name, p in chunk.module.global_parameters().items()}
    unsplit = {name: p for name, p in parameters.items() if not getattr(p, "tensor_model_parallel", False)}
    faults = _replica_differences(parameters, groups.dp_cp, "a data-parallel replica")
    faults += _replica_differences(unsplit, groups.tp, "a tensor-parallel rank that does not split it")
    tied = [chunk.module for chunk in model if chunk.module.share_embeddings_and_output_weights]
    ends = [policy for policy in tied if policy.pre_process or policy.post_process]
    if ends and groups.pp.size() > 1:
        weight = ends[0].shared_embedding_or_output_weight()
        faults += _replica_differences(
            {"the tied embedding": weight}, groups.embd, "the other end of the pipeline"
        )
    return faults


def _replica_differences(parameters: Mapping[str, Tensor], group: dist.ProcessGroup, other: str) -> list[str]:
    """Return one line for each parameter that differs from the first rank of ``group``."""
    if group.size() == 1 or not parameters:
        return []
    own_P2 = torch.stack([hashed(parameter) for parameter in parameters.values()])
    found = [torch.empty_like(own_P2) for _ in range(group.size())]
    dist.all_gather(found, own_P2, group=group)
    same_P = (own_P2 == found[0]).all(1).tolist()
    first = dist.get_global_rank(group, 0)
    return [
        f"{name} must be the same on rank {dist.get_rank()} and on rank {first}, {other}; it differs"
        for name, same in zip(parameters, same_P, strict=True)
        if not same
    ]


def hashed(tensor: Tensor) -> Tensor:
    """Hash a tensor's bits to two int64: their sum, and their sum weighted by index (modulo 2^64)."""
    integer = torch.int16 if tensor.element_size() == 2 else torch.int32
    bits = tensor.detach().contiguous().view(integer).flatten()
    total = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for start in range(0, bits.numel(), HASHED_ELEMENTS):
        part = bits[start : start + HASHED_ELEMENTS].long()
        index = torch.arange(start + 1, start + 1 + part.numel(), device=tensor.device)
        total += torch.stack([part.sum(), (part * index).sum()])
    return total


class _Probe(Objective):
    """The weighted sum of log-probs, or of rewards: a loss whose gradient reaches every parameter."""

    whole_samples = False

    def __init__(self, of_rewards: bool):
        self.of_rewards, self.sum_names = of_rewards, ()

    def loss(
        self, values: Tensor, rows: LossRows, row_statistics: Mapping[str, Tensor]
    ) -> tuple[Tensor, Sums]:
        """See :class:`Objective`."""
        weights = rows.completions.weight_C if self.of_rewards else rows.weight_N
        return (values * weights).sum(), {}


def _packing_faults(
    model: Sequence[DistributedDataParallel],
    batches: StepBatches,
    step: int,
    groups: ProcessGroupCollection,
) -> list[str]:
    policy = model[0].module
    stepper = Stepper(model, _Probe(policy.shape.is_reward), groups)
    parameters = {name: p for chunk in model for name, p in chunk.module.trained_parameters().items()}
    together, separate = _pack_both_ways([cut(sample) for sample in batches.shortest(step, 2)], batches)
    # Full gradients: a context rank holds other tokens of the joint pack than of the separate ones; only sums agree.
    with stepper.full_gradients():
        stepper.gradients(together)
        norms = _norms(parameters)
        stepper.gradients(together + separate)
        rests = _norms(parameters)
    bound = (
        PACKING_BOUND[policy.config.params_dtype] if policy.config.kernels.fp8 is None else FP8_PACKING_BOUND
    )
    floor = NOISE_FLOOR * math.hypot(*norms.values())
    off = {name: norm / max(norms[name], floor) for name, norm in rests.items() if norm > 0}
    return [
        f"the gradient of {name} on rank {dist.get_rank()} must be the same with and without packing within "
        f"{bound:g} of its norm; it differs by {share:.3g}"
        for name, share in off.items()
        if not share <= bound
    ]


def _norms(parameters: Mapping[str, Tensor]) -> dict[str, float]:
    if not parameters:
        return {}  # a pipeline stage of which nothing is trained
    norms = [
        torch.linalg.vector_norm(parameter.main_grad)  # type: ignore[attr-defined]  # megatron-core's
        for parameter in parameters.values()
    ]
    return dict(zip(parameters, torch.stack(norms).tolist(), strict=True))


def _pack_both_ways(
    samples: Sequence[Sample], batches: StepBatches
) -> tuple[list[PackedBatch], list[PackedBatch]]:
    """Return micro-batches with all samples in one pack, and with each in its own pack and a negative weight."""
    options = batches.options
    share_prefix = options.share_prefix
    tokens = sum(len(s.tokens_L) if share_prefix else _repeated(s) for s in samples)
    tokens = -(-tokens // options.multiple) * options.multiple

    def packed(some: Sequence[Sample], sign: float) -> PackedBatch:
        weights = [sign / max(1, int(sample.scored_L.sum())) for sample in some]
        weight_C = [sign * (1 + i) for sample in some for i in range(max(1, len(sample.completion_lengths)))]
        values = replace(PackValues.unknown(len(weight_C)), weight_C=np.array(weight_C, np.float64))
        batch = pack(some, weights, tokens, values=values, share_prefix=share_prefix)
        return take_part(batch, batches.rank.context)

    def filled(packs: list[PackedBatch]) -> list[PackedBatch]:
        return packs + [packed([], 0.0)] * (-len(packs) % options.micro_batch_multiple)

    return filled([packed(samples, 1.0)]), filled([packed([sample], -1.0) for sample in samples])


def _repeated(sample: Sample) -> int:
    return len(sample.tokens_L) + max(0, len(sample.completion_lengths) - 1) * sample.prompt_length


def cut(sample: Sample, kept: int = KEPT_TOKENS) -> Sample:
    """Shorten a sample to the end of its prompt and the start of each completion, with at least one scored token."""
    prompt = min(sample.prompt_length, kept)
    lengths = sample.completion_lengths or (len(sample.tokens_L) - sample.prompt_length,)
    first = sample.prompt_length
    pieces = [np.arange(first - prompt, first)]
    for length in lengths:
        pieces.append(np.arange(first, first + min(length, kept)))
        first += length
    places = np.concatenate(pieces)
    scored_L = sample.scored_L[places].copy()
    scored_L[max(1, prompt) :] |= not scored_L.any()  # if no scored token is left, score them all
    short = tuple(min(length, kept) for length in lengths)
    return replace(
        sample,
        tokens_L=sample.tokens_L[places],
        scored_L=scored_L,
        prompt_length=prompt,
        completion_lengths=short if sample.completion_lengths else (),
    )
