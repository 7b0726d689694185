"""Verify that a checkpoint's adapter equals that of a PEFT folder, or merged into its base a Hugging Face folder.

A PEFT folder must have the same options and the same tensors, byte for byte. Merged weights may differ by the
rounding of their sums, as the order of products of fp32 is nobody's to choose.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_align.checkpoint.card import shape_differences
from megatron_align.convert.export_adapter import find_base
from megatron_align.convert.hf_model import load_hf_model, read_hf_config
from megatron_align.convert.merged_state import MergedState, open_base
from megatron_align.convert.open_adapter import StoredAdapter, open_adapter, open_adapter_checkpoint
from megatron_align.convert.open_checkpoint import Checkpoint, model_dtype
from megatron_align.convert.our_model import empty_model, fill_model, one_process
from megatron_align.convert.verify import Findings, compare_by_kind, tensor_sizes, untied_head_finding
from megatron_align.convert.verify_logits import ComparedModels, LogitsFinding, compare_models
from megatron_align.convert.verify_tensors import TensorFinding, compare_tensors
from megatron_align.convert.verify_texts import choose_texts
from megatron_align.errors import InputError, require
from megatron_align.hf.adapter import CONFIG, adapter_table
from megatron_align.hf.baichuan import llama_tensors
from megatron_align.hf.hub import model_folder
from megatron_align.hf.load import largest_difference, open_hf, same_bytes
from megatron_align.hf.safetensors import HFWeights
from megatron_align.merge.adapted_weights import is_adapted, merged_rows
from megatron_align.model import cpu
from megatron_align.model.families import rows
from megatron_align.model.families.adapter import PEFT, module_name


def verify_adapter(
    hf: str | Path,
    checkpoint: Path,
    base: str | Path | None = None,
    data: str | None = None,
    tolerance: float = 1e-4,
    deep: bool = False,
) -> Findings:
    """Compare a checkpoint that holds an adapter with a PEFT folder, or with a merged Hugging Face folder.

    Args:
        hf: PEFT folder, or Hugging Face folder of the merged model.
        checkpoint: that holds an adapter.
        base: that it was trained on; None: the one that the checkpoint names.
        data: JSON Lines file of chat samples to compare logits on; None: built-in sentences.
        tolerance: largest absolute difference of a logit.
        deep: compare the merged model layer by layer. Always done for reward models.

    Raises:
        InputError: either is missing or corrupt, the base is another one, or it is missing where it is needed; or
            ``deep`` is set for a PEFT folder.
    """
    is_peft = (Path(hf) / CONFIG).is_file()
    require(
        not (deep and is_peft),
        f"--deep compares a merged model layer by layer, {hf} is a PEFT folder: leave --deep out",
    )
    stored = open_adapter_checkpoint(checkpoint)
    found, missing = find_base(stored, base)
    if is_peft:
        return _verify_peft(Path(hf), stored, (found, missing), data, tolerance)
    if found is None:
        raise InputError(
            f"a merged model can only be verified with the base of the adapter, {missing}: give it as --base"
        )
    return _verify_merged(model_folder(hf), stored, found, data, (tolerance, deep))


def _verify_peft(
    hf: Path,
    stored: StoredAdapter,
    base: tuple[Path | None, str | None],
    data: str | None,
    tolerance: float,
) -> Findings:
    theirs = open_adapter(hf, stored.shape)
    options = [
        {
            **asdict(replace(one.adapter, dropout=0)),
            "modules": sorted(one.adapter.modules),
            "saved": sorted(one.adapter.saved),
            "base_weights": one.weights,
        }
        for one in (stored, theirs)
    ]
    differing = {key: (ours, options[1][key]) for key, ours in options[0].items() if ours != options[1][key]}
    if theirs.weights is None:
        differing.pop("base_weights", None)  # written by another program
    sizes = [{name: tensor.shape for name, tensor in one.tensors.items()} for one in (stored, theirs)]
    comparable = sizes[0] == sizes[1]
    tensors = (
        [_compare(n, stored.tensors[n], theirs.tensors[n]) for n in stored.tensors] if comparable else []
    )
    found, missing = base
    notes, logits = [], []
    if found is None:
        notes.append(f"logits were not compared: {missing}")
    elif not (found / "config.json").is_file():
        notes.append(
            "logits were not compared: the base is a checkpoint; give its Hugging Face folder as --base"
        )
    elif stored.shape.is_reward:
        notes.append(
            "logits were not compared: those of a reward model are compared for its merged folder hf/"
        )
    elif comparable:
        texts, notes = choose_texts(found, data, stored.shape)
        with one_process() as groups:
            logits = _compare_with_base(stored, theirs, found, (texts, tolerance), groups)
    return Findings(
        hf=str(hf),
        checkpoint=str(stored.folder),
        shape=differing,
        tensors=len(tensors) if comparable else None,
        tensor_findings=tensors,
        logits=logits,
        first_difference=None,
        notes=notes,
    )


def _compare(name: str, ours: Tensor, theirs: Tensor) -> TensorFinding:
    mine, other = (
        hashlib.sha256(memoryview(tensor.reshape(-1).view(torch.uint8).numpy())).hexdigest()
        for tensor in (ours.contiguous(), theirs.contiguous())
    )
    reason = "" if same_bytes(ours, theirs) else "differs"
    if ours.dtype != theirs.dtype:
        reason = f"{ours.dtype} in the checkpoint, {theirs.dtype} in the PEFT folder".replace("torch.", "")
    elif not ours.isfinite().all():
        reason = "not finite"
    return TensorFinding(name, mine, other, largest_difference(ours, theirs), reason)


def _compare_with_base(
    stored: StoredAdapter,
    theirs: StoredAdapter,
    base: Path,
    compared: tuple[dict[str, list[Tensor]], float],
    groups: ProcessGroupCollection,
) -> list[LogitsFinding]:
    """Compare the logits of our model and the checkpoint's adapter with transformers' and the PEFT folder's merged."""
    shape, trained = stored.shape, model_dtype(stored.folder)
    weights, _ = open_hf(base)
    hf_model = load_hf_model(base, weights, shape)
    parameters = dict(hf_model.named_parameters())  # not buffers: rotary frequencies are fp32 in every run
    merged = _cast_and_merged(weights, theirs, trained)
    with torch.no_grad():
        for name, tensor in llama_tensors(merged) if shape.norm_head else merged:
            parameters[name].copy_(tensor)
    chunks = empty_model(shape, torch.float32, groups, stored.adapter)
    reader = open_base(base)[1]
    fill_model(chunks, rows(shape), lambda row: {n: t.to(trained) for n, t in reader.read(row).items()})
    fill_model(
        chunks, adapter_table(shape, stored.adapter), lambda row: {n: stored.tensors[n] for n in row.hf}
    )
    return list(compare_models(chunks[0].eval(), hf_model.to(cpu.device()), *compared))


def _cast_and_merged(
    weights: HFWeights, adapter: StoredAdapter, trained: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a base, cast to the dtype in which it was trained on, with the adapter in fp32."""
    for name in (name for row in rows(adapter.shape) for name in row.hf):
        tensor = weights.tensor(name).to(trained).float()
        if module_name(name) in adapter.adapter.saved:
            tensor = adapter.tensors[f"{PEFT}{name}"].float()
        elif is_adapted(name, adapter.adapter):
            tensor = merged_rows(name, slice(None), tensor, adapter.adapter, adapter.tensors)
        yield name, tensor


def _verify_merged(
    hf: Path, stored: StoredAdapter, base: Path, data: str | None, how: tuple[float, bool]
) -> Findings:
    weights, hf_shape = open_hf(hf)
    read_hf_config(hf, hf_shape)  # refused before everything is read
    dtype = model_dtype(stored.folder)
    state = MergedState(open_base(base)[1], stored, dtype, dtype)
    texts, notes = choose_texts(hf, data, hf_shape)
    comparable = tensor_sizes(hf_shape) == tensor_sizes(stored.shape)
    tensors: list[TensorFinding] = []
    logits: list[LogitsFinding] = []
    module = None
    if comparable:
        opened = Checkpoint(stored.folder, stored.shape, dtype)
        models = ComparedModels(opened, state, hf, weights, hf_shape)
        tensors = [*compare_tensors(state, weights), *untied_head_finding(weights, stored.shape)]
        with one_process() as groups:
            logits, module = compare_by_kind(models, texts, how[0], groups, how[1] or hf_shape.is_reward)
        if rounded := [
            tensor for tensor in tensors if tensor.sha256 != tensor.hf_sha256 and not tensor.reason
        ]:
            worst = max(tensor.max_abs_difference for tensor in rounded)
            notes.append(f"{len(rounded)} merged tensors differ by rounding, {worst:.3g} at most")
    return Findings(
        hf=str(hf),
        checkpoint=f"{stored.folder} with {base}",
        shape=shape_differences(asdict(stored.shape), asdict(hf_shape)),
        tensors=len(tensor_sizes(hf_shape)) if comparable else None,
        tensor_findings=tensors,
        logits=logits,
        first_difference=module,
        notes=notes,
    )
