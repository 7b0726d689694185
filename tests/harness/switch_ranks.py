"""Functions for the pool: loss, gradients and update of a model with implementations that switches choose."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_align.config import OptimizerConfig, ParallelConfig
from megatron_align.hf.load import load_weights
from megatron_align.model import parallel
from megatron_align.model.families import read_shape
from megatron_align.model.kernel_choice import KernelChoice
from megatron_align.model.policy import build_policy, transformer_config
from megatron_align.records import PackedBatch
from megatron_align.training.optimizer import build_optimizer, wrap_data_parallel
from megatron_align.training.watchdog import join_watched
from tests.harness.fake_packages import CALLS, installed


@dataclass(frozen=True)
class Choice:
    """Kernels, and the packages of ``fake_packages`` that are installed.

    Args:
        kernels: of the model.
        packages: that are installed.
        recompute: k of every k-th layer.
        update: implementation of an update that is made with the gradients; None: none is made.
    """

    kernels: KernelChoice
    packages: tuple[str, ...] = ()
    recompute: int = 0
    update: Literal["torch", "apex"] | None = None


@dataclass(frozen=True)
class Found:
    """What a rank found: the sum of all log-probs, its gradients, the weights after the update, and calls of fakes."""

    loss: float
    gradients: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    calls: Counter[str]


def losses_and_gradients(
    rank_info: parallel.RankInfo,
    model: Path,
    config: ParallelConfig,
    batch: PackedBatch,
    choices: list[Choice],
) -> list[Found]:
    """Return what each choice gives of a pack in fp32, tensors by name."""
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
                loss = wrapped(batch).sum()
                loss.backward()
                parameters: dict[str, Any] = policy.global_parameters()
                gradients = {name: parameter.main_grad.clone() for name, parameter in parameters.items()}
                if choice.update is not None:
                    options = OptimizerConfig(lr=1e-3, implementation=choice.update)
                    optimizer = build_optimizer([wrapped], options, groups)
                    optimizer.finish_update(optimizer.grad_norm().item())
                weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
                answers.append(Found(loss.item(), gradients, weights, CALLS.copy()))
    parallel.leave()
    return answers
