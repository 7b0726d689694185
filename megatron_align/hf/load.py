"""Load Hugging Face safetensors into this rank's parameters, reading only the bytes that it holds.

The folder's names, dtypes and shapes are checked against the weight table before anything is read, so every rank of
a job fails with the same error.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_align.errors import InputError, listed
from megatron_align.hf.safetensors import DTYPES, HFWeights
from megatron_align.model.families import ModelShape, copy_segments, local_shape, read_shape, rows
from megatron_align.storage.checksums import hash_files

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def open_hf(folder: str | Path) -> tuple[HFWeights, ModelShape]:
    """Return a Hugging Face folder's weights and model shape, having checked that they match.

    Raises:
        InputError: they do not match, or something is missing.
    """
    if not Path(folder).is_dir():
        raise InputError(f"no Hugging Face folder at {folder}")
    shape = read_shape(folder)
    weights = HFWeights(folder)
    check_weights(weights, shape)
    return weights, shape


def check_weights(weights: HFWeights, shape: ModelShape) -> None:
    """Check that a folder holds the model's tensors and no others, with floating-point dtypes and correct shapes.

    Two redundant tensors are accepted: rotary frequency buffers that old versions saved, and ``lm_head.weight`` of
    tied embeddings.

    Raises:
        InputError: naming missing and unexpected tensors, or those of a wrong dtype or shape, ten at most.
    """
    expected = {n: s for row in rows(shape) for n, s in zip(row.hf, row.hf_shapes(shape), strict=True)}
    present = set(weights.names)
    redundant = {name for name in present if name.endswith("rotary_emb.inv_freq")}
    if shape.tied_embeddings:
        redundant.add(HEAD)
    missing, unexpected = sorted(expected.keys() - present), sorted(present - expected.keys() - redundant)
    if missing or unexpected:
        differences = [
            f"{kind} {listed(n)}" for kind, n in (("missing", missing), ("unexpected", unexpected)) if n
        ]
        raise InputError(
            f"weights do not match {shape.architecture}: {'; '.join(differences)} in {weights.folder}"
        )
    wrong = [
        f"{name} must be {list(size)}, found {list(weights.shape(name))}"
        for name, size in expected.items()
        if weights.shape(name) != size
    ]
    if wrong:
        raise InputError(f"tensor shapes do not match config.json: {listed(wrong, '; ')} in {weights.folder}")
    unsupported = [
        f"{name} is {weights.dtype(name)}" for name in expected if weights.dtype(name) not in DTYPES
    ]
    if unsupported:
        raise InputError(
            f"tensor dtypes must be one of {list(DTYPES)}: {listed(unsupported, '; ')} in {weights.folder}"
        )


def untied_head(weights: HFWeights, shape: ModelShape) -> float | None:
    """Return the largest difference between a stored output head and the embeddings it is tied to; None: no difference.

    transformers does not tie the two then, so the folder is not the model that its config.json describes.
    """
    if not shape.tied_embeddings or HEAD not in weights.names:
        return None
    if weights.shape(HEAD) != weights.shape(EMBEDDING):
        return math.inf
    largest, equal = 0.0, weights.dtype(HEAD) == weights.dtype(EMBEDDING)
    for head, embedding in zip(weights.blocks(HEAD), weights.blocks(EMBEDDING), strict=True):
        if not same_bytes(head, embedding):
            equal = False
            largest = torch.tensor([largest, largest_difference(head, embedding)]).max().item()  # NaN wins
    return None if equal else largest


def require_tied_head(weights: HFWeights, shape: ModelShape) -> None:
    """Refuse a folder whose output head differs from the embeddings that its config.json ties it to.

    Raises:
        InputError: with the largest difference.
    """
    if (difference := untied_head(weights, shape)) is not None:
        raise InputError(
            f"{HEAD} must be absent or equal {EMBEDDING} where tie_word_embeddings is true, "
            f"it differs by {difference:.3g} in {weights.folder}"
        )


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal in shape, dtype and every bit (NaN equals itself, 0 is not -0)."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def largest_difference(one: Tensor, other: Tensor) -> float:
    """Return the largest absolute difference of two tensors of equal shape; NaN if either holds a NaN."""
    return (one.double() - other.double()).abs().max().item()


def weights_hash(path: Path) -> str:
    """Return one hash of all weight files of a Hugging Face folder or of a checkpoint."""
    files = sorted(path.glob("*.safetensors")) or sorted(p for p in (path / "state").iterdir() if p.is_file())
    hashes = hash_files(files[0].parent, [file.name for file in files]) if files else {}
    return hashlib.sha256(json.dumps(list(hashes.items())).encode()).hexdigest()


@torch.no_grad()
def load_weights(
    folder: str | Path, shape: ModelShape, local: Mapping[str, Tensor], tensor_rank: int, tensor_ranks: int
) -> None:
    """Fill this rank's parameters in place, casting each to its dtype.

    ``local`` maps Megatron names with GLOBAL layer numbers to parameters, of any pipeline stage. The last
    stage of a tied model may hold its own ``output_layer.weight``: it is filled from the embedding.

    Raises:
        InputError: the folder does not match the model (the same error on every rank), or the tensor ranks do not
            divide a dimension.
        ValueError: ``local`` names a parameter that the model does not have, or one has another shape.
    """
    weights = HFWeights(folder)
    check_weights(weights, shape)
    table = {row.megatron: row for row in rows(shape)}
    table.setdefault("output_layer.weight", table["embedding.word_embeddings.weight"])
    if unknown := sorted(local.keys() - table.keys()):
        raise ValueError(f"not parameters of {shape.architecture}: {', '.join(unknown)}")
    for name, parameter in local.items():
        row = table[name]
        if tuple(parameter.shape) != (size := local_shape(row, shape, tensor_ranks)):
            raise ValueError(
                f"{name} must be {list(size)} on each of {tensor_ranks} ranks, is {list(parameter.shape)}"
            )
        for segment in copy_segments(row, shape, tensor_rank, tensor_ranks):
            target = segment.of_megatron(parameter)
            if segment.name is None:
                target.zero_()
            else:
                target.copy_(weights.read(segment))
