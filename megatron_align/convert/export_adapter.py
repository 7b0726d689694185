"""Export the adapter of a checkpoint as a PEFT folder, and with its base the merged model.

One CPU process, without process groups. In memory are the adapter, and twice the tensors of a row of the weight table.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_align.checkpoint.folder import ADAPTER, ASSETS, HF
from megatron_align.convert.export_hf import write_model_card
from megatron_align.convert.merged_state import MergedState, open_base
from megatron_align.convert.open_adapter import StoredAdapter, open_adapter_checkpoint
from megatron_align.convert.open_checkpoint import model_dtype
from megatron_align.errors import InputError
from megatron_align.hf.adapter import require_finite_tensors, write_adapter
from megatron_align.hf.assets import copy_assets, write_config_dtype
from megatron_align.hf.hub import is_hub_name
from megatron_align.hf.writer import ShardWriter, hf_specs
from megatron_align.model.families import rows
from megatron_align.storage.atomic_write import require_new, require_one_process, require_space
from megatron_align.storage.journal import fingerprint
from megatron_align.storage.progress import Progress
from megatron_align.storage.tensor_digest import TensorDigest, count_nonfinite, require_finite
from megatron_align.storage.threads import single_threaded


@dataclass(frozen=True, slots=True)
class ExportedAdapter:
    """An exported adapter, and the base that it was merged into.

    Args:
        stored: the adapter.
        base: of the merged model; None: there is no merged model.
        missing: why there is none.
    """

    stored: StoredAdapter
    base: Path | None
    missing: str | None


def export_adapter(
    checkpoint: Path, out: str | Path, base: str | Path | None = None, dtype: str | None = None
) -> ExportedAdapter:
    """Write ``out/adapter``, a PEFT folder, and ``out/hf``, the merged model; the second resumes after a kill.

    Args:
        checkpoint: that holds an adapter.
        out: folder of both, neither of which may exist.
        base: Hugging Face folder or checkpoint that the adapter was trained on; None: the one that the checkpoint
            names, and if that is not there, or holds other weights now, no merged model.
        dtype: of the merged model; None: that of the training.

    Raises:
        InputError: the checkpoint is corrupt, ``base`` is another one, or ``out`` is not usable.
    """
    require_one_process()
    stored = open_adapter_checkpoint(checkpoint)
    require_finite_tensors(stored.tensors, checkpoint)
    folders = {name: require_new(Path(out) / name) for name in (HF, ADAPTER)}
    found, missing = find_base(stored, base)
    if found is not None:
        _export_merged(stored, found, folders[HF], dtype)
    assert stored.base is not None, "a checkpoint names its adapter's base"
    write_adapter(folders[ADAPTER], stored.tensors, stored.adapter, stored.shape, stored.base, stored.weights)
    return ExportedAdapter(stored, found, missing)


def find_base(stored: StoredAdapter, base: str | Path | None) -> tuple[Path | None, str | None]:
    """Return the base of an adapter whose weights it was trained on, or why there is none.

    Args:
        stored: the adapter.
        base: that must be it; None: the one that the adapter names, if it is still there.

    Raises:
        InputError: ``base`` has other weights, or is no model.
    """
    if base is not None:
        folder, _ = open_base(base)
        stored.require_base(folder)
        return folder, None
    name = str(stored.base)
    if is_hub_name(name) or not Path(name).exists():
        return None, f"its base {name} is not here"
    try:
        folder, _ = open_base(name)
        stored.require_base(folder)
    except InputError as error:
        return None, str(error)
    return folder, None


def _export_merged(stored: StoredAdapter, base: Path, folder: Path, dtype: str | None) -> None:
    trained = model_dtype(stored.folder)
    written = getattr(torch, dtype) if dtype else trained
    state = MergedState(open_base(base)[1], stored, trained, written)
    specs = hf_specs(stored.shape, written)
    size = sum(spec.nbytes for spec in specs.values())
    require_space(folder, size)
    key = {"export": [fingerprint(stored.folder), fingerprint(base)], "dtype": dtype}
    with (
        ShardWriter(folder, specs, key=key) as writer,
        Progress("exporting", size) as progress,
        single_threaded(),
    ):
        for row in rows(stored.shape):
            if not all(writer.has(name) for name in row.hf):
                for name, tensor in state.read(row).items():
                    writer.write(name, tensor, notes=count_nonfinite(tensor))
            progress.add(sum(specs[name].nbytes for name in row.hf))
        require_finite({name: TensorDigest("", *writer.notes(name)) for name in specs}, base)
        copy_assets(stored.folder / ASSETS, writer.partial)
        write_config_dtype(writer.partial, written)
        write_model_card(stored.folder, writer.partial)
