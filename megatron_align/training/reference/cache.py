"""Cached log-probs of the reference: one number per completion, computed once, kept in a file, reused by later runs.

A column's key is a hash of everything its values depend on: weights, the model's config, tokenised data, precision,
options of the sums.
It is filled for the samples that a run uses; a run with others fills in those. The file is replaced atomically.

Shapes: K entries of a column (completions of a store, or steps of a run).
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
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
from megatron_align.data.batching.sampler import passes_per_epoch, step_order
from megatron_align.data.batching.step_batches import Step, StepBatches
from megatron_align.data.store import TokenStore
from megatron_align.data.tokenize.cache_key import CACHE_IN_RUN
from megatron_align.errors import InputError
from megatron_align.hf.load import weights_hash
from megatron_align.model import cpu
from megatron_align.model.families import ModelShape
from megatron_align.objectives.base import Objective
from megatron_align.storage.atomic_write import replace_file
from megatron_align.training.reference.logprobs import CachedReference
from megatron_align.training.scoring import Scorer, gather_step, mismatched_sums
from megatron_align.training.setup import RunSetup, one_epoch
from megatron_align.training.watchdog import Watchdog

SAVE_SECONDS = 60.0
VERSION = 1


@dataclass(frozen=True, slots=True)
class Column:
    """Numbers in a file.

    Args:
        file: of the column.
        key: what the values depend on, by name; the file's first line holds it.
        values_K: float64, NaN where not computed yet.
    """

    file: Path
    key: dict[str, Any]
    values_K: np.ndarray

    @classmethod
    def open(cls, folder: Path, key: dict[str, Any], entries: int) -> Column:
        """Read the column with this key in ``folder``, or start an empty one.

        Raises:
            InputError: the file is corrupt, or its key differs: names the part that does.
        """
        key = {"version": VERSION, "entries": entries, **key}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        file = folder / f"reference_{digest}.bin"
        return cls(file, key, _read(file, key) if file.exists() else np.full(entries, np.nan))

    def save(self) -> None:
        """Write the file atomically: to a temporary name, then renamed."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.file.with_name(f".{self.file.name}.{os.getpid()}")
        header = {"facts": self.key, "sha256": hashlib.sha256(self.values_K).hexdigest()}
        try:
            with open(temporary, "wb") as out:
                out.write(json.dumps(header).encode() + b"\n")
                out.write(np.ascontiguousarray(self.values_K, dtype="<f8"))
            replace_file(temporary, self.file)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise OSError(
                f"the reference's log-probs could not be written: {error.strerror} at {self.file}"
            ) from error


def _read(file: Path, key: dict[str, Any]) -> np.ndarray:
    remedy = "delete the file: it will be computed again"
    with open(file, "rb") as opened:
        try:
            header = json.loads(opened.readline())
            found, checksum = header["facts"], header["sha256"]
        except (ValueError, LookupError, TypeError) as error:
            raise InputError(
                f"cached reference log-probs are corrupt: no header in {file}; {remedy}"
            ) from error
        values_K = np.frombuffer(opened.read(), dtype=np.uint8)
    for name, value in key.items():
        if found.get(name) != value:
            raise InputError(
                f"cached reference log-probs must have {name} {value}, got {found.get(name)} in {file}; {remedy}"
            )
    if hashlib.sha256(values_K).hexdigest() != checksum or len(values_K) != 8 * key["entries"]:
        raise InputError(
            f"cached reference log-probs are corrupt: SHA-256 mismatch in {file} ({len(values_K)} bytes); {remedy}"
        )
    return values_K.view("<f8").astype(np.float64)


@dataclass(frozen=True, slots=True)
class ReferenceColumns:
    """The cached log-probs of one split of a run.

    Args:
        completions: summed log-prob of each completion of the store.
        mismatched: of each step, the mean over prompts with other samples' completions (KTO); None: not needed.
    """

    completions: Column
    mismatched: Column | None

    @classmethod
    def open_all(
        cls, setup: RunSetup, config: RunConfig, objective: Objective, weights: str
    ) -> dict[str, ReferenceColumns]:
        """Open the columns of training and validation data. Collective: every rank gets the values of rank 0's files.

        Args:
            setup: of the run.
            config: of the run.
            objective: of the run.
            weights: hash of the reference's weights.
        """
        key = {
            "weights": weights,
            "shape": shape_key(setup.reference.shape),
            "precision": config.train.arithmetic,
            **objective.scoring_options,
        }
        folder = cache_folder(config)
        opened = {}
        for split in ("train", "validation"):
            store: TokenStore | None = getattr(setup, split)
            if store is None:
                continue
            of_split = {**key, "data": store.path.name}
            columns = [Column.open(folder, of_split, int(store.completion_offsets[-1]))]
            if "mismatched_logprobs" in objective.needs:
                order, steps = _order_key(setup, split)
                columns.append(Column.open(folder, {**of_split, **order}, steps))
            for column in columns:
                broadcast(column)
            opened[split] = cls(columns[0], columns[1] if len(columns) > 1 else None)
        return opened

    def added_to(self, store: TokenStore) -> TokenStore:
        """Return the store with the reference's log-probs as a column of its completions."""
        return store.with_completion_columns({"reference_logprobs": self.completions.values_K})

    def reference(self) -> CachedReference:
        """Return the reference that reads these columns."""
        return CachedReference(self.mismatched.values_K if self.mismatched else None)

    def missing(self, steps: StepBatches, wanted: range) -> list[int]:
        """Return the steps of ``wanted`` with values that neither the columns nor earlier steps of the list provide."""
        of_steps = None if self.mismatched is None else self.mismatched.values_K
        return missing_steps(self.completions.values_K, steps, wanted, of_steps)

    def fill(
        self,
        steps: StepBatches,
        missing: list[int],
        scorer: Scorer,
        groups: ProcessGroupCollection,
        watchdog: Watchdog,
    ) -> None:
        """Compute the values of some steps with a model that holds the reference's weights; rank 0 writes the files.

        The packs are those of training, so on the same layout a policy with the same weights gives the same numbers,
        bit for bit.
        """
        for step in computed_steps(steps, missing, "Reference log-probs", watchdog, self._save):
            values_S = gather_step(scorer.sums(step.batches), step.packs, step, groups)
            self.completions.values_K[step.stored_C] = values_S.numpy()
            if self.mismatched is not None:
                values_S = mismatched_sums(scorer, step, groups)
                self.mismatched.values_K[step.number] = values_S.mean().item()

    def _save(self) -> None:
        if dist.get_rank() == 0:
            for column in filter(None, (self.completions, self.mismatched)):
                column.save()


def missing_steps(
    values_K: np.ndarray, steps: StepBatches, wanted: range, of_steps: np.ndarray | None = None
) -> list[int]:
    """Return the steps of ``wanted`` with values that neither a column nor earlier steps of the list provide.

    Args:
        values_K: of each completion of the store, NaN where not computed yet.
        steps: of the split.
        wanted: 0-based.
        of_steps: of each step, in the same way; None: there are none.
    """
    computed_K = ~np.isnan(values_K)
    missing = []
    for step in wanted:
        stored = steps.stored(step)
        if (of_steps is not None and np.isnan(of_steps[step])) or not computed_K[stored].all():
            missing.append(step)
            computed_K[stored] = True
    return missing


def computed_steps(
    steps: StepBatches, missing: Sequence[int], what: str, watchdog: Watchdog, save: Callable[[], None]
) -> Iterator[Step]:
    """Yield some steps, to be computed by the caller; save now and then, and after the last one.

    Args:
        steps: of the split.
        missing: 0-based.
        what: name of what is computed, for the progress bar.
        watchdog: of this rank.
        save: writes what was computed so far.
    """
    saved = time.monotonic()
    with Prefetcher(missing, steps.step) as data, _progress(len(missing), what) as advance:
        for step in data:
            watchdog.report(f"reference step {step.number + 1}")
            yield step
            advance()
            if time.monotonic() - saved > SAVE_SECONDS:
                save()
                saved = time.monotonic()
    save()


def cache_folder(config: RunConfig) -> Path:
    """Return the folder of a run's cached columns."""
    return Path(config.data.cache or Path(config.checkpoint.dir) / CACHE_IN_RUN)


def shape_key(shape: ModelShape) -> dict[str, Any]:
    """Return what a reference's log-probs depend on besides its weight files: RoPE, epsilons, heads of its config.json.

    A field at its default is left out, so that one that is added changes no key.
    """
    values = asdict(shape)
    return {field.name: values[field.name] for field in fields(shape) if values[field.name] != field.default}


def hash_of_rank_0(weights: Path) -> str:
    """Return the hash of the weights, which only rank 0 reads. Collective."""
    of_rank_0 = [weights_hash(weights) if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(of_rank_0, src=0)
    return of_rank_0[0]


def _order_key(setup: RunSetup, split: str) -> tuple[dict[str, Any], int]:
    """Return everything that determines the samples of each step, and the number of steps."""
    data, sources = setup.config.data, getattr(setup.config.data, split)
    train = setup.config.train if split == "train" else one_epoch(setup.config.train)
    names = ("seed", "global_batch_size", "global_batch_tokens", "epochs")
    key = {name: getattr(train, name) for name in names}
    key |= {"shuffle": data.shuffle, "passes": list(passes_per_epoch(sources))}
    steps = step_order(getattr(setup, split), data, train, sources).steps
    return {**key, "sequence_length": data.sequence_length}, steps


@contextmanager
def _progress(steps: int, what: str) -> Iterator[Callable[[], None]]:
    """Show a progress bar on rank 0's terminal; yield the function that advances it by a step."""
    hidden = dist.get_rank() != 0 or not sys.stderr.isatty()
    with Progress(console=Console(stderr=True), transient=True, disable=hidden) as bar:
        task = bar.add_task(what, total=steps)
        yield lambda: bar.update(task, advance=1)


def broadcast(column: Column) -> None:
    """Copy rank 0's values to every rank."""
    values_K = torch.from_numpy(column.values_K).to(cpu.device())
    dist.broadcast(values_K, src=0)
    column.values_K[:] = values_K.cpu().numpy()
