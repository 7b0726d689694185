"""Run an evaluation: check and tokenise everything, join the ranks, score, generate, write the results.

Log-prob tasks run the policy on the layout of the configuration; generated tasks give every rank the complete model and
a share of the prompts. The reference of a task borrows the policy's memory once the policy has been scored.

Shapes: N items and C completions of a task.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_align.checkpoint.card import shape_differences
from megatron_align.convert.open_adapter import StoredAdapter, open_adapter
from megatron_align.data.formats.files import expand
from megatron_align.data.sample_table import SampleTable
from megatron_align.data.store import TokenStore, sha256
from megatron_align.data.tokenize.tokenizer import load_tokenizer
from megatron_align.errors import InputError, require
from megatron_align.evaluation.adapter_names import ONLY
from megatron_align.evaluation.answers import PromptedTask, answer_all, read_prompted_task
from megatron_align.evaluation.config import (
    FILES,
    AnsweredTask,
    ChoiceTask,
    EvaluationConfig,
    LMEvalTask,
    LossTask,
    PreferenceTask,
    Task,
    load_evaluation,
)
from megatron_align.evaluation.engines import open_engine
from megatron_align.evaluation.progress import progress
from megatron_align.evaluation.results import ITEMS, RESULTS, Items, TaskResult, write_atomically
from megatron_align.evaluation.tables import Choices, TaskContext, open_store, read_choices
from megatron_align.hf.adapter import fill_adapter
from megatron_align.hf.load import open_hf, require_tied_head
from megatron_align.model import parallel
from megatron_align.model.families import ModelShape, read_shape
from megatron_align.model.lora import adapters_off
from megatron_align.model.policy import Policy, build_policy, transformer_config
from megatron_align.rollout.adapters import EngineAdapters
from megatron_align.storage.atomic_write import require_writable
from megatron_align.training.likelihood import CompletionScorer
from megatron_align.training.reference.cache import hash_of_rank_0
from megatron_align.training.setup import DTYPES, locate, require_vocabulary
from megatron_align.training.watchdog import Watchdog, join_watched
from megatron_align.training.weights import read_model_weights, require_finite_weights
from megatron_align.version import __version__

if TYPE_CHECKING:
    from megatron_align.evaluation.lm_eval_results import LoadedTask

SEQUENCE_LENGTH = 4096


@dataclass(frozen=True, slots=True)
class _LikelihoodTask:
    """A task on log-probs with its data.

    Args:
        task: of the configuration.
        table: its samples.
        items: from the completions' numbers under the policy, and under the reference where there is one.
        reference: None: the task compares with none.
        rendered: whether the chat template has rendered a record.
    """

    task: Task
    table: SampleTable
    items: Callable[[np.ndarray, np.ndarray | None], Items]
    reference: str | None = None
    rendered: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class _Setup:
    """A checked evaluation, before the ranks meet."""

    config: EvaluationConfig
    rank_info: parallel.RankInfo
    shape: ModelShape
    adapter: StoredAdapter | None
    megatron: TransformerConfig
    sequence_length: int
    scored: list[_LikelihoodTask]
    answered: list[PromptedTask]
    context: TaskContext
    lm_eval: list[LoadedTask]


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
    with watchdog.watching():
        parallel.require_agreement(
            {"template_date": setups[0].context.template_date},
            "chat templates must read one date on all ranks",
        )
        _require_base(setups, watchdog)
        results = [_evaluate(setup, watchdog) for setup in setups]
        dist.barrier()
    parallel.leave()
    if not isinstance(config.adapter, dict):
        return results[0]
    named = zip(config.adapter, results, strict=True)
    return {"tasks": {f"{name}/{task}": found for name, of in named for task, found in of["tasks"].items()}}


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
    results = _results(setup, items)
    if setup.rank_info.rank == 0:
        _write(Path(setup.config.out), items, results)
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
    if weights == assets:
        require_tied_head(open_hf(assets)[0], shape)
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
    megatron = transformer_config(shape, config.parallel, DTYPES[config.precision])
    context = TaskContext(
        assets=assets,
        out=out,
        rank_info=rank_info,
        sequence_length=length,
        template_date=config.template_date or date.today().isoformat(),
    )
    scored, answered, lm_eval = _read_tasks(config.tasks, shape, context)
    stores = {f"task {s.task.name}": s.table for s in scored if isinstance(s.table, TokenStore)}
    require_vocabulary(stores, shape)
    return _Setup(
        config=config,
        rank_info=rank_info,
        shape=shape,
        adapter=adapter,
        megatron=megatron,
        sequence_length=length,
        scored=scored,
        answered=answered,
        context=context,
        lm_eval=lm_eval,
    )


def _read_tasks(
    tasks: Sequence[Task], shape: ModelShape, context: TaskContext
) -> tuple[list[_LikelihoodTask], list[PromptedTask], list[LoadedTask]]:
    """Read the data of all tasks; return those that are scored, those that are answered and lm-eval's."""
    scored: list[_LikelihoodTask] = []
    answered: list[PromptedTask] = []
    lm_eval: list[LoadedTask] = []
    for task in tasks:
        require(
            not shape.is_reward or (isinstance(task, PreferenceTask) and task.score in (None, "reward")),
            f"task {task.name}: {shape.architecture} has rewards only: kind preference with score reward, "
            f"got kind {task.kind}",
        )
        if isinstance(task, AnsweredTask):
            answered.append(read_prompted_task(task, context.assets, shape.max_positions, context.now))
        elif isinstance(task, LMEvalTask):
            from megatron_align.evaluation.lm_eval_results import load_lm_eval  # an optional package

            lm_eval.append(load_lm_eval(task, quiet=context.rank_info.rank > 0))
        elif isinstance(task, ChoiceTask):
            choices = read_choices(
                task, load_tokenizer(str(context.assets)), context.sequence_length, context.now
            )
            of_item = partial(_choice_items, choices)
            scored.append(_LikelihoodTask(task, choices.table, of_item, rendered=choices.rendered))
        else:
            scored.append(_stored_task(task, shape, context))
    return scored, answered, lm_eval


def _stored_task(task: Task, shape: ModelShape, context: TaskContext) -> _LikelihoodTask:
    """Return a task on chat data or pairs, tokenised."""
    if isinstance(task, LossTask):
        store = open_store(task, ("chat",), context)
        return _LikelihoodTask(task, store, partial(_loss_items, store))
    assert isinstance(task, PreferenceTask), "every other kind is handled by the caller"
    score = task.score or (
        "reward" if shape.is_reward else "implicit_reward" if task.reference else "logprob"
    )
    require(
        score != "reward" or shape.is_reward,
        f"task {task.name}: score reward needs a reward model, got {shape.architecture}",
    )
    require(
        (score == "implicit_reward") == (task.reference is not None),
        f"task {task.name}: reference belongs to score implicit_reward, got score {score} with {task.reference}",
    )
    if task.reference is not None:
        _require_same_shape(task, shape)
    store = open_store(task, ("pair", "triple"), context)
    return _LikelihoodTask(task, store, partial(_preference_items, store, score), task.reference)


def _require_same_shape(task: PreferenceTask, shape: ModelShape) -> None:
    assert task.reference is not None, "checked by the caller"
    theirs = read_shape(locate(task.reference)[1])
    if differences := shape_differences(dataclasses.asdict(shape), dataclasses.asdict(theirs)):
        listed = ", ".join(f"{key} {found!r} for {ours!r}" for key, (ours, found) in differences.items())
        raise InputError(
            f"task {task.name}: reference must be of the model's shape, got {listed} in {task.reference}"
        )


def _score(setup: _Setup, watchdog: Watchdog) -> dict[str, TaskResult]:
    """Return the items of the tasks on the sharded policy. Collective."""
    if not setup.scored and not setup.lm_eval:
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
    numbers = _score_tasks(setup, setup.scored, (config.model, chunks), score)
    items: dict[str, TaskResult] = {}
    if setup.lm_eval:
        from megatron_align.evaluation.lm_eval_results import run_lm_eval  # an optional package

        items |= run_lm_eval(setup.lm_eval, score, setup.context.assets, setup.context.now)
    references: dict[str, np.ndarray] = {}
    for path in dict.fromkeys(scored.reference for scored in setup.scored if scored.reference):
        compared = [scored for scored in setup.scored if scored.reference == path]
        with adapters_off(chunks):
            references |= _score_tasks(setup, compared, (path, chunks), score)
    for scored in setup.scored:
        name = scored.task.name
        items[name] = scored.items(numbers[name], references.get(name))
    return items


def _score_tasks(
    setup: _Setup,
    tasks: Sequence[_LikelihoodTask],
    model: tuple[str, list[Policy]],
    score: CompletionScorer,
) -> dict[str, np.ndarray]:
    """Load a model into the chunks and score the completions of some tasks, by name."""
    path, chunks = model
    with score.watchdog.patient(f"loading {path}"):
        read_model_weights(chunks, path, setup.shape, score.groups)
        require_finite_weights(chunks, path)
    numbers = {}
    for scored in tasks:
        name = scored.task.name
        with progress(f"scoring {name}", len(scored.table), setup.rank_info.rank == 0) as advance:
            numbers[name] = score(scored.table, f"scoring {name}", advance)
    return numbers


def _answer(setup: _Setup, watchdog: Watchdog) -> dict[str, Items]:
    """Return the items of the generated tasks; every rank answers a share of the prompts. Collective."""
    if not setup.answered:
        return {}
    rank = (setup.rank_info, Path(setup.config.out))
    with watchdog.patient("loading the engine"):
        engine = open_engine(setup.config.model, setup.config.precision)
        if (adapter := setup.adapter) is not None:
            EngineAdapters(engine.model, {ONLY: (adapter.adapter, adapter.tensors)}).use(ONLY)
    try:
        return {task.task.name: answer_all(task, engine, watchdog, rank) for task in setup.answered}
    finally:
        engine.close()


def _loss_items(store: TokenStore, sums_C: np.ndarray, _: np.ndarray | None) -> Items:
    counts_N = store.completion_scored.astype(np.float64)  # a chat sample is one completion
    return Items(
        primary="loss", values={"loss": -sums_C}, weights_N=counts_N, sources_N=np.asarray(store.sources)
    )


def _preference_items(
    store: TokenStore, score: str, policy_C: np.ndarray, reference_C: np.ndarray | None
) -> Items:
    scores_C = policy_C
    if score == "per_token":
        scores_C = policy_C / store.completion_scored
    elif score == "implicit_reward":
        assert reference_C is not None, "it was scored"
        scores_C = policy_C - reference_C
    width = 3 if store.kind == "triple" else 2
    chosen_N, rejected_N = scores_C[0::width], scores_C[1::width]
    values = {
        "accuracy": (chosen_N > rejected_N).astype(np.float64),
        "margin": chosen_N - rejected_N,
        "chosen": chosen_N,
        "rejected": rejected_N,
    }
    return Items(primary="accuracy", values=values, sources_N=np.asarray(store.sources))


def _choice_items(choices: Choices, sums_C: np.ndarray, _: np.ndarray | None) -> Items:
    ends = choices.table.completion_offsets[1:-1]
    right: dict[str, list[float]] = {"accuracy": [], "accuracy_norm": []}
    rows = []
    scores = {"accuracy": sums_C, "accuracy_norm": sums_C / choices.characters}
    for name, scores_C in scores.items():
        for of_question, correct in zip(np.split(scores_C, ends), choices.correct, strict=True):
            right[name].append(float(of_question.argmax() == correct))
    for of_question, correct in zip(np.split(sums_C, ends), choices.correct, strict=True):
        rows.append({"logprobs": of_question.tolist(), "correct": int(correct)})
    return Items(
        primary="accuracy",
        values={name: np.array(values) for name, values in right.items()},
        sources_N=choices.table.sources,
        rows=rows,
    )


def _results(setup: _Setup, items: Mapping[str, TaskResult]) -> dict[str, Any]:
    config = setup.config
    rendered: list[Any] = [each.task for each in setup.scored if each.rendered]
    rendered += [each.task for each in setup.answered if each.rendered]
    rendered += [each.task for each in setup.lm_eval if each.task.apply_chat_template]
    clocks = {task.name: reads for task in rendered if (reads := setup.context.clock(task))}
    given = {name: of_task.data for name, of_task in items.items()}
    return {
        "tasks": {task.name: items[task.name].result(task.sources) for task in config.tasks},
        "primary": {name: of_task.primary for name, of_task in items.items()},
        "data": {
            task.name: given[task.name] or [sha256(file) for path in task.sources for file in expand(path)]
            for task in config.tasks
        },
        "files": {task.name: found for task in config.tasks if (found := _other_files(task))},
        "model": config.model,
        **({"adapter": config.adapter} if config.adapter else {}),
        "precision": config.precision,
        "template_date": setup.context.template_date if clocks else None,
        "clock": clocks,
        "parallel": {
            "ranks": setup.rank_info.world_size,
            **{name: getattr(config.parallel, name) for name in ("tensor", "pipeline", "context")},
        },
        "version": __version__,
        "configuration": {task.name: dataclasses.asdict(task) for task in config.tasks},
    }


def _other_files(task: Task) -> dict[str, str]:
    """Return the hashes of the files that a task reads besides its data, by the name of their option."""
    return {name: sha256(file) for name in FILES if (file := getattr(task, name, None))}


def _write(out: Path, items: Mapping[str, TaskResult], results: Mapping[str, Any]) -> None:
    """Write the items of each task, then results.json, which says that they are complete."""
    folder = out / ITEMS
    folder.mkdir(parents=True, exist_ok=True)
    for name, of_task in items.items():
        of_task.write(folder / f"{name}.jsonl")
    write_atomically(out / RESULTS, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
