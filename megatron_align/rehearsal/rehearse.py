"""Rehearse a step of a run on one rank of many: build the model, wrap it, check it, train it, all without values."""

from __future__ import annotations

import gc
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_align.config import RunConfig
from megatron_align.cost.memory import StageMemory
from megatron_align.cost.placement import Placement
from megatron_align.cost.search import memory_of
from megatron_align.errors import TrainingFault, require
from megatron_align.hf.adapter_options import resolve_adapter
from megatron_align.hf.assets import AssetChanges
from megatron_align.model import parallel
from megatron_align.model.families import ModelShape, read_shape
from megatron_align.model.families.frozen import frozen_tensors
from megatron_align.model.kernel_choice import KernelChoice, PolicyConfig
from megatron_align.model.parallel import RankInfo
from megatron_align.model.policy import Policy, build_policy, transformer_config
from megatron_align.objectives.policy_gradient import PolicyGradientObjective
from megatron_align.objectives.registry import build_objective, objective_class, reference_mode
from megatron_align.rehearsal import device, ranks
from megatron_align.rehearsal.full_packs import COMPLETIONS, FullPacks
from megatron_align.rehearsal.ledger import Ledger
from megatron_align.rehearsal.report import STEP, RankReport
from megatron_align.rehearsal.tracker import Tracker, on_host, tracking
from megatron_align.training import self_check
from megatron_align.training.batches import pin_step
from megatron_align.training.optimizer import build_optimizer, wrap_data_parallel
from megatron_align.training.reference.builder import References, build_reference
from megatron_align.training.reference.logprobs import LiveReference
from megatron_align.training.reference.top_k import LOGITS
from megatron_align.training.reference_model import ReferenceModel, reference_shape, takes_teacher
from megatron_align.training.scoring import Scorer
from megatron_align.training.setup import DTYPES, RunSetup, locate, trained_shape
from megatron_align.training.trainer import Trainer
from megatron_align.training.watchdog import Watchdog


def install() -> None:
    """Prepare this process, in which the stub is loaded and torch imported, for :func:`rehearse`."""
    device.install()
    ranks.install()
    # What is made on the host from lengths has values: layouts, packs, their parts.
    self_check._pack_both_ways = on_host(self_check._pack_both_ways)
    Policy.to = _require_on_gpu


def _require_on_gpu(policy: Policy, where: torch.device) -> Policy:
    """Replace ``Policy.to``, as tensors without values cannot be moved in place: all must be there already."""
    for name, tensor in (*policy.named_parameters(), *policy.named_buffers()):
        if tensor.device.type != where.type:
            device.Current.ledger.fault(f"{name} is built on {tensor.device}")
    return policy


def require_can_rehearse(config: RunConfig) -> None:
    """Check that a run's step can be rehearsed.

    Raises:
        InputError: its steps are made of rollouts, or another package computes a part of it.
    """
    kind = objective_class(config.objective.name)
    require(
        not issubclass(kind, PolicyGradientObjective) and kind.data[0] in COMPLETIONS,
        f"a step of objective {config.objective.name} cannot be rehearsed: its packs are made of rollouts; rehearse "
        "objective sft with the same model, layout and data.sequence_length",
    )
    for option, value, others, instead in (
        ("model.attention", config.model.attention, ("flash", "te"), "auto"),
        ("model.linear", config.model.linear, ("te",), "torch"),
        ("optimizer.implementation", config.optimizer.implementation, ("apex",), "torch"),
        ("train.gradient_accumulation_fusion", config.train.gradient_accumulation_fusion, (True,), "false"),
    ):
        require(
            value not in others,
            f"{option}: {str(value).lower()} cannot be rehearsed, as its kernels need a GPU: rehearse {option}: "
            f"{instead}",
        )


def enough_micro_batches(placement: Placement) -> int:
    """Return the micro-batches from which on more of them change nothing but the duration of a step."""
    parallel = placement.parallel
    return 3 * parallel.pipeline * (2 if parallel.chunks > 1 else 1)


def rehearse(
    config: RunConfig, world_size: int, stage: int, most_micro_batches: int | None = None
) -> RankReport:
    """Rehearse the first rank of a pipeline stage.

    Args:
        config: of the run.
        world_size: ranks of the run.
        stage: 0-based.
        most_micro_batches: of the step; None: :func:`enough_micro_batches`.

    Raises:
        InputError: the run cannot be rehearsed, or its layout does not fit.
    """
    require_can_rehearse(config)
    layout = config.parallel
    rank = stage * (world_size // layout.pipeline)
    info = RankInfo(rank=rank, local_rank=rank % device.GPUS_OF_A_NODE, world_size=world_size)
    setup = _setup(config, info, most_micro_batches)
    ledger = device.Current.ledger = Ledger()
    with tracking(ledger) as tracker, ranks.alone(info, layout):
        batches, tokens = _train(setup, ledger, tracker)
    gc.collect()
    placement = Placement.of_run(config, setup.shape, world_size, setup.second_shapes)
    planned: StageMemory = memory_of(config, placement, batches)[stage]
    return RankReport.of(
        ledger, stage=stage, rank=rank, micro_batches=batches, tokens=tokens, planned=planned.tensors
    )


def _setup(config: RunConfig, info: RankInfo, most_micro_batches: int | None) -> RunSetup:
    """Return the run as it is checked, with full packs for its data and one step; nothing is read but config.json."""
    _, assets = locate(config.model.path, weights=False)
    start = read_shape(assets)
    shape = trained_shape(start, config, assets)
    placement = Placement.of_run(config, shape, info.world_size)
    train, length = config.train, config.data.sequence_length
    samples = train.global_batch_size or max(1, (train.global_batch_tokens or 0) // length)
    most = (most_micro_batches or enough_micro_batches(placement)) * placement.data
    samples = min(samples, most)
    config = replace(
        config,
        train=replace(train, global_batch_size=samples, global_batch_tokens=None, steps=1, epochs=None),
        optimizer=replace(config.optimizer, warmup_steps=0),
        data=replace(config.data, train="full packs", shuffle=False),
    )
    megatron = transformer_config(
        shape,
        config.parallel,
        DTYPES[train.precision],
        train.recompute_layers,
        train.recompute_modules,
        KernelChoice.of_run(config),
    )
    objective = build_objective(config.objective)
    logits = np.dtype(LOGITS[train.precision])
    return RunSetup(
        config=config,
        rank_info=info,
        folder=Path(config.checkpoint.dir),
        start_shape=start,
        shape=shape,
        adapter=resolve_adapter(config.model.adapter, shape),
        frozen=frozen_tensors(shape, config.model.freeze),
        assets=assets,
        weights=assets,
        resume=None,
        megatron=megatron,
        reference=_reference(config, shape, megatron),
        train=FullPacks(samples, length, objective, logits),
        data_key="",
        validation=None,
        ptx=None,
        critic=None,
        steps=1,
        changes=AssetChanges(),
        notes=(),
    )


def _reference(config: RunConfig, policy: ModelShape, megatron: PolicyConfig) -> ReferenceModel:
    """Return the reference of the run, of which only config.json is read."""
    if config.reference.path is None or not takes_teacher(config):
        return ReferenceModel.of_policy(config, policy, megatron)
    shape = reference_shape(config, policy, locate(config.reference.path, weights=False)[1])
    return ReferenceModel.of_shape(config, shape, policy, megatron)


def _train(setup: RunSetup, ledger: Ledger, tracker: Tracker) -> tuple[int, int]:
    """Build and make a step as a run does, without its files; return its micro-batches and their tokens."""
    trainer = _trainer(setup, ledger)
    if setup.config.train.self_check:
        with (
            ledger.during("self-check"),
            suppress(TrainingFault),
        ):  # its verdict is on values, which are made up
            self_check.before_first_step(trainer.model, trainer.train_batches, 0, trainer.groups)
    data = on_host(lambda: pin_step(trainer.train_batches.step(0)), tracker)()  # as the prefetch thread does
    with ledger.during(STEP):
        trainer.begin_step()
        trainer.train_step(data)
    return len(data.batches), data.batches[0].tokens_T.shape[0]


def _trainer(setup: RunSetup, ledger: Ledger) -> Trainer:
    config, groups = setup.config, parallel.groups()
    objective = build_objective(config.objective)
    watchdog = Watchdog(dist.HashStore(), setup.rank_info, config.parallel.timeout_seconds)
    with ledger.during("model"):
        chunks = build_policy(setup.megatron, setup.shape, groups, setup.adapter, setup.frozen)
    with ledger.during("gradient buffers"):
        model = wrap_data_parallel(chunks, config.parallel)
    with ledger.during("optimizer"):
        optimizer = build_optimizer(model, config.optimizer, groups)
    mode, live = reference_mode(config), None
    if mode == "live":
        with ledger.during("reference"):
            own = setup.adapter is not None and config.reference.path is None
            other = model if own else build_reference(setup.reference, groups)
            live = LiveReference(Scorer(other, objective, base=own), groups)
    references = References(
        mode=mode, columns={}, live=live, sync_steps=None, mixup_alpha=None, weights_hash=None
    )
    return Trainer(setup, watchdog, objective, model, optimizer, references)
