"""The gradient of a run's first step, gathered from its layout and named as Hugging Face names the weights."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from megatron_align.checkpoint.export import export_model
from megatron_align.config import parse
from megatron_align.model import parallel
from megatron_align.training.loop import _Run
from megatron_align.training.setup import prepare


class _NoUpdate:
    """In place of the optimizer: leaves weights and gradients alone."""

    def zero_grad(self) -> None:
        pass

    def grad_norm(self) -> float:
        return 0.0

    def update(self, norm: float) -> None:
        pass


def write_gradients(place: parallel.Place, arguments: list[str], folder: Path) -> None:
    """Write the first step's gradient to ``folder`` as a Hugging Face model, whatever the layout.

    It travels as the weights do: each data-parallel rank's share is laid into the parameters and gathered there.
    """
    plan = prepare(parse(arguments), place)
    with parallel.join(place, plan.config.parallel).watching() as watchdog:
        run = _Run(plan, watchdog)
        run.stepper.optimizer = _NoUpdate()
        run.stepper.train(run._ahead("train").batches(run.batches.step(0), training=True))
        with torch.no_grad():
            for chunk in run.model:
                for parameter in chunk.parameters():
                    parameter.copy_(parameter.main_grad)
                chunk.start_param_sync(force_sync=True)
        export_model([chunk.module for chunk in run.model], folder, plan.assets, overwrite=True)
    parallel.leave()


def assert_same_gradients(got: Path, want: Path, rel: float) -> None:
    """Check every tensor: the norm of the difference over the norm."""
    tensors, others = (load_file(folder / "model.safetensors") for folder in (got, want))
    assert tensors.keys() == others.keys()
    for name, other in others.items():
        assert other.norm() > 0, name
        assert (tensors[name] - other).norm() <= rel * other.norm(), name
