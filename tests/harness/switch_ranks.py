"""Functions for the pool: the loss and the gradients of a pack with implementations that switches choose."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_align.config import ParallelConfig
from megatron_align.hf.load import load_weights
from megatron_align.model import parallel
from megatron_align.model.families import read_shape
from megatron_align.model.kernel_choice import KernelChoice
from megatron_align.model.policy import build_policy, transformer_config
from megatron_align.records import PackedBatch
from megatron_align.training.optimizer import wrap_data_parallel
from megatron_align.training.watchdog import join_watched
from tests.harness.fake_packages import installed


@dataclass(frozen=True)
class Choice:
    """Kernels, and the packages of ``fake_packages`` that are installed; ``recompute``: k of every k-th layer."""

    kernels: KernelChoice
    packages: tuple[str, ...] = ()
    recompute: int = 0


def losses_and_gradients(
    rank_info: parallel.RankInfo,
    model: Path,
    config: ParallelConfig,
    batches: list[PackedBatch],
    choices: list[Choice],
) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """Return of each choice the sum of all log-probs in fp32, and its gradients, summed over the packs, by name."""
    answers = []
    with join_watched(rank_info, config).watching():
        groups, shape = parallel.groups(), read_shape(model)
        for choice in choices:
            with installed(*choice.packages):
                megatron = transformer_config(
                    shape, config, torch.float32, choice.recompute, kernels=choice.kernels
                )
                [policy] = build_policy(megatron, shape, groups)
                load_weights(model, shape, policy.global_parameters(), groups.tp.rank(), groups.tp.size())
                [wrapped] = wrap_data_parallel([policy], config)
                wrapped.zero_grad_buffer()
                total = 0.0
                for batch in batches:
                    loss = wrapped(batch).sum()
                    loss.backward()
                    total += loss.item()
            parameters: dict[str, Any] = policy.global_parameters()
            gradients = {name: parameter.main_grad.clone() for name, parameter in parameters.items()}
            answers.append((total, gradients))
    parallel.leave()
    return answers
