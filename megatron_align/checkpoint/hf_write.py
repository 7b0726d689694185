"""A sharded model -> a Hugging Face folder that is complete or absent, written in bounded memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megatron_align.checkpoint.files import put_in_place
from megatron_align.checkpoint.hf_read import INDEX, SINGLE
from megatron_align.errors import InputError
from megatron_align.model.families import ModelShape, Row, read_json, segments

# What a Hugging Face folder holds besides its weights, and a model trained from it keeps.
_ASSETS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "chat_template*",
    "additional_chat_templates/*",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


def to_hf(row: Row, shards: Sequence[Tensor], shape: ModelShape) -> dict[str, Tensor]:
    """Join the tensors of all tensor ranks, in order, into new HF tensors; vocabulary padding is dropped."""
    dim = row.split or 0
    like = shards[0]
    parts = [torch.empty(s, dtype=like.dtype, device=like.device) for s in row.hf_shapes(shape)]
    for rank, shard in enumerate(shards if row.split is not None else shards[:1]):
        offset = 0
        for part, start, stop in segments(row, shape, rank, len(shards)):
            if part is not None:
                source = shard.detach().narrow(dim, offset, stop - start)
                parts[part].narrow(dim, start, stop - start).copy_(source)
            offset += stop - start
    return dict(zip(row.hf, parts, strict=True))


class ShardWriter:
    """Writes safetensors shards one by one into ``partial``, beside ``folder``, and renames at the end.

    Put the other files of the model into ``partial`` before :meth:`close`, so that the folder appears whole.
    As a context manager it closes on success, and on an exception leaves no trace. Memory: one shard. Only
    one writer per folder: a ``partial`` left over by a killed process is removed.

    Args:
        folder: must be new or empty, unless ``overwrite``; then it is replaced once the new one is whole
        max_bytes: of one shard; a larger tensor gets a shard of its own
        overwrite: replace what ``folder`` holds

    Raises:
        InputError: ``folder`` is in the way.
    """

    def __init__(self, folder: str | Path, max_bytes: int = 5 * 10**9, overwrite: bool = False) -> None:
        self.folder = Path(folder).resolve()
        self.max_bytes, self.overwrite = max_bytes, overwrite
        self._refuse_occupied()
        self.partial = self.folder.with_name(f".{self.folder.name}.partial")
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = self._total_bytes = 0
        self._shards: list[list[str]] = []
        self._names: set[str] = set()

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a copy of ``tensor``; a full shard is written at once."""
        if name in self._names:
            raise ValueError(f"{name} was already written to {self.folder}")
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.max_bytes:
            self._flush()
        copy = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        self._names.add(name)
        self._pending[name] = copy
        self._pending_bytes += size
        self._total_bytes += size

    def close(self) -> None:
        """Write what is left and the index, make everything durable, and put the folder in its place."""
        self._flush()
        self._name_shards()
        self._refuse_occupied()
        put_in_place(self.partial, self.folder)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            shutil.rmtree(self.partial, ignore_errors=True)

    def _refuse_occupied(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"the exported model needs a folder, found a file at {self.folder}")
        if not self.overwrite and self.folder.exists() and any(self.folder.iterdir()):
            raise InputError(f"the exported model needs a new or empty folder, found files in {self.folder}")

    def _flush(self) -> None:
        if self._pending:
            self._shards.append(sorted(self._pending))
            file = self.partial / f"shard-{len(self._shards)}"
            try:
                save_file(self._pending, file, metadata={"format": "pt"})
            except SafetensorError as error:  # a full disk, say
                raise OSError(f"writing the model failed at {file}: {error}") from error
            file.chmod(self.partial.stat().st_mode & 0o666)  # safetensors hides it from everyone else
            self._pending, self._pending_bytes = {}, 0

    def _name_shards(self) -> None:
        """Give the shards the names that say how many there are, and write the index if there are several."""
        count = len(self._shards)
        weight_map = {}
        for number, names in enumerate(self._shards, start=1):
            file = SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            (self.partial / f"shard-{number}").rename(self.partial / file)
            weight_map.update(dict.fromkeys(names, file))
        if count > 1:
            index = {
                "metadata": {"total_size": self._total_bytes},
                "weight_map": dict(sorted(weight_map.items())),
            }
            (self.partial / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def copy_assets(source: str | Path, target: str | Path) -> None:
    """Copy configuration, tokenizer, chat templates and licence of an HF folder; links are followed.

    Raises:
        InputError: ``source`` has no config.json.
    """
    source, target = Path(source), Path(target)
    if not (source / "config.json").is_file():
        raise InputError(
            f"a Hugging Face folder needs a file config.json, found none at {source / 'config.json'}"
        )
    for path in sorted({path for pattern in _ASSETS for path in source.glob(pattern)}):
        if path.is_file():
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def write_config_dtype(folder: str | Path, dtype: torch.dtype) -> None:
    """Say in config.json what the weights are stored in, under the key (or keys) that it already uses.

    ``dtype`` is transformers 5's key, ``torch_dtype`` that of 4; every version reads the latter, which is
    therefore added where there is neither.
    """
    path = Path(folder) / "config.json"
    config = read_json(path)
    for key in [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]:
        config[key] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
