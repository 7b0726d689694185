"""What one comparison trains: objective, model, data and step."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# The head (hidden_size x vocab_size) is 18% of the operations of the first and 80% of the second.
MODELS = {
    "honest": {"vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8},
    "narrow": {"vocab_size": 151936, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4},
}
CAPACITY = 2048  # tokens of our packs, and the longest sample of both
LR = 1e-6  # of an untrained model: at 1e-4 its loss grows tenfold in a step, and rounding errors with it


@dataclass(frozen=True)
class Task:
    """One comparison.

    Args:
        objective: dpo, sft, kto, reward or grpo.
        model: a name of ``MODELS``.
        batch: samples of a step: pairs, conversations, labelled completions; of grpo prompts.
        steps: optimizer steps. The first warms up and the last is counted: neither is timed.
        micro_batch: samples of TRL's micro-batch.
        completions: completions of a prompt, of grpo.
        answer: bytes of an answer of drawn data, about; a byte is a token.
        prompt: how many times as long a drawn prompt is.
        rank: rank of a LoRA adapter that is trained instead of all weights; 0: none.
        data: a file of real records; None: drawn ones.
        longest: bytes of a real prompt with its answer.
        seed: of drawn data and of the choice among real ones.
    """

    objective: str
    model: str = "honest"
    batch: int = 8
    micro_batch: int = 8
    steps: int = 4
    completions: int = 3
    answer: int = 128
    prompt: float = 4.0
    rank: int = 0
    data: str | None = None
    longest: int = 1200
    seed: int = 0
    folder: str = field(default="")

    @property
    def records(self) -> Path:
        """The records that both train on, JSON Lines."""
        return Path(self.folder) / "records.jsonl"

    @property
    def model_folder(self) -> Path:
        """The model that both start from."""
        return Path(self.folder) / "model"

    @property
    def adapter_folder(self) -> Path | None:
        """The adapter that both start from, if one is trained."""
        return Path(self.folder) / "adapter" if self.rank else None

    def read_records(self) -> list[dict[str, Any]]:
        """Return the records in the order of training."""
        return [json.loads(line) for line in self.records.read_text(encoding="utf-8").splitlines()]

    def write(self, file: Path) -> None:
        """Write the task for a contestant's process."""
        file.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, file: Path) -> Task:
        """Read what ``write`` wrote."""
        return cls(**json.loads(file.read_text(encoding="utf-8")))
