"""Hugging Face safetensors -> this rank's parameters, reading only the bytes that it holds.

The folder's names, dtypes and shapes are checked against the weight table before anything is read, so every
rank of a job fails on the same line. Headers are read, weights are mapped: nothing is loaded whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_align.errors import InputError
from megatron_align.model.families import (
    ModelShape,
    local_shape,
    read_json,
    rows,
    segments,
)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# safetensors' names of what weights may be stored in
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


class HFWeights:
    """The tensors of one Hugging Face folder: ``model.safetensors``, or shards with an index.

    Raises:
        InputError: there are none, or a file is missing, damaged, or does not hold what the index says.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise InputError(f"a Hugging Face folder is needed, found none at {self.folder}")
        if (self.folder / SINGLE).exists():
            handle = _open(self.folder / SINGLE)
            self._where = dict.fromkeys(handle.keys(), handle)
        elif (self.folder / INDEX).exists():
            self._where = _open_shards(self.folder)
        else:
            raise InputError(_no_weights(self.folder))

    @property
    def names(self) -> list[str]:
        """The tensors' names, sorted."""
        return sorted(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, from the header."""
        return tuple(self._where[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Return a tensor's dtype as safetensors spells it (``"BF16"``), from the header."""
        return self._where[name].get_slice(name).get_dtype()

    def read(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Return ``[start, stop)`` along ``dim``, in the stored dtype, on the CPU."""
        return self._where[name].get_slice(name)[(slice(None),) * dim + (slice(start, stop),)]


def check_weights(weights: HFWeights, shape: ModelShape) -> None:
    """Check that a folder holds the model's tensors and no others, each of a trainable dtype and its shape.

    Two kinds of extra tensor mean nothing and are let through: rotary frequency buffers that old versions
    saved, and ``lm_head.weight`` of tied embeddings.

    Raises:
        InputError: naming every missing and unexpected tensor, or every one of a wrong dtype or shape.
    """
    wanted = {n: s for row in rows(shape) for n, s in zip(row.hf, row.hf_shapes(shape), strict=True)}
    found = set(weights.names)
    spare = {name for name in found if name.endswith("rotary_emb.inv_freq")}
    if shape.tied_embeddings:
        spare.add("lm_head.weight")
    missing, unexpected = sorted(wanted.keys() - found), sorted(found - wanted.keys() - spare)
    if missing or unexpected:
        facts = [
            f"{what} {', '.join(n)}" for what, n in (("missing", missing), ("unexpected", unexpected)) if n
        ]
        raise InputError(
            f"the weights must be those of {shape.architecture}: {'; '.join(facts)} in {weights.folder}"
        )
    wrong = [
        f"{name} must be {list(size)}, found {list(weights.shape(name))}"
        for name, size in wanted.items()
        if weights.shape(name) != size
    ]
    if wrong:
        raise InputError(
            f"the tensors must have config.json's shapes: {'; '.join(wrong)} in {weights.folder}"
        )
    odd = [f"{name} is {weights.dtype(name)}" for name in wanted if weights.dtype(name) not in DTYPES]
    if odd:
        raise InputError(f"the tensors must be one of {list(DTYPES)}: {'; '.join(odd)} in {weights.folder}")


@torch.no_grad()
def load_weights(
    folder: str | Path, shape: ModelShape, local: Mapping[str, Tensor], tensor_rank: int, tensor_ranks: int
) -> None:
    """Fill this rank's parameters in place, each cast to its own dtype.

    ``local`` maps Megatron names with GLOBAL layer numbers to parameters, of any pipeline stage. The last
    stage of a tied model may hold its own ``output_layer.weight``: it is filled from the embedding.

    Raises:
        InputError: the whole folder does not match the model (the same on every rank), or the tensor ranks
            do not divide it.
        ValueError: ``local`` names what the model does not have, or a parameter has another shape.
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
        offset, dim = 0, row.split or 0
        for part, start, stop in segments(row, shape, tensor_rank, tensor_ranks):
            target = parameter.narrow(dim, offset, stop - start)
            if part is None:
                target.zero_()
            else:
                target.copy_(weights.read(row.hf[part], dim, start, stop))
            offset += stop - start


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        with path.open("rb") as file:
            pointer = file.read(20) == b"version https://git-"
        found = "a git-lfs pointer (run: git lfs pull)" if pointer else f"it damaged or cut short ({error})"
        raise InputError(f"a complete safetensors file is needed, found {found} at {path}") from error


def _open_shards(folder: Path) -> dict[str, safe_open]:
    """Return each tensor's open shard, having checked the index against folder and shards."""
    place = folder / INDEX
    weight_map = read_json(place).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"weight_map must map tensors to files, found {weight_map!r} in {place}")
    for file in weight_map.values():
        if not isinstance(file, str) or "/" in file or "\\" in file or not file.endswith(".safetensors"):
            raise InputError(f"weight_map must name safetensors files beside it, found {file!r} in {place}")
    files = sorted(set(weight_map.values()))
    if absent := [file for file in files if not (folder / file).is_file()]:
        raise InputError(f"the index names shards that are not there: {', '.join(absent)} in {folder}")
    handles = {file: _open(folder / file) for file in files}
    held = {file: set(handle.keys()) for file, handle in handles.items()}
    if lost := [f"{name} ({file})" for name, file in weight_map.items() if name not in held[file]]:
        raise InputError(
            f"the index names tensors that their shards do not hold: {', '.join(lost)} in {folder}"
        )
    return {name: handles[file] for name, file in weight_map.items()}


def _no_weights(folder: Path) -> str:
    files = sorted(path.name for path in folder.iterdir())
    pickles = [name for name in files if name.endswith((".bin", ".pt", ".pth"))]
    if pickles:
        return f"the weights must be safetensors: convert {pickles[0]} to safetensors first, in {folder}"
    loose = [name for name in files if name.endswith(".safetensors")]
    if loose:
        return f"the weights must be {SINGLE} or shards with {INDEX}, found only {loose[0]} in {folder}"
    return f"the weights must be {SINGLE} or shards with {INDEX}, found neither in {folder}"
