"""Export the model that all ranks hold as one Hugging Face folder, tensor by tensor."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_align.errors import TrainingFault
from megatron_align.hf.assets import AssetChanges, write_assets, write_config_dtype
from megatron_align.hf.gather import gathered_rows
from megatron_align.hf.model_card import CARD
from megatron_align.hf.writer import ShardWriter, hf_specs
from megatron_align.model.policy import Policy
from megatron_align.storage.tensor_digest import TensorDigest, count_nonfinite, describe_nonfinite


@torch.no_grad()
def export_model(
    chunks: list[Policy],
    folder: Path,
    assets: Path,
    overwrite: bool = False,
    changes: AssetChanges = AssetChanges(),  # noqa: B008 - immutable
    readme: str | None = None,
) -> None:
    """Write the model as a Hugging Face folder, an adapter merged; every rank calls this, rank 0 writes.

    Tensors keep the model's dtype, which config.json then states. Rank 0 holds the HF tensors of one row of the
    weight table at a time. The write is atomic.

    Args:
        chunks: this rank's chunks.
        folder: to be written.
        assets: HF folder to copy config, generation config and tokenizer from.
        overwrite: replace an existing folder.
        changes: of training in the copied files.
        readme: text of the model card, README.md; None: none is written.

    Raises:
        InputError: the folder exists and ``overwrite`` is not set.
        TrainingFault: on every rank: the weights are not finite; nothing is written.
    """
    shape = chunks[0].shape
    fault: list[str | None] = [None]
    if chunks[0].pg_collection.dp_cp.rank() == 0:
        dtype = chunks[0].config.params_dtype
        specs, writes = hf_specs(shape, dtype), dist.get_rank() == 0
        with (
            suppress(_NotFinite),
            ShardWriter(folder, specs, overwrite=overwrite) if writes else nullcontext() as writer,
        ):
            fault[0] = _write_tensors(chunks, writer)
            if fault[0]:
                raise _NotFinite  # the writer leaves no trace
            if writer:
                write_assets(assets, writer.partial, shape, changes)
                write_config_dtype(writer.partial, dtype)
                if readme is not None:
                    (writer.partial / CARD).write_text(readme, encoding="utf-8")
    dist.broadcast_object_list(fault, src=0)
    if fault[0]:
        raise TrainingFault(
            f"the trained weights are not finite, no Hugging Face folder was written: {fault[0]}; start from an older "
            "checkpoint, with a smaller optimizer.lr"
        )


def _write_tensors(chunks: list[Policy], writer: ShardWriter | None) -> str | None:
    """Collect and write all tensors; return what is not finite in them, where this rank writes.

    Called by the ranks of the first data- and context-parallel rank.
    """
    nonfinite: dict[str, TensorDigest] = {}
    for tensors in gathered_rows(chunks):
        if writer:
            for name, tensor in tensors.items():
                nonfinite[name] = TensorDigest("", *count_nonfinite(tensor))
                writer.write(name, tensor)
    return describe_nonfinite(nonfinite)


class _NotFinite(Exception):
    """Ends the writing of weights that are not finite."""
