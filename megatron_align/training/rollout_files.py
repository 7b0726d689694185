"""The rollouts of a run on the disk: written before they are trained on, read again by a run that resumes."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from megatron_align import faults
from megatron_align.config import to_dict
from megatron_align.config.rewards import FunctionReward
from megatron_align.config.rollout import OF_SERVERS
from megatron_align.data.batching.rollout_order import RolloutOrder
from megatron_align.data.store import sha256
from megatron_align.model.parallel import all_reduce_sum
from megatron_align.rollout.rollouts import Rollouts, read_rollouts, rollouts_folder, write_rollouts
from megatron_align.storage.deletion import discard
from megatron_align.training.generation import LivePolicy, PromptDraw

UPDATES = ("optimizer", "train")  # sections that determine the weights after a step


class RolloutFiles:
    """Reads and writes the sets of rollouts of a run, each with the key of everything that determines it.

    Args:
        trainer: of the run.
        order: of its steps.
        has_critic: a critic is trained in the same steps.

    Attributes:
        first_step: of this process, 0-based; None: it has made none yet.
    """

    def __init__(self, trainer: LivePolicy, order: RolloutOrder, *, has_critic: bool = False):
        self._trainer, self._order = trainer, order
        self._updates = (*UPDATES, *(("critic",) if has_critic else ()))
        self.first_step: int | None = None
        # A function's file may change between two starts: completions are then scored again.
        self._functions = {
            reward.path: sha256(reward.path.rpartition(":")[0])
            for reward in trainer.setup.config.rewards
            if isinstance(reward, FunctionReward)
        }

    def read(self, rollout: int, draw: PromptDraw) -> Rollouts | None:
        """Return a set: complete, or as it was generated before its first step; None: it is not on the disk.

        Raises:
            InputError: its file is corrupt.
        """
        first, run = rollout * self._order.steps_of_rollouts + 1, self._trainer.setup.folder
        key, unread = self._key(first, draw), self._unread(rollout)
        found = read_rollouts(rollouts_folder(run, first), key, unread)
        if found is None and self._trainer.config.rollout.off_policy_steps:
            found = read_rollouts(rollouts_folder(run, first, generated=True), key, unread)
        return found

    def write(self, rollout: int, rollouts: Rollouts, draw: PromptDraw, *, generated: bool = False) -> None:
        """Write a set on rank 0; ``generated``: before its first step. Collective.

        Raises:
            OSError: on every rank: the disk refuses it.
        """
        trainer = self._trainer
        trainer.setup.require_folder()
        fault: OSError | None = None
        if dist.get_rank() == 0:
            first, run = rollout * self._order.steps_of_rollouts + 1, trainer.setup.folder
            folder = rollouts_folder(run, first, generated=generated)
            try:
                folder.parent.mkdir(exist_ok=True)
                faults.at("rollouts.write", trainer.step + 1)
                write_rollouts(folder, rollouts, self._key(first, draw))
                if not generated:
                    discard(rollouts_folder(run, first, generated=True))
                faults.at("rollouts.written", trainer.step + 1)
            except OSError as error:
                fault = error
        if all_reduce_sum([float(fault is not None)])[0]:
            raise fault or OSError("rank 0 could not write the rollouts")

    def _key(self, first: int, draw: PromptDraw) -> dict[str, Any]:
        """Return everything that determines a set whose first step is ``first``, 1-based."""
        setup, config = self._trainer.setup, to_dict(self._trainer.config)
        return {
            "version": 1,
            "data": setup.train.path.name,
            "prompts": draw.prompts_G.tolist(),
            "first_step": first,
            "rollout": {name: v for name, v in config["rollout"].items() if name not in OF_SERVERS},
            "rewards": config.get("rewards"),
            "functions": self._functions,
            "objective": config["objective"],
            "reference": config["reference"],
            "seed": self._trainer.config.train.seed,
            "model": config["model"],
            **{name: config[name] for name in self._updates},
        }

    def _unread(self, rollout: int) -> tuple[str, ...]:
        """Return the parts of the key that need not match for a set.

        Those of an update do where the weights that sampled are not among those that the run resumes from: a run with
        another learning rate would never have had them.
        """
        assert self.first_step is not None, "a step was taken"
        before = max(0, rollout - self._trainer.config.rollout.off_policy_steps)
        return self._updates if before * self._order.steps_of_rollouts <= self.first_step else ()
