"""Check everything that a user can get wrong, and tokenise the data, before the ranks meet.

No process group exists yet, so a long preparation of data cannot time out a collective.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

import megatron_align
from megatron_align.checkpoint.card import require_all_weights
from megatron_align.checkpoint.folder import ASSETS, find_checkpoint, folder_taken
from megatron_align.config import RunConfig, TrainConfig
from megatron_align.cost.placement import SecondShapes
from megatron_align.data.batching.packing import require_room
from megatron_align.data.batching.rollout_order import train_order
from megatron_align.data.batching.sampler import step_order
from megatron_align.data.sample_table import TrainingData
from megatron_align.data.store import TokenStore
from megatron_align.data.tokenize.cache_key import StoreSpec
from megatron_align.data.tokenize.local_ranks import prepare_or_wait
from megatron_align.data.tokenize.prepare import prepare
from megatron_align.data.tokenize.record_blocks import read_shapes
from megatron_align.errors import InputError, require
from megatron_align.hf.adapter_options import resolve_adapter
from megatron_align.hf.assets import AssetChanges
from megatron_align.hf.hub import fetch_or_wait, model_folder, require_can_upload
from megatron_align.hf.load import open_hf, require_tied_head
from megatron_align.model import parallel
from megatron_align.model.families import ModelShape, read_shape
from megatron_align.model.families.adapter import Adapter
from megatron_align.model.families.frozen import frozen_tensors
from megatron_align.model.kernel_choice import KernelChoice, PolicyConfig
from megatron_align.model.policy import transformer_config
from megatron_align.model.second_model import second_model_config
from megatron_align.monitoring.trackers import check_logging
from megatron_align.objectives.policy_gradient import PolicyGradientObjective
from megatron_align.objectives.policy_gradient_options import PolicyGradientOptions
from megatron_align.objectives.ptx import PTX
from megatron_align.objectives.registry import build_objective, objective_class, reference_mode
from megatron_align.rollout.prompt_table import open_prompts
from megatron_align.training.asset_changes import Notes, plan_asset_changes
from megatron_align.training.critic_start import (
    CriticStart,
    critic_paths,
    find_critic,
    has_shape_of,
    require_same_critic,
    with_changes,
)
from megatron_align.training.lone_samples import require_other_samples
from megatron_align.training.model_checks import (
    require_kernels,
    require_positions,
    require_rollouts,
    require_top_k,
    require_unshared_prompts,
    require_vocabulary,
)
from megatron_align.training.output_folder import (
    remove_empty_folders_after_bad_input,
    require_replaceable_outputs,
    require_writable,
)
from megatron_align.training.reference_model import ReferenceModel, find_reference, require_readable
from megatron_align.training.resume import ResumePoint, find_resume_point
from megatron_align.training.resume_compatibility import require_same_run
from megatron_align.training.resumed_data import fix_template_date, key_of_same_data
from megatron_align.training.run_lock import RunLock
from megatron_align.training.validation_tasks import ValidationTasks

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSetup:
    """A checked run, the same on every rank, before the ranks meet.

    Args:
        config: of the run.
        rank_info: this process among the ranks.
        folder: ``checkpoint.dir``.
        start_shape: of the weights that training starts from.
        shape: of the model that is trained (a reward model may start from a language model).
        adapter: of the model that is trained; None: its weights are trained.
        frozen: Megatron names of weights that are not trained.
        assets: HF folder with config and tokenizer.
        weights: HF folder or checkpoint that training starts from.
        resume: newest checkpoint of the run; None: the run starts at step 1.
        megatron: megatron-core's configuration of the model.
        train: training data.
        data_key: of the training data, for the checkpoint that the run resumes from.
        validation: validation data; None: the run has none.
        ptx: supervised data of each step on rollouts; None: the objective has no such term.
        reference: the model that an objective compares with, if it compares.
        critic: the model that the critic starts from; None: the objective has none.
        steps: of the complete run.
        changes: of training in the files of ``assets``, for checkpoints and export.
        notes: what to say about these changes at the start.
        tasks: of ``validation.tasks``; None: the run has none.
        lock: of ``checkpoint.dir``; None: a dry run, which changes nothing there.
    """

    config: RunConfig
    rank_info: parallel.RankInfo
    folder: Path
    start_shape: ModelShape
    shape: ModelShape
    adapter: Adapter | None
    frozen: frozenset[str]
    assets: Path
    weights: Path
    resume: ResumePoint | None
    megatron: PolicyConfig
    reference: ReferenceModel
    train: TrainingData
    data_key: str
    validation: TrainingData | None
    ptx: TrainingData | None
    critic: CriticStart | None
    steps: int
    changes: AssetChanges
    notes: Notes
    lock: RunLock | None = None
    tasks: ValidationTasks | None = None

    def taken_by(self) -> str | None:
        """Return on rank 0 which process took the folder from this run, which was paused; None: none has."""
        return self.lock.taken_by() if self.lock else None

    @property
    def second_shapes(self) -> SecondShapes:
        """The shapes of reference and critic where they are not the policy's."""
        reference = self.reference.shape if self.reference.shape != self.shape else None
        if self.critic is None or has_shape_of(self.shape, self.critic.shape):
            return SecondShapes(reference)
        return SecondShapes(reference, self.critic.shape)

    def scoring_vocabularies(self) -> dict[str, int]:
        """Return the rows of each model that scores the policy's completions and has fewer, by its option."""
        live = reference_mode(self.config) == "live"
        sizes = {"reference.path": self.reference.shape.vocab_size} if live else {}
        if self.critic is not None:
            sizes["critic.path"] = self.critic.shape.vocab_size
        return {name: size for name, size in sizes.items() if size < self.shape.vocab_size}

    def require_folder(self) -> None:
        """Check that the folder is still this run's, before anything is changed there; collective.

        Raises:
            TrainingFault: on every rank: another process took it while this run was paused.
        """
        taken_by = self.taken_by()
        [losses] = parallel.all_reduce_sum([float(bool(taken_by))])
        if losses:
            raise folder_taken(taken_by)


def prepare_run(
    config: RunConfig,
    rank_info: parallel.RankInfo,
    scratch_cache: Path | None = None,
    lock: RunLock | None = None,
) -> RunSetup:
    """Check a run and tokenise its data.

    Args:
        config: of the run.
        rank_info: this process among the ranks.
        scratch_cache: for a dry run: nothing is written anywhere else, and data that are not tokenised yet are
            tokenised into this folder.
        lock: of ``checkpoint.dir``, acquired here before anything is changed there; see
            :func:`.run_context.prepared_run`.

    Raises:
        InputError: for anything that the user can correct.
    """
    config.parallel.data_parallel(rank_info.world_size)
    check_logging(config.logging)
    if config.checkpoint.push_to_hub:
        require_can_upload(config.checkpoint.push_to_hub)
    waited_for = rank_info.world_size > 1 and scratch_cache is None
    for path in filter(None, (config.model.path, config.reference.path, *critic_paths(config))):
        fetch_or_wait(path, rank_info.local_rank, waited_for=waited_for)
    weights, assets = locate(config.model.path)
    start = read_shape(assets)
    shape = trained_shape(start, config, assets)
    megatron = transformer_config(
        shape,
        config.parallel,
        DTYPES[config.train.precision],
        config.train.recompute_layers,
        config.train.recompute_modules,
        KernelChoice.of_run(config),
    )
    require_kernels(config, shape, dry_run=scratch_cache is not None)
    require_weights(weights, assets, start)
    adapter = resolve_adapter(config.model.adapter, shape)
    frozen = frozen_tensors(shape, config.model.freeze)
    reference = ReferenceModel.of_policy(config, shape, megatron)
    if config.reference.path is not None:
        reference = find_reference(config, shape, megatron, *locate(config.reference.path), assets)
        require_kernels(config, reference.shape, dry_run=scratch_cache is not None)
    require_rollouts(config, shape)
    folders = {path: locate(path) for path in (config.model.path, *critic_paths(config))}
    critic = find_critic(config, shape, folders)
    if critic is not None:
        require_weights(*folders[critic.path], critic.start_shape)
        second_model_config("critic.path", critic.shape, shape, megatron, config, trained=True)
    # A pack of rollouts holds a prompt and completions that each have its positions after it.
    online = generates(config)
    if config.data.sequence_length > shape.max_positions and not online:
        raise InputError(
            f"data.sequence_length must not pass the model's {shape.max_positions} positions, "
            f"got {config.data.sequence_length}"
        )
    folder = Path(config.checkpoint.dir)
    require_replaceable_outputs(config, folder, adapter, critic)
    with remove_empty_folders_after_bad_input(folder, lock):
        require_writable(folder, create=scratch_cache is None, lock=lock)
        resume = find_resume_point(config, folder, shape)
        config = fix_template_date(config, assets, resume)
        stores = _open_stores(config, assets, rank_info, scratch_cache)
        named = {"objective.ptx.data" if s == "ptx" else f"data.{s}": store for s, store in stores.items()}
        require_vocabulary(named, shape)
        require_readable("reference.path", reference.shape, shape, named)
        if critic is not None:
            require_readable("critic.path", critic.shape, shape, named)
        require_unshared_prompts(config, stores)
        require_top_k(config, reference.tokens)
        require_positions(stores.get("ptx"), shape)
        steps = _require_steps_left(config, stores, resume)
        changes, notes = plan_asset_changes(config, shape, assets, stores.values())
        data_key = key_of_same_data(stores["train"], resume)
        if resume is not None:
            require_same_run(config, data_key, resume.metadata, resume.folder, assets, steps)
            require_same_critic(critic, resume.metadata, resume.folder)
        setup = RunSetup(
            config=config,
            start_shape=start,
            rank_info=rank_info,
            folder=folder,
            shape=shape,
            adapter=adapter,
            frozen=frozen,
            assets=assets,
            weights=weights,
            resume=resume,
            megatron=megatron,
            reference=reference,
            train=stores["train"],
            data_key=data_key,
            validation=stores.get("validation"),
            ptx=stores.get("ptx"),
            critic=with_changes(critic, config, shape, folders, stores.values()),
            steps=steps,
            lock=lock,
            changes=changes,
            notes=notes,
        )
        if config.validation.tasks:
            setup = dataclasses.replace(setup, tasks=megatron_align.validation_tasks(setup, scratch_cache))
    return setup


def generates(config: RunConfig) -> bool:
    """Return whether the run trains on completions that its policy generates."""
    rollouts = issubclass(objective_class(config.objective.name), PolicyGradientObjective)
    return rollouts and config.rollout.engine != "data"


def locate(path: str, *, weights: bool = True) -> tuple[Path, Path]:
    """Return the folder of a model's weights (Hugging Face folder or checkpoint), and of its config and tokenizer.

    Args:
        path: folder, checkpoint, run folder (its newest checkpoint), or name on the Hugging Face hub.
        weights: False: of a model on the hub only the configuration and the tokenizer are downloaded.
    """
    if checkpoint := find_checkpoint(path):
        return checkpoint, checkpoint / ASSETS
    folder = model_folder(path, weights=weights)
    return folder, folder


def require_weights(weights: Path, assets: Path, shape: ModelShape) -> None:
    """Check, without reading it, that a model is complete; arguments from :func:`locate`.

    Raises:
        InputError: a folder without weights, or with a tied head that differs; a checkpoint of an adapter only.
    """
    if weights == assets:
        require_tied_head(open_hf(assets)[0], shape)
    else:
        require_all_weights(weights)


def trained_shape(start: ModelShape, config: RunConfig, assets: Path) -> ModelShape:
    """Return the shape of the model that the objective trains: a reward model may start from a language model."""
    if objective_class(config.objective.name).trains_reward_model:
        return start.as_reward()
    if start.is_reward:
        raise InputError(
            f"objective {config.objective.name} needs a language model, got {start.architecture} in {assets}"
        )
    return start


def _open_stores(
    config: RunConfig, assets: Path, rank_info: parallel.RankInfo, scratch_cache: Path | None
) -> dict[str, TrainingData]:
    """Open the run's stores by split, tokenising what is not in the cache."""
    opened: dict[str, TrainingData | None] = {}
    if generates(config):
        opened["train"] = open_prompts(config.data, config.rollout, str(assets))
    for split in ("ptx",) if generates(config) else ("train", "validation", "ptx"):
        opened[split] = _open_store(config, split, assets, rank_info, scratch_cache)
    stores = {split: store for split, store in opened.items() if store is not None}
    given = isinstance(config.objective, PolicyGradientOptions) and not generates(config)
    if given and (wanted := config.rollout.completions):
        found = sorted(set(stores["train"].completion_counts.tolist()))
        require(
            found == [wanted],
            f"data.train: every prompt must have rollout.completions = {wanted} completions, or the option be null; "
            f"got {', '.join(map(str, found))}",
        )
    return stores


def _open_store(
    config: RunConfig, split: str, assets: Path, rank_info: parallel.RankInfo, scratch_cache: Path | None
) -> TokenStore | None:
    spec = StoreSpec.of_run(config, split, str(assets))
    if spec is None:
        return None
    objective = PTX(config.objective.ptx) if split == "ptx" else build_objective(config.objective)
    # Data of a kind that the objective does not take are refused before they are tokenised.
    name = "objective.ptx.data" if split == "ptx" else f"data.{split}"
    objective.require_data_kind(read_shapes(spec)[0], name, spec.sources)
    store = TokenStore(tokenised(spec, rank_info, scratch_cache))
    objective.require_data(store, name)
    return store


def tokenised(spec: StoreSpec, rank_info: parallel.RankInfo, scratch_cache: Path | None) -> Path:
    """Return the folder of a store, tokenising its data if it is not in the cache; ranks of a machine wait for one.

    Args:
        spec: of the store.
        rank_info: this process among the ranks.
        scratch_cache: of a dry run, which writes nothing anywhere else; None: no dry run.
    """
    if scratch_cache is None:
        return prepare_or_wait(spec, rank_info.local_rank, waited_for=rank_info.world_size > 1)
    path = spec.path(spec.inputs())
    return path if path.exists() else prepare(dataclasses.replace(spec, cache=str(scratch_cache)))


def _require_steps_left(
    config: RunConfig, stores: Mapping[str, TrainingData], resume: ResumePoint | None
) -> int:
    """Check the run's number of steps, and return it."""
    for store in stores.values():
        require_room(store, config.data)
    order = train_order(stores["train"], config)
    steps = order.steps
    require_other_samples(config, "train", order)
    if "validation" in stores:
        assert config.data.validation is not None, "it has a store"
        sources = config.data.validation
        validation = step_order(stores["validation"], config.data, one_epoch(config.train), sources)
        require_other_samples(config, "validation", validation)
    if config.optimizer.warmup_steps > steps:
        raise InputError(
            f"optimizer.warmup_steps must not pass the run's {steps} steps, got {config.optimizer.warmup_steps}"
        )
    last_profiled = (config.logging.profile_steps or (0, 0))[1]
    if last_profiled > steps:
        raise InputError(
            f"logging.profile_steps must end within the run's {steps} steps, got {last_profiled}"
        )
    if resume is not None and resume.step > steps:
        raise InputError(
            f"the run must have at least the {resume.step} steps already done in {resume.folder}, got {steps}"
        )
    return steps


def one_epoch(train: TrainConfig) -> TrainConfig:
    """Return the training settings of one pass over the validation data."""
    return dataclasses.replace(train, steps=None, epochs=1)
