"""Functions for the pool: training runs, and the optimizer and gradients of a run."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from megatron_align.config import ParallelConfig
from megatron_align.errors import InputError, TrainingFault
from megatron_align.hf.load import load_weights
from megatron_align.model import parallel
from megatron_align.model.families import read_shape
from megatron_align.model.policy import build_policy, transformer_config
from megatron_align.objectives.configuration import parse
from megatron_align.rollout.transformers_engine import TransformersEngine
from megatron_align.training.loop import run
from megatron_align.training.watchdog import join_watched
from tests.harness.durability import Durability
from tests.harness.fake_packages import installed


def train(rank_info: parallel.RankInfo, arguments: list[str]) -> None:
    """Run ``megatron_align.train`` with these arguments."""
    run(parse(arguments), rank_info)


def train_recorded(rank_info: parallel.RankInfo, arguments: list[str]) -> tuple[list[str], list[str]]:
    """Train; return the names that were given by renaming, and what a power failure could lose."""
    with Durability() as seen:
        train(rank_info, arguments)
    return seen.renamed, seen.unsafe()


def optimizers_in_use(rank_info: parallel.RankInfo, arguments: list[str]) -> list[list[dict]]:
    """Train; return of each optimizer of the run its options and its rate at every update."""
    from megatron_align.training.optimizer import Optimizer

    seen: dict[int, list[dict]] = {}
    update = Optimizer.finish_update

    def recorded(self: Optimizer, norm: float) -> None:
        group = max(self.param_groups, key=lambda each: each["weight_decay"])  # that of matrices
        options = {name: group[name] for name in ("weight_decay", "betas", "eps", "lr")}
        seen.setdefault(id(self), []).append({**options, "clip_grad": self.config.clip_grad})
        update(self, norm)

    with mock.patch.object(Optimizer, "finish_update", recorded):
        train(rank_info, arguments)
    return list(seen.values())


def train_to_the_refusal(rank_info: parallel.RankInfo, arguments: list[str]) -> str:
    """Train; return the line with which a run is refused after the ranks have met. The pool's processes stay."""
    try:
        train(rank_info, arguments)
    except InputError as refused:
        parallel.leave()
        return str(refused)
    return "none"


def references_alive(rank_info: parallel.RankInfo, arguments: list[str]) -> list[int]:
    """Train; return of each model that the trainer builds how many chunks of references are in memory then."""
    from megatron_align.training import trainer
    from megatron_align.training.reference import builder

    made: list[weakref.ref] = []
    alive: list[int] = []
    build_reference, build = builder.build_reference, trainer.build_policy

    def recorded(*given: object) -> list:
        chunks = build_reference(*given)
        made.extend(map(weakref.ref, chunks))
        return chunks

    def counted(*given: object) -> list:
        alive.append(sum(chunk() is not None for chunk in made))
        return build(*given)

    with (
        mock.patch.object(builder, "build_reference", recorded),
        mock.patch.object(trainer, "build_policy", counted),
    ):
        train(rank_info, arguments)
    assert made, "a reference was built"
    return alive


def evaluate(rank_info: parallel.RankInfo, config: dict) -> dict:
    """Run an evaluation and return its results."""
    from megatron_align.evaluation.run import evaluate

    return evaluate(config, rank_info)


def cores_of_each(rank_info: parallel.RankInfo) -> tuple[int, int]:
    """Return the rank's share of cores, and the number of cores that it may use."""
    from megatron_align.rollout.verifiers.running import share_of_cores

    with join_watched(rank_info, ParallelConfig()).watching():
        share = share_of_cores()
    parallel.leave()
    return share, len(os.sched_getaffinity(0))


def reward_values(rank_info: parallel.RankInfo, layout: dict, options: dict, groups: list) -> dict | str:
    """Return the values of a run's rewards and their sum, or the line with which they are refused.

    ``options``: rewards, sequence_length, template_date.
    """
    from types import SimpleNamespace

    from megatron_align.config.rewards import build_rewards
    from megatron_align.training.rewards import RunRewards, require_rewards

    config = SimpleNamespace(
        rewards=build_rewards(options["rewards"]),
        data=SimpleNamespace(
            sequence_length=options.get("sequence_length", 64), template_date=options.get("template_date")
        ),
        train=SimpleNamespace(precision="fp32"),
        parallel=ParallelConfig(**layout),
    )
    records = [record for record, _ in groups]
    try:
        require_rewards(config, records, rank_info)
        with join_watched(rank_info, config.parallel).watching() as watchdog:
            try:
                rewards = RunRewards(config, parallel.groups(), watchdog)
                rewards.check(records)
                values = rewards.score(groups)
                reward_C, scored_C = rewards.combine(values, records)
                result = {**values, "sum": reward_C.tolist(), "scored": scored_C.tolist()}
                rewards.close()
            finally:
                parallel.leave()
    except (InputError, TrainingFault) as refused:
        return f"{type(refused).__name__}: {refused}"
    return result


def lm_eval_loglikelihood(
    rank_info: parallel.RankInfo, model: Path, layout: dict, longest: int, pairs: list
) -> list[tuple[float, bool]]:
    """Return log-prob and greedy flag of each (context, continuation) as lm-eval requests them."""
    from lm_eval.api.instance import Instance

    from megatron_align.evaluation.lm_eval import PolicyLM
    from megatron_align.training.likelihood import CompletionScorer
    from megatron_align.training.setup import locate
    from megatron_align.training.weights import read_model_weights

    config = ParallelConfig(**layout)
    with join_watched(rank_info, config).watching() as watchdog:
        assets = locate(str(model))[1]
        groups, shape = parallel.groups(), read_shape(assets)
        chunks = build_policy(transformer_config(shape, config, torch.float32), shape, groups)
        read_model_weights(chunks, str(model), shape, groups)
        score = CompletionScorer(
            chunks=chunks, parallel=config, groups=groups, watchdog=watchdog, sequence_length=longest
        )
        answers = PolicyLM(score, assets).loglikelihood(
            [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
        )
    parallel.leave()
    return answers


def sample_data(rank_info: parallel.RankInfo, options: dict) -> None:
    """Sample data."""
    from megatron_align.evaluation.sample import SampleOptions, sample

    sample(SampleOptions(**options))


def decay_groups(rank_info: parallel.RankInfo, model: Path) -> tuple[list[str], list[str], bool]:
    """Return the parameters with and without decay, and whether the fp32 masters of bf16 weights equal them."""
    from megatron_align.config import OptimizerConfig
    from megatron_align.training.optimizer import build_optimizer, wrap_data_parallel

    with join_watched(rank_info, ParallelConfig()).watching():
        groups, shape = parallel.groups(), read_shape(model)
        chunks = build_policy(transformer_config(shape, ParallelConfig(), torch.bfloat16), shape, groups)
        load_weights(model, shape, chunks[0].global_parameters(), 0, 1)
        ddp = wrap_data_parallel(chunks, ParallelConfig())
        optimizer = build_optimizer(ddp, OptimizerConfig(weight_decay=0.5), groups)
        decays: dict[float, list[str]] = {0.5: [], 0.0: []}
        equal = True
        for name, parameter in chunks[0].named_parameters():
            group, order = optimizer.model_param_group_index_map[parameter]
            decays[optimizer.param_groups[group]["weight_decay"]].append(name)
            master = optimizer.param_groups[group]["params"][order]
            equal &= master.dtype == torch.float32 and torch.equal(
                master, parameter.detach().float().flatten()
            )
    parallel.leave()
    return decays[0.5], decays[0.0], equal


def train_with_extras(rank_info: parallel.RankInfo, arguments: list[str]) -> None:
    """Train as if Transformer Engine was installed: megatron-core then stores the optimizer's step elsewhere."""
    from megatron.core.optimizer import distrib_optimizer

    before = distrib_optimizer.HAVE_APEX_OR_TE, distrib_optimizer.USING_TE_OPTIMIZER
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = True
    try:
        train(rank_info, arguments)
    finally:
        distrib_optimizer.HAVE_APEX_OR_TE, distrib_optimizer.USING_TE_OPTIMIZER = before


def norm_of(rank_info: parallel.RankInfo, grads: list[torch.Tensor]) -> float:
    """Return the global norm of gradients distributed over the ranks."""
    from megatron_align.training.optimizer import global_norm

    with join_watched(rank_info, ParallelConfig()).watching():
        norm = global_norm(grads[rank_info.rank :: rank_info.world_size], parallel.groups().dp).item()
    parallel.leave()
    return norm


def stall(rank_info: parallel.RankInfo, late: int, timeout: float) -> None:
    """Let rank ``late`` sleep while the others wait for it in an all-reduce: the watchdog must end them."""
    with join_watched(rank_info, ParallelConfig(timeout_seconds=timeout)).watching() as watchdog:
        watchdog.report("step 1")
        if rank_info.rank == late:
            time.sleep(600)
        watchdog.report("step 2")
        parallel.all_reduce_sum([1.0])


class _GradientsAsWeights:
    """An optimizer whose update replaces each parameter by its gradient."""

    skips_on_device = False

    def __init__(self, model: list):
        self.model = model

    def zero_grad(self) -> None:
        pass

    def grad_norm(self) -> torch.Tensor:
        return torch.zeros((), dtype=torch.float64)

    def finish_update(self, norm: float) -> None:
        with torch.no_grad():
            for chunk in self.model:
                for parameter in chunk.parameters():
                    if parameter.requires_grad:
                        parameter.copy_(parameter.main_grad)


def gradients(rank_info: parallel.RankInfo, arguments: list[str], folder: Path) -> None:
    """Write the first step's gradients as a Hugging Face folder, in HF's layout; of an adapter as a PEFT folder."""
    from megatron_align.hf.export import export_model
    from megatron_align.training.run_context import joined_ranks
    from megatron_align.training.setup import prepare_run
    from megatron_align.training.trainer import Trainer

    setup = prepare_run(parse(arguments), rank_info)
    with joined_ranks(setup) as watchdog:
        trainer = Trainer.build(setup, watchdog)
        trainer.stepper.optimizer = _GradientsAsWeights(trainer.model)
        with trainer.stepper.full_gradients():
            trainer.train_step(trainer.train_batches.step(0))
        if trainer.base is not None:
            trainer.export_adapter(folder)
        else:
            export_model(trainer.chunks, folder, setup.assets)


def live_answers(rank_info: parallel.RankInfo, arguments: list[str], prompts: list, folder: Path) -> list:
    """Train; before and after the steps answer prompts with the live weights, and export them to ``folder/STEP``.

    Returns:
        For each export the token ids and log-probs of each answer; the most tensors held at once while gathering; and
        the names of the engine's methods that took weights.
    """
    from megatron_align.rollout.live_weights import require_version
    from megatron_align.rollout.types import Sampling
    from megatron_align.training.run_context import joined_ranks
    from megatron_align.training.setup import prepare_run
    from megatron_align.training.trainer import Trainer

    setup = prepare_run(parse(arguments), rank_info)
    seen = []
    with joined_ranks(setup) as watchdog:
        trainer = Trainer.build(setup, watchdog)
        engine = trainer.live_engine()
        taken = _recorded(engine)
        for step in range(trainer.steps + 1):
            if step:
                trainer.train_step(trainer.train_batches.step(step - 1))
            trainer.update_engine(engine)
            answers = engine.generate(prompts, Sampling(temperature=0, max_tokens=12))
            require_version(answers, step)
            trainer.export(folder / str(step))
            seen.append([(a.token_ids, a.logprobs) for [a] in answers])
        most = _most_tensors_alive(trainer.chunks)
    return [seen, most, taken]


def _recorded(engine: TransformersEngine) -> list[str]:
    """Return a list of the names of the engine's methods that take weights, in which every call of one is noted."""
    taken: list[str] = []

    def recorded(name: str, method: Callable) -> Callable:
        def call(*args):
            taken.append(name)
            return method(*args)

        return call

    for name in ("update_base", "update_adapter", "update_weights"):
        setattr(engine, name, recorded(name, getattr(engine, name)))
    return taken


def update_servers(
    rank_info: parallel.RankInfo, arguments: list[str], url: str, adapters: bool
) -> list[tuple]:
    """Update a vLLM server with the live weights twice, ask it after each; return names and versions that it had."""
    from megatron_align.rollout.types import Prompt, Sampling
    from megatron_align.rollout.vllm_engine import VLLMEngine
    from megatron_align.training.run_context import joined_ranks
    from megatron_align.training.setup import prepare_run
    from megatron_align.training.trainer import Trainer
    from tests.harness.tiny import byte_tokenizer

    setup = prepare_run(parse(arguments), rank_info)
    seen = []
    with joined_ranks(setup) as watchdog:
        trainer = Trainer.build(setup, watchdog)
        engine = VLLMEngine([url], byte_tokenizer(), adapters=adapters)
        for _ in range(2):
            trainer.train_step(trainer.train_batches.step(trainer.step))
            trainer.update_engine(engine)
            [[answer]] = engine.generate([Prompt([5, 6])], Sampling(max_tokens=2))
            seen.append((engine.served, answer.weight_version))
            torch.distributed.barrier()  # the next update unloads what the other rank still asks for
    return seen


def _most_tensors_alive(chunks: list) -> int:
    """Return the most tensors of the live weights that exist at once while they are taken one by one."""
    from megatron_align.rollout.live_weights import named_weights

    given: list[weakref.ref] = []
    most = 0
    for _, tensor in named_weights(chunks):
        given.append(weakref.ref(tensor))
        del tensor
        most = max(most, sum(ref() is not None for ref in given))
    return most


def fail_to_update(
    rank_info: parallel.RankInfo, arguments: list[str], bad_rank: int, faults: list[Exception]
) -> list[str]:
    """Update engines, of which one takes a tensor and fails, by each fault; return this rank's errors."""
    from megatron_align.training.run_context import joined_ranks
    from megatron_align.training.setup import prepare_run
    from megatron_align.training.trainer import Trainer

    class Bad:
        shared, weight_version = False, 0

        def __init__(self, fault):
            self.fault = fault

        def update_weights(self, tensors, version):
            next(iter(tensors))
            raise self.fault

    errors = []
    setup = prepare_run(parse(arguments), rank_info)
    with joined_ranks(setup) as watchdog:
        trainer = Trainer.build(setup, watchdog)
        for fault in faults:
            try:
                trainer.update_engine(Bad(fault) if rank_info.rank == bad_rank else None)
            except InputError as error:
                errors.append(str(error))
    return errors


def reference_moves(rank_info: parallel.RankInfo, arguments: list[str]) -> list[tuple[float, bool]]:
    """Train; return of each step how far the live reference moved to the policy, and whether all its weights did so."""
    from megatron_align.training.optimizer import gather_parameters
    from megatron_align.training.trainer import Trainer

    def weights(chunks: list) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for chunk in chunks for p in chunk.parameters()]).clone()

    moves = []
    with Trainer.open(parse(arguments)) as trainer:
        reference = trainer.references.synced_chunks()
        assert reference is not None
        for step in range(trainer.steps):
            old = weights(reference)
            trainer.train_step(trainer.train_batches.step(step))
            gather_parameters(trainer.model)
            policy, new = weights(trainer.chunks), weights(reference)
            share = ((new - old) @ (policy - old) / (policy - old).square().sum()).item()
            moves.append((round(share, 4), torch.allclose(new, torch.lerp(old, policy, share), atol=1e-7)))
    return moves


def train_in_slabs(rank_info: parallel.RankInfo, arguments: list[str], rows: int | None) -> list[float]:
    """Train with slabs of at most ``rows`` rows of logits; return of each pack the samples this rank recomputed."""
    from megatron_align.kernels import RECOMPUTED
    from megatron_align.kernels.token_logprobs import slab
    from megatron_align.model import head

    recomputed: list[float] = []

    def counting(*args, **options):
        value, sums = slab_loss(*args, **options)
        recomputed.append(sums[RECOMPUTED].item())  # before the ranks agree on it
        return value, sums

    before, slab_loss = slab.SLAB_BYTES["cpu"], head.slab_loss
    if rows is not None:
        # 259 tokens, padded to a multiple of 128 on each rank
        columns = 128 * (3 if parse(arguments).parallel.tensor == 1 else 2)
        slab.SLAB_BYTES["cpu"] = rows * columns * 4
    try:
        with mock.patch.object(head, "slab_loss", counting):
            train(rank_info, arguments)
    finally:
        slab.SLAB_BYTES["cpu"] = before
    return recomputed


def train_in_buckets(rank_info: parallel.RankInfo, arguments: list[str], elements: int) -> None:
    """Train with gradients reduced and weights gathered in buckets of about ``elements`` elements."""
    from megatron_align.training import optimizer

    before, optimizer.BUCKET_ELEMENTS = optimizer.BUCKET_ELEMENTS, elements
    try:
        train(rank_info, arguments)
    finally:
        optimizer.BUCKET_ELEMENTS = before


def train_with_fakes(rank_info: parallel.RankInfo, arguments: list[str], *packages: str) -> None:
    """Train as on an sm_90 GPU with these packages of ``fake_packages``."""
    with installed(*packages):
        train(rank_info, arguments)
