"""Open an adapter for use outside of training: a PEFT folder, or a checkpoint of a run that trained an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_align.checkpoint.card import (
    checkpoint_shape,
    describe_differences,
    read_checkpoint_metadata,
    shape_differences,
)
from megatron_align.checkpoint.folder import ADAPTER, ASSETS, CARD, STATE, find_checkpoint
from megatron_align.checkpoint.integrity import require_intact
from megatron_align.checkpoint.torch_metadata import StoredTensor, read_stored_tensors
from megatron_align.convert.state_reader import StateReader
from megatron_align.errors import InputError, listed
from megatron_align.hf.adapter import (
    ALPHA,
    CONFIG,
    adapter_table,
    base_hash,
    base_name,
    read_adapter,
    read_tensors,
)
from megatron_align.hf.adapter_start import plain_adapter, plain_tensors
from megatron_align.hf.load import weights_hash
from megatron_align.model.families import ModelShape
from megatron_align.model.families.adapter import PEFT, Adapter, adaptable_modules, adapter_tensors
from megatron_align.model.families.saved_modules import saveable_modules, with_tied_head


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredAdapter:
    """An adapter on disk.

    Args:
        folder: PEFT folder or checkpoint that holds it.
        shape: of the model that it adapts.
        adapter: rank, scale and modules.
        tensors: by PEFT's name, complete copies of modules and a reward model's score among them; stored dtypes.
        base: path or name of the base that it names; None: it names none.
        weights: hash of the base's weights; None: it does not say.
        holds_start: the adapter was trained on the base without what A and B started with: the second half of its rank.
    """

    folder: Path
    shape: ModelShape
    adapter: Adapter
    tensors: Mapping[str, Tensor]
    base: str | None
    weights: str | None
    holds_start: bool = False

    def require_base(self, weights: str | Path) -> None:
        """Refuse a base with other weights than those that the adapter was trained on; it may not say.

        Args:
            weights: Hugging Face folder or checkpoint of the base. All of its files are read.

        Raises:
            InputError: naming both hashes.
        """
        if self.weights is not None:
            self.require_hash(weights_hash(Path(weights)), weights)

    def require_hash(self, weights_hash: str, base: str | Path) -> None:
        """Refuse a base whose weights have another hash; see :meth:`require_base`."""
        if self.weights not in (None, weights_hash):
            raise InputError(
                f"the adapter is of another base: it was trained on weights with sha256 {str(self.weights)[:16]}, "
                f"those in {base} have {weights_hash[:16]} (adapter {self.folder})"
            )


def open_adapter(path: str | Path, shape: ModelShape) -> StoredAdapter:
    """Return the adapter at ``path``: a PEFT folder, a checkpoint that holds an adapter, or the newest one of a run.

    Args:
        path: of the folder; also one whose ``adapter/`` is a PEFT folder.
        shape: of the model that it must fit.

    Raises:
        InputError: there is none, it is corrupt, or of another architecture or size.
    """
    path = Path(path)
    checkpoint = None if (path / CONFIG).is_file() else find_checkpoint(path)
    if checkpoint is None:
        is_inside = not (path / CONFIG).is_file() and (path / ADAPTER / CONFIG).is_file()
        return _open_peft(path / ADAPTER if is_inside else path, shape)
    found = open_adapter_checkpoint(checkpoint)
    if facts := describe_differences(shape, found.shape):
        raise InputError(f"the adapter is of another model: {facts} in {checkpoint}")
    return found


def _open_peft(folder: Path, shape: ModelShape) -> StoredAdapter:
    return StoredAdapter(
        folder=folder,
        shape=shape,
        adapter=read_adapter(folder, shape),
        tensors=read_tensors(folder),
        base=base_name(folder),
        weights=base_hash(folder),
    )


def holds_adapter(checkpoint: Path) -> bool:
    """Return whether a checkpoint holds an adapter instead of a complete model."""
    return bool(read_checkpoint_metadata(checkpoint).get("adapter"))


def open_adapter_checkpoint(folder: Path) -> StoredAdapter:
    """Return the adapter of a checkpoint, having verified its checksums.

    Raises:
        InputError: it holds a complete model, is corrupt, or contradicts itself.
    """
    metadata, shape = read_checkpoint_metadata(folder), checkpoint_shape(folder)
    if not (entry := metadata.get("adapter")):
        raise InputError(f"the checkpoint holds a complete model, not an adapter: {folder}")
    if differences := shape_differences(asdict(shape), metadata["shape"]):
        raise InputError(f"{CARD} does not match {ASSETS}/config.json: {listed(differences)} in {folder}")
    require_intact(folder)
    stored = read_stored_tensors(folder / STATE)
    adapter = _adapter_of(stored, shape, _options(metadata, folder), folder)
    table = list(adapter_table(shape, adapter, with_start=True))
    state = StateReader(folder / STATE, shape, table)
    tensors = {name: tensor for row in table for name, tensor in state.read(row).items()}
    tensors = with_tied_head(tensors, shape, adapter)
    return StoredAdapter(
        folder=folder,
        shape=shape,
        adapter=plain_adapter(adapter),
        tensors=plain_tensors(adapter, tensors),
        holds_start=adapter.holds_start,
        base=entry["base"],
        weights=entry["weights"],
    )


def _options(metadata: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return alpha, rslora and dropout of a checkpoint's adapter; older ones have them in their configuration only."""
    entry, options = metadata["adapter"], metadata["config"]["model"]["adapter"]
    if "alpha" in entry:
        return {name: entry[name] for name in ("alpha", "rslora", "dropout", "dora", "init") if name in entry}
    if (start := options["path"]) is None:
        return {"alpha": float(options["alpha"] or ALPHA), "rslora": bool(options["rslora"])}
    try:
        found = read_adapter(start, checkpoint_shape(folder))
    except InputError as error:
        raise InputError(
            f"the checkpoint does not say the adapter's alpha, which the adapter that it started from has: {error}"
        ) from error
    return {"alpha": found.alpha, "rslora": found.rslora}


def _adapter_of(
    stored: Mapping[str, StoredTensor], shape: ModelShape, options: dict[str, Any], folder: Path
) -> Adapter:
    """Return the adapter whose A and B are stored: its modules and rank are those of the tensors."""
    saveable = frozenset(saveable_modules(shape))
    every = Adapter(rank=1, modules=frozenset(adaptable_modules(shape)), saved=saveable, **options)
    first = {
        row.hf[0]: stored[row.megatron].shape for row in adapter_table(shape, every) if row.megatron in stored
    }
    ranks = {
        size[0] for name, size in first.items() if name.endswith((".lora_A.weight", ".lora_embedding_A"))
    }
    if len(ranks) != 1:
        found = f"ranks {listed(sorted(ranks))}" if ranks else "no A"
        raise InputError(f"a checkpoint's adapter must have one rank, found {found} in {folder / STATE}")
    modules = frozenset(name for name in every.modules if adapter_tensors(name)[0] in first)
    saved = frozenset(name for name in saveable if f"{PEFT}{name}.weight" in first)
    return Adapter(rank=ranks.pop(), modules=modules, saved=saved, **options)
