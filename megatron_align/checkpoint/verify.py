"""Proof that a checkpoint and a Hugging Face folder hold the same model: shape, bytes, logits.

Shapes: T tokens of a pack, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_align.checkpoint.convert import (
    Checkpoint,
    load_model,
    one_process,
    open_checkpoint,
    read_whole,
)
from megatron_align.checkpoint.hf import HFWeights, open_hf, to_hf, untied_head
from megatron_align.checkpoint.hf_read import HEAD, largest_difference, same_bytes
from megatron_align.checkpoint.sharded import shape_differences
from megatron_align.data.sources import read_file
from megatron_align.data.templates import TOKENIZER_FILES, Template, load_tokenizer
from megatron_align.errors import InputError
from megatron_align.kernels import PackedLayout
from megatron_align.model import cpu
from megatron_align.model.families import ModelShape, rows
from megatron_align.model.policy import Policy
from megatron_align.records import LossRows, PackedBatch

RECORDS = 16  # of --data
TEXT_TOKENS = 512  # of each text, from its start
PACK_TOKENS = 1024
RANDOM_LENGTHS = (1, 7, 130, 38, 512)
# Scripts, digits, code and symbols: what a tokenizer cuts in different ways.
SENTENCES = (
    "The quick brown fox jumps over the lazy dog, and it does so 1,234 times a day.",
    "Der Wind blies über die Dächer der alten Stadt, während drüben die Glocken läuteten.",
    "El niño preguntó por qué el cielo es azul; nadie supo contestarle enseguida.",
    "Ils ont déjà goûté le café de l'hôtel, mais ils préfèrent celui d'en face.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "今天天气很好，我们一起去公园散步，然后在湖边喝茶。",
    "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。",
    "다람쥐 헌 쳇바퀴에 타고파. 오늘은 비가 와서 집에서 책을 읽었다.",
    "كان الطقس جميلا هذا الصباح فخرجنا نمشي على شاطئ البحر.",
    "आज सुबह मौसम अच्छा था, इसलिए हम नदी के किनारे टहलने गए।",
    "def area(r: float) -> float:\n    return 3.14159 * r ** 2  # πr²\n",
    "E = mc², ∑ 1/n² = π²/6 ≈ 1.6449; 🙂👍🏽 — done\t(100 %)\n\n",
)


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """A tensor that is not the same on both sides, or that holds numbers that are not finite."""

    name: str
    max_abs_difference: float
    reason: str


@dataclass(frozen=True, slots=True)
class LogitsFinding:
    """Logits of one kind of text; ``where`` is the text and the token of the largest difference."""

    kind: str
    texts: int
    tokens: int
    max_abs_difference: float
    where: tuple[int, int]
    tolerance: float

    @property
    def equal(self) -> bool:
        """Whether they agree; NaN never does."""
        return self.max_abs_difference <= self.tolerance


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What was compared and what differs. ``tensors`` None: the two have different tensors, see ``shape``."""

    hf: str
    checkpoint: str
    shape: dict[str, tuple[Any, Any]]  # key: (checkpoint's, HF folder's)
    tensors: int | None
    tensor_differences: list[TensorDifference]
    logits: list[LogitsFinding]
    notes: list[str]

    @property
    def failed(self) -> list[str]:
        """The checks that found a difference."""
        found = {
            "shape": self.shape,
            "tensors": self.tensor_differences,
            "logits": self.tensors is None or not all(finding.equal for finding in self.logits),
        }
        return [check for check, differs in found.items() if differs]

    @property
    def equal(self) -> bool:
        """Whether both hold the same model."""
        return not self.failed

    def lines(self) -> list[str]:
        """Return the findings for people."""
        shape = [
            f"{key} is {ours!r} in the checkpoint, {theirs!r} in the HF folder"
            for key, (ours, theirs) in self.shape.items()
        ]
        lines = [f"shape    DIFFERS: {line}" for line in shape] or ["shape    equal"]
        if self.tensors is None:
            lines.append("tensors  not compared, nor logits: the two have different tensors")
        elif self.tensor_differences:
            lines.append(f"tensors  {len(self.tensor_differences)} of {self.tensors} DIFFER")
            lines += [
                f"         {tensor.name}: {tensor.reason}, max abs difference {tensor.max_abs_difference:.3g}"
                for tensor in self.tensor_differences
            ]
        else:
            lines.append(f"tensors  {self.tensors} equal, byte for byte")
        for finding in self.logits:
            sign = "<=" if finding.equal else "DIFFERS: not <="
            place = "" if finding.equal else f", at token {finding.where[1]} of text {finding.where[0]}"
            lines.append(
                f"logits   {finding.kind}: {finding.texts} texts, {finding.tokens} tokens, "
                f"max abs difference {finding.max_abs_difference:.3g} {sign} {finding.tolerance:g}{place}"
            )
        lines += [f"note     {note}" for note in self.notes]
        verdict = f"FAILED ({', '.join(self.failed)})" if self.failed else "the same model"
        return [*lines, f"{verdict}: {self.checkpoint} and {self.hf}"]

    def to_json(self) -> dict[str, Any]:
        """Return the findings for programs; a difference that is not finite is null."""
        return {
            "equal": self.equal,
            "failed": self.failed,
            "hf": self.hf,
            "checkpoint": self.checkpoint,
            "shape": {key: {"checkpoint": ours, "hf": theirs} for key, (ours, theirs) in self.shape.items()},
            "tensors": {
                "compared": self.tensors or 0,
                "differ": [_finite(asdict(tensor)) for tensor in self.tensor_differences],
            },
            "logits": [_finite({**asdict(finding), "equal": finding.equal}) for finding in self.logits],
            "notes": self.notes,
        }


def verify(
    hf: str | Path, checkpoint: str | Path, data: str | None = None, tolerance: float = 1e-4
) -> Findings:
    """Compare a checkpoint with a Hugging Face folder.

    Args:
        hf: Hugging Face folder.
        checkpoint: a checkpoint, or a run's folder, of which the newest is taken.
        data: JSON Lines file of chat samples to compare logits on; None: :data:`SENTENCES`.
        tolerance: largest absolute difference of a logit.

    Raises:
        InputError: either is missing or damaged, or the data does not fit the model.
    """
    weights, hf_shape = open_hf(hf)
    found = open_checkpoint(checkpoint)
    texts, notes = _texts(hf, data, hf_shape)
    comparable = _tensor_sizes(hf_shape) == _tensor_sizes(found.shape)
    differences: list[TensorDifference] = []
    logits: list[LogitsFinding] = []
    if comparable:
        with one_process() as groups:
            differences = list(_compare_tensors(found, weights, groups))
            logits = list(_compare_logits(found, hf, texts, tolerance, groups))
    return Findings(
        hf=str(hf),
        checkpoint=str(found.folder),
        shape=shape_differences(asdict(found.shape), asdict(hf_shape)),
        tensors=len(_tensor_sizes(hf_shape)) if comparable else None,
        tensor_differences=differences,
        logits=logits,
        notes=notes,
    )


def _finite(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in entry.items()}


def _tensor_sizes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    return {
        name: size for row in rows(shape) for name, size in zip(row.hf, row.hf_shapes(shape), strict=True)
    }


def _compare_tensors(
    checkpoint: Checkpoint, weights: HFWeights, groups: ProcessGroupCollection
) -> Iterator[TensorDifference]:
    """Yield every tensor of the checkpoint, turned back to Hugging Face's, that is not the folder's."""
    parameters = load_model(checkpoint, checkpoint.dtype, groups)[0].global_parameters()
    for row in rows(checkpoint.shape):
        for name, ours in to_hf(row, [parameters[row.megatron].cpu()], checkpoint.shape).items():
            theirs = read_whole(weights, name)
            reason = ""
            if ours.dtype != theirs.dtype:
                dtypes = (str(tensor.dtype).removeprefix("torch.") for tensor in (ours, theirs))
                reason = "{} in the checkpoint, {} in the HF folder".format(*dtypes)
            elif not same_bytes(ours, theirs):
                reason = "differs"
            elif not ours.isfinite().all():
                reason = "holds numbers that are not finite"
            if reason:
                yield TensorDifference(name, largest_difference(ours, theirs), reason)
    if (apart := untied_head(weights, checkpoint.shape)) is not None:
        yield TensorDifference(HEAD, apart, "differs from the embedding that it should be tied to")


@torch.no_grad()
def _compare_logits(
    checkpoint: Checkpoint,
    hf: str | Path,
    texts: dict[str, list[Tensor]],
    tolerance: float,
    groups: ProcessGroupCollection,
) -> Iterator[LogitsFinding]:
    policy = load_model(checkpoint, torch.float32, groups)[0].eval()
    judge = AutoModelForCausalLM.from_pretrained(
        hf, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    judge = judge.to(cpu.device()).eval()
    for kind, batch in texts.items():
        apart = [
            (judge(text[None].to(cpu.device())).logits[0] - ours).abs().amax(-1)
            for text, ours in zip(batch, _packed_logits(policy, batch), strict=True)
        ]
        worst = torch.stack([text_T.max() for text_T in apart])  # NaN wins, as it must
        text = int(worst.argmax())
        yield LogitsFinding(
            kind=kind,
            texts=len(batch),
            tokens=sum(map(len, batch)),
            max_abs_difference=worst.max().item(),
            where=(text + 1, int(apart[text].argmax()) + 1),
            tolerance=tolerance,
        )


def _packed_logits(policy: Policy, texts: list[Tensor]) -> Iterator[Tensor]:
    """Yield our logits ``[tokens, V]`` of each text, computed several texts to a pack."""
    waiting = list(texts)
    while waiting:
        pack = [waiting.pop(0)]
        while waiting and sum(map(len, pack)) + len(waiting[0]) <= PACK_TOKENS:
            pack.append(waiting.pop(0))
        yield from policy.logits(_packed(pack).to(cpu.device())).split([len(text) for text in pack])


def _packed(texts: list[Tensor]) -> PackedBatch:
    lengths = [len(text) for text in texts]
    none = torch.empty(0, dtype=torch.int64)
    return PackedBatch(
        tokens_T=torch.cat(texts),
        positions_T=torch.cat([torch.arange(length) for length in lengths]),
        layout=PackedLayout.from_lengths(lengths),
        rows=LossRows(none, none, none, none.float()),
    )


def _texts(hf: str | Path, data: str | None, shape: ModelShape) -> tuple[dict[str, list[Tensor]], list[str]]:
    """Return the texts to compare by kind, as tokens, and what is to be said about them."""
    longest = min(TEXT_TOKENS, shape.max_positions)
    draw = torch.Generator().manual_seed(0)
    texts = {
        "random tokens": [
            torch.randint(shape.vocab_size, (min(length, longest),), generator=draw)
            for length in RANDOM_LENGTHS
        ]
    }
    if data is None and not any(next(Path(hf).glob(name), None) for name in TOKENIZER_FILES):
        return texts, [f"no tokenizer in {hf}: logits were compared on random tokens only"]
    tokenizer = load_tokenizer(str(hf))
    if data is None:
        kind, tokens = "built-in sentences", [tokenizer(text)["input_ids"] for text in SENTENCES]
    else:
        template = Template(tokenizer)
        kind = data
        tokens = [template.sample(record).tokens_L for record in islice(read_file(data)[1], RECORDS)]
    texts[kind] = [torch.as_tensor(ids, dtype=torch.int64)[:longest] for ids in tokens if len(ids)]
    highest = max((int(text.max()) for text in texts[kind]), default=0)
    if highest >= shape.vocab_size:
        raise InputError(
            f"the tokenizer must fit the model's vocabulary of {shape.vocab_size}, it gives token {highest} in {hf}"
        )
    return texts, []
