"""Training runs with one injected defect that a check must detect; called on every rank of the pool."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist

from megatron_align.data.batching.step_batches import StepBatches
from megatron_align.errors import TrainingFault
from megatron_align.kernels import PackedLayout
from megatron_align.model import parallel
from megatron_align.objectives.configuration import parse
from megatron_align.training import self_check
from megatron_align.training.loop import run_trainer
from megatron_align.training.setup import prepare_run
from megatron_align.training.trainer import Trainer
from megatron_align.training.watchdog import join_watched


def train_broken(rank_info: parallel.RankInfo, arguments: list[str], what: str) -> str:
    """Train with the defect ``what``, on the last rank only where ranks can differ; return the fault that ends it."""
    setup = prepare_run(parse(arguments), rank_info)
    with join_watched(rank_info, setup.config.parallel).watching() as watchdog:
        trainer = Trainer.build(setup, watchdog)
        last = dist.get_rank() == dist.get_world_size() - 1
        parameters = {n: p for chunk in trainer.model for n, p in chunk.module.global_parameters().items()}
        with torch.no_grad():
            if what == "parameter" and last:
                parameters["decoder.layers.1.self_attention.linear_proj.weight"][0, 0] += 1e-3
            if what == "norm" and last:
                parameters["decoder.layers.0.input_layernorm.weight"][5] *= 1.001
            if what == "tied" and last:
                parameters["output_layer.weight"][1, 1] += 1e-3
        if what == "plan" and last:
            trainer.train_batches = _Reordered(trainer.train_batches)
        if what == "reference":
            trainer.references.columns["train"].completions.values_K[:] -= 1.0
        before = self_check.pack
        if what == "leak":
            self_check.pack = _leaking(before)
        try:
            run_trainer(trainer)
            fault = "none"
        except TrainingFault as error:
            fault = str(error)
        finally:
            self_check.pack = before
    parallel.leave()
    return fault


class _Reordered:
    """Batches that report the fingerprint of the following step."""

    def __init__(self, batches: StepBatches):
        self._batches = batches

    def __getattr__(self, name: str) -> object:
        return getattr(self._batches, name)

    def fingerprint(self, step: int) -> str:
        return self._batches.fingerprint(step + 1)


def _leaking(pack):
    """Return a ``pack`` whose samples attend to all samples before them."""

    def leak(samples, weights, tokens, **options):
        batch = pack(samples, weights, tokens, **options)
        return replace(batch, layout=PackedLayout.from_lengths([tokens]))

    return leak
