"""The reference's log-probs as data: one number per completion, computed once, kept in a file, shared by later runs.

A column is keyed by the hashes of all that decides it (weights, tokenised data, precision, options of the sums) and
is filled for the samples that a run will meet; a run that meets others fills it further. The file is replaced whole.

Shapes: K entries of a column (completions of a store, or steps of a run).
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from rich.console import Console
from rich.progress import Progress

from megatron_align.config import RunConfig
from megatron_align.data.batching.prefetch import Prefetcher
from megatron_align.data.batching.sampler import passes_per_epoch
from megatron_align.data.batching.step_batches import StepBatches, step_order
from megatron_align.data.store import TokenStore, sha256
from megatron_align.data.tokenize.cache_key import CACHE_IN_RUN
from megatron_align.errors import InputError
from megatron_align.model import cpu
from megatron_align.objectives.base import Objective
from megatron_align.training.reference_model import CachedReference
from megatron_align.training.scoring import Scorer, gather_step
from megatron_align.training.setup import RunSetup, one_epoch
from megatron_align.training.watchdog import Watchdog

SAVE_SECONDS = 60.0
VERSION = 1


@dataclass(frozen=True, slots=True)
class Column:
    """Numbers in a file: ``values_K`` (float64), NaN where not computed yet."""

    file: Path
    facts: dict[str, Any]  # what decides the values
    values_K: np.ndarray

    @classmethod
    def open(cls, folder: Path, facts: dict[str, Any], entries: int) -> Column:
        """Read the column of these facts in ``folder``, or start it.

        Raises:
            InputError: the file is damaged, or its facts are others: names the one that differs.
        """
        facts = {"version": VERSION, "entries": entries, **facts}
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        file = folder / f"reference_{key}.bin"
        if not file.exists():
            return cls(file, facts, np.full(entries, np.nan))
        return cls(file, facts, _read(file, facts))

    def save(self) -> None:
        """Write the column beside its place, then give it its name."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        half = self.file.with_name(f".{self.file.name}.{os.getpid()}")
        header = {"facts": self.facts, "sha256": hashlib.sha256(self.values_K).hexdigest()}
        try:
            with open(half, "wb") as out:
                out.write(json.dumps(header).encode() + b"\n")
                out.write(np.ascontiguousarray(self.values_K, dtype="<f8"))
                out.flush()
                os.fsync(out.fileno())
            os.replace(half, self.file)
        except OSError as error:
            half.unlink(missing_ok=True)
            raise OSError(
                f"{self.file}: the reference's log-probs could not be written: {error.strerror}"
            ) from error


def _read(file: Path, facts: dict[str, Any]) -> np.ndarray:
    remedy = "delete it, it will be made anew"
    with open(file, "rb") as opened:
        try:
            header = json.loads(opened.readline())
            found, digest = header["facts"], header["sha256"]
        except (ValueError, LookupError, TypeError) as error:
            raise InputError(f"{file}: must start with a line of facts, found none: {remedy}") from error
        values_K = np.frombuffer(opened.read(), dtype=np.uint8)
    for name, fact in facts.items():
        if found.get(name) != fact:
            raise InputError(f"{file}: must be of {name} {fact}, got {found.get(name)}: {remedy}")
    if hashlib.sha256(values_K).hexdigest() != digest or len(values_K) != 8 * facts["entries"]:
        raise InputError(
            f"{file}: must have sha256 {digest}, its {len(values_K)} bytes have another: {remedy}"
        )
    return values_K.view("<f8").astype(np.float64)


def weights_hash(path: Path) -> str:
    """Return one hash of all weight files of a Hugging Face folder or of a checkpoint."""
    files = sorted(path.glob("*.safetensors")) or sorted(p for p in (path / "state").iterdir() if p.is_file())
    told = [(file.name, sha256(file)) for file in files]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class ReferenceColumns:
    """What one split of a run needs of its reference.

    Args:
        completions: summed log-prob of each completion of the store.
        mismatched: of each step, the mean over prompts with other samples' completions (KTO); None: not needed.
    """

    completions: Column
    mismatched: Column | None

    @classmethod
    def open_all(
        cls, plan: RunSetup, config: RunConfig, objective: Objective, weights: str
    ) -> dict[str, ReferenceColumns]:
        """Open the columns of training and validation data; rank 0's files count, for every rank.

        Args:
            plan: of the run.
            config: of the run.
            objective: of the run.
            weights: the reference's hash.
        """
        facts = {
            "weights": weights,
            "precision": config.train.precision,
            **objective.scoring_options,
        }
        folder = Path(config.data.cache or Path(config.checkpoint.dir) / CACHE_IN_RUN)
        found = {}
        for split in ("train", "validation"):
            store: TokenStore | None = getattr(plan, split)
            if store is None:
                continue
            of_split = {**facts, "data": store.path.name}
            columns = [Column.open(folder, of_split, int(store.completion_offsets[-1]))]
            if "mismatched_logprobs" in objective.needs:
                order, steps = _order_facts(plan, split)
                columns.append(Column.open(folder, {**of_split, **order}, steps))
            for column in columns:
                _agree(column)
            found[split] = cls(columns[0], columns[1] if len(columns) > 1 else None)
        return found

    def reference(self) -> CachedReference:
        """Return them as what a step compares with."""
        return CachedReference(self.mismatched and self.mismatched.values_K)

    def missing(self, steps: StepBatches, wanted: range) -> list[int]:
        """Return the steps of ``wanted`` that need numbers which neither the columns nor earlier ones have."""
        known_K = ~np.isnan(self.completions.values_K)
        found = []
        for step in wanted:
            stored = steps.stored(step)
            lacks_mean = self.mismatched is not None and np.isnan(self.mismatched.values_K[step])
            if lacks_mean or not known_K[stored].all():
                found.append(step)
                known_K[stored] = True
        return found

    def fill(
        self,
        steps: StepBatches,
        missing: list[int],
        scorer: Scorer,
        groups: ProcessGroupCollection,
        watchdog: Watchdog,
    ) -> None:
        """Run a model with the reference's weights over some steps; rank 0 keeps the files.

        The packs are those of training, so on the same layout a policy with the same weights gives the very same
        numbers, bit by bit.
        """
        saved = time.monotonic()
        with Prefetcher(missing, steps.step) as ahead, _progress(len(missing)) as say:
            for step in ahead:
                watchdog.report(f"reference step {step.number + 1}")
                found = scorer.sums(step.batches)
                self.completions.values_K[step.stored_C] = gather_step(
                    found, step.packs, step, groups
                ).numpy()
                if self.mismatched is not None:
                    found = scorer.sums(step.mismatched.batches)
                    values_S = gather_step(found, step.mismatched, step, groups)
                    self.mismatched.values_K[step.number] = values_S.mean().item()
                say()
                if time.monotonic() - saved > SAVE_SECONDS:
                    self._save()
                    saved = time.monotonic()
        self._save()

    def _save(self) -> None:
        if dist.get_rank() == 0:
            for column in filter(None, (self.completions, self.mismatched)):
                column.save()


def hash_of_rank_0(weights: Path) -> str:
    """Return the hash of the weights as rank 0 reads them: once, not once on every rank."""
    found = [weights_hash(weights) if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def _order_facts(plan: RunSetup, split: str) -> tuple[dict[str, Any], int]:
    """Return what decides which samples meet in each step, and how many steps there are."""
    data, sources = plan.config.data, getattr(plan.config.data, split)
    train = plan.config.train if split == "train" else one_epoch(plan.config.train)
    names = ("seed", "global_batch_size", "global_batch_tokens", "epochs")
    facts = {name: getattr(train, name) for name in names}
    facts |= {"shuffle": data.shuffle, "passes": list(passes_per_epoch(sources))}
    steps = train.steps or step_order(getattr(plan, split), data, train, sources).steps
    return {**facts, "sequence_length": data.sequence_length}, steps


@contextmanager
def _progress(steps: int) -> Iterator[Callable[[], None]]:
    """Yield what moves the bar on, on rank 0's terminal."""
    hidden = dist.get_rank() != 0 or not sys.stderr.isatty()
    with Progress(console=Console(stderr=True), transient=True, disable=hidden) as progress:
        task = progress.add_task("Reference log-probs", total=steps)
        yield lambda: progress.update(task, advance=1)


def _agree(column: Column) -> None:
    """Take rank 0's values on every rank."""
    values_K = torch.from_numpy(column.values_K).to(cpu.device())
    dist.broadcast(values_K, src=0)
    column.values_K[:] = values_K.cpu().numpy()
