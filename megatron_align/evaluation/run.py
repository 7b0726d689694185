"""Run an evaluation: check and tokenise everything, join the ranks, score, generate, write the results.

Log-prob tasks run the policy on the layout of the configuration; generated tasks give every rank the complete model and
a share of the prompts. The reference of a task borrows the policy's memory once the policy has been scored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig

import megatron_align
from megatron_align.convert.open_adapter import StoredAdapter, open_adapter
from megatron_align.data.tokenize.cache_key import CACHE_IN_RUN
from megatron_align.data.tokenize.tokenizer import load_tokenizer
from megatron_align.errors import InputError, require
from megatron_align.evaluation.adapter_names import ONLY
from megatron_align.evaluation.answers import PromptedTask, answer_all, augmented, own_prompts
from megatron_align.evaluation.config import (
    EvaluationConfig,
    load_evaluation,
)
from megatron_align.evaluation.engines import open_engine, vllm_servers
from megatron_align.evaluation.results import RESULTS, Items, TaskResult, write_results
from megatron_align.evaluation.tables import TaskContext
from megatron_align.evaluation.task_data import TaskSet, layout_of, numbers_of, read_tasks, scored_items
from megatron_align.hf.adapter import fill_adapter
from megatron_align.model import parallel
from megatron_align.model.families import ModelShape, read_shape
from megatron_align.model.lora import adapters_off
from megatron_align.model.policy import Policy, build_policy, transformer_config
from megatron_align.rollout.adapters import EngineAdapters
from megatron_align.rollout.engine import Engine
from megatron_align.rollout.types import require_fitting
from megatron_align.rollout.vllm_engine import VLLMEngine
from megatron_align.rollout.vllm_server import vllm_command
from megatron_align.storage.atomic_write import require_writable
from megatron_align.training.likelihood import CompletionScorer
from megatron_align.training.reference.cache import hash_of_rank_0
from megatron_align.training.setup import DTYPES, locate, require_weights
from megatron_align.training.watchdog import Watchdog, join_watched
from megatron_align.training.weights import read_model_weights, require_finite_weights
from megatron_align.version import __version__

SEQUENCE_LENGTH = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class _Setup:
    """A checked evaluation, before the ranks meet."""

    config: EvaluationConfig
    rank_info: parallel.RankInfo
    shape: ModelShape
    adapter: StoredAdapter | None
    megatron: TransformerConfig
    sequence_length: int
    tasks: TaskSet


def evaluate(
    config: EvaluationConfig | str | Path | Mapping[str, Any], rank_info: parallel.RankInfo | None = None
) -> dict[str, Any]:
    """Run an evaluation and return what ``results.json`` holds. Under torchrun every process calls this.

    Args:
        config: an evaluation, the path of its YAML file, or a mapping.
        rank_info: this process among the ranks; None: from the environment.

    Raises:
        InputError: for anything that the user can correct.
    """
    if not isinstance(config, EvaluationConfig):
        config = load_evaluation(config)
    rank_info = rank_info or parallel.RankInfo.from_environment()
    setups = [_prepare(one, rank_info) for one in _of_each_adapter(config)]
    watchdog = join_watched(rank_info, config.parallel)
    with watchdog.watching(), left_after_bad_input():
        parallel.require_agreement(
            {"template_date": setups[0].tasks.context.template_date},
            "chat templates must read one date on all ranks",
        )
        _require_base(setups, watchdog)
        results = [_evaluate(setup, watchdog) for setup in setups]
        dist.barrier()
    if not isinstance(config.adapter, dict):
        return results[0]
    named = zip(config.adapter, results, strict=True)
    return {"tasks": {f"{name}/{task}": found for name, of in named for task, found in of["tasks"].items()}}


@contextmanager
def left_after_bad_input() -> Iterator[None]:
    """Leave the other ranks after a with-block, and after an error that every rank raises: a program may try again."""
    try:
        yield
    except InputError:
        parallel.leave()
        raise
    parallel.leave()


def _of_each_adapter(config: EvaluationConfig) -> list[EvaluationConfig]:
    """Return the evaluation of the model with each of its adapters, which has a folder of its own if several."""
    if not isinstance(config.adapter, dict):
        return [config]
    return [
        dataclasses.replace(config, adapter=path, out=str(Path(config.out) / name))
        for name, path in config.adapter.items()
    ]


def _evaluate(setup: _Setup, watchdog: Watchdog) -> dict[str, Any]:
    """Return the results of one model, which rank 0 writes. Collective."""
    items: dict[str, TaskResult] = {**_score(setup, watchdog), **_answer(setup, watchdog)}
    config = setup.config
    about = {
        "model": config.model,
        **({"adapter": config.adapter} if config.adapter else {}),
        "precision": config.precision,
        **({"rollout": dataclasses.asdict(config.rollout)} if config.rollout.engine == "vllm" else {}),
        **({"augment": config.augment} if config.augment else {}),
        **({"augment_template": config.augment_template} if config.augment_template else {}),
        "parallel": layout_of(config.parallel, setup.rank_info.world_size),
        "version": __version__,
    }
    results = setup.tasks.results(items, about)
    if setup.rank_info.rank == 0:
        write_results(Path(config.out), items, results)
    return results


def _require_base(setups: Sequence[_Setup], watchdog: Watchdog) -> None:
    """Refuse adapters that were trained on other weights than the model's, which rank 0 reads once. Collective."""
    adapters = [setup.adapter for setup in setups if setup.adapter and setup.adapter.weights is not None]
    if not adapters:
        return
    model = setups[0].config.model
    with watchdog.patient("hashing the adapter's base"):
        found = hash_of_rank_0(locate(model)[0])
    for adapter in adapters:
        adapter.require_hash(found, model)


def _prepare(config: EvaluationConfig, rank_info: parallel.RankInfo) -> _Setup:
    config.parallel.data_parallel(rank_info.world_size)
    weights, assets = locate(config.model)
    require(
        assets.is_dir(),
        f"model must be a Hugging Face folder or a checkpoint, found nothing at {config.model}",
    )
    shape = read_shape(assets)
    require_weights(weights, assets, shape)
    assert not isinstance(config.adapter, dict), "each adapter is evaluated by itself"
    adapter = None if config.adapter is None else open_adapter(config.adapter, shape)
    out = Path(config.out)
    require(not out.exists() or out.is_dir(), f"out must be a folder, found a file at {out}")
    require_writable(out / RESULTS)
    length = config.sequence_length or min(SEQUENCE_LENGTH, shape.max_positions)
    require(
        length <= shape.max_positions,
        f"sequence_length must not pass the model's {shape.max_positions} positions, got {length}",
    )
    if config.rollout.engine == "vllm":
        line = f"rollout.engine vllm serves a Hugging Face folder, got {config.model}: export the checkpoint"
        require(weights == assets, line)
        if config.rollout.vllm_python is not None:
            vllm_command(config.rollout.vllm_python)
    megatron = transformer_config(shape, config.parallel, DTYPES[config.precision])
    if config.augment is not None:  # refused before anything is scored
        with megatron_align.augmenter(config.augment, config.augment_template):
            pass
    context = TaskContext(
        assets=assets,
        out=out,
        cache=out / CACHE_IN_RUN,
        rank_info=rank_info,
        sequence_length=length,
        template_date=config.template_date or date.today().isoformat(),
    )
    return _Setup(
        config=config,
        rank_info=rank_info,
        shape=shape,
        adapter=adapter,
        megatron=megatron,
        sequence_length=length,
        tasks=read_tasks(config.tasks, shape, context),
    )


def _score(setup: _Setup, watchdog: Watchdog) -> dict[str, TaskResult]:
    """Return the items of the tasks on the sharded policy. Collective."""
    tasks = setup.tasks
    if not tasks.scored and not tasks.lm_eval:
        return {}
    config, groups = setup.config, parallel.groups()
    stored = setup.adapter
    chunks = build_policy(setup.megatron, setup.shape, groups, None if stored is None else stored.adapter)
    if stored is not None:
        fill_adapter(chunks, stored.adapter, stored.tensors.__getitem__)
    score = CompletionScorer(
        chunks=chunks,
        parallel=config.parallel,
        groups=groups,
        watchdog=watchdog,
        sequence_length=setup.sequence_length,
    )
    _load(chunks, config.model, setup, score)
    numbers = numbers_of(tasks.scored, score, tasks.context)
    of_lm_eval: dict[str, TaskResult] = {}
    if tasks.lm_eval:
        from megatron_align.evaluation.lm_eval_results import run_lm_eval  # an optional package

        of_lm_eval |= run_lm_eval(tasks.lm_eval, score, tasks.context)
    references: dict[str, np.ndarray] = {}
    for path in dict.fromkeys(scored.reference for scored in tasks.scored if scored.reference):
        compared = [scored for scored in tasks.scored if scored.reference == path]
        with adapters_off(chunks):
            _load(chunks, path, setup, score)
            references |= numbers_of(compared, score, tasks.context)
    return scored_items(tasks.scored, numbers, references) | of_lm_eval


def _load(chunks: list[Policy], path: str, setup: _Setup, score: CompletionScorer) -> None:
    """Load a model into the chunks. Collective."""
    with score.watchdog.patient(f"loading {path}"):
        read_model_weights(chunks, path, setup.shape, score.groups)
        require_finite_weights(chunks, path)


def _answer(setup: _Setup, watchdog: Watchdog) -> dict[str, Items]:
    """Return the items of the generated tasks; every rank answers a share of the prompts. Collective."""
    tasks = setup.tasks
    if not tasks.answered:
        return {}
    answered = tasks.answered if setup.config.augment is None else _augmented(setup, watchdog)
    with _engine(setup, watchdog) as engine:
        if setup.config.rollout.engine == "vllm":  # a server may hold the model with a shorter context
            for task in answered:
                require_fitting(task.prompts, engine.context, f"prompts of task {task.task.name}")
        return {task.task.name: answer_all(task, engine, watchdog, tasks.context) for task in answered}


def _augmented(setup: _Setup, watchdog: Watchdog) -> list[PromptedTask]:
    """Return the answered tasks with complements of this rank's prompts; their model is freed. Collective."""
    config, context = setup.config, setup.tasks.context
    with (
        watchdog.patient("augmenting the prompts"),
        parallel.failing_together(),
        megatron_align.augmenter(config.augment, config.augment_template, now=context.now) as augmenter,
    ):
        return [
            augmented(
                task, augmenter.augmented, own_prompts(task, setup.rank_info), setup.shape.max_positions
            )
            for task in setup.tasks.answered
        ]


@contextmanager
def _engine(setup: _Setup, watchdog: Watchdog) -> Iterator[Engine]:
    """Give this rank's engine within a with-block. Collective."""
    config, engine = setup.config, cast("Engine | None", None)
    with ExitStack() as opened:
        if config.rollout.engine == "vllm":
            tokenizer = load_tokenizer(str(setup.tasks.context.assets))
            with watchdog.patient("waiting for the vllm server"):
                servers = opened.enter_context(vllm_servers(config))
                with parallel.failing_together():
                    engine = VLLMEngine(servers, tokenizer)
        else:
            with watchdog.patient("loading the engine"), parallel.failing_together():
                engine = own = open_engine(config.model, config.precision)
                if (adapter := setup.adapter) is not None:
                    EngineAdapters(own.model, {ONLY: (adapter.adapter, adapter.tensors)}).use(ONLY)
        assert engine is not None, "a rank without one has ended all of them"
        opened.callback(engine.close)
        yield engine
