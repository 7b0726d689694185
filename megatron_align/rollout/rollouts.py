"""A set of rollouts: prompts with their completions and rewards, in memory and on disk.

Shapes: G prompts, C completions (one prompt's after the other), N tokens of them (one completion's after the other).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_align.data.sample_table import MemoryTable
from megatron_align.errors import InputError, one_line
from megatron_align.records import Sample
from megatron_align.rollout.types import Completion
from megatron_align.storage.atomic_write import commit_folder, naming_file, partial_folder
from megatron_align.storage.deletion import discard

ROLLOUTS = "rollouts"  # in checkpoint.dir
FILE = "rollouts.parquet"
_KEY, _SAMPLED = b"megatron_align", b"megatron_align_sampled"  # of the file's metadata
# Log-probs under the policy that sampled and under the reference; the critic's values, and the returns.
COLUMNS = ("old_logprobs", "reference_logprobs", "values", "returns")
Rewards = dict[str, list[float | None]]


@dataclass(slots=True, kw_only=True)
class Rollouts:
    """The completions of some prompts with their rewards. Arrays are on the host.

    Args:
        prompt_G: index of each prompt in the training data
        prompt_ids: token ids of each prompt
        texts: of each prompt, as data files have it: text or messages
        completions: of each prompt, in order
        rewards: of each completion by name of the reward; None: it does not score this one
        reward_C: the sum that counts, fp64
        scored_C: bool: a reward scored it
        weight_G: of each prompt in the loss
        advantage_C: mean advantage of each completion's tokens, once it is known
        columns: of the tokens by name, see :data:`COLUMNS`, fp64 ``[N]``, once they are known
        sampled: metrics of dynamic sampling by name; empty: without it
    """

    prompt_G: np.ndarray
    prompt_ids: list[np.ndarray]
    texts: list[str | list[dict[str, Any]]]
    completions: list[list[Completion]]
    rewards: Rewards
    reward_C: Tensor
    scored_C: Tensor
    weight_G: Tensor
    advantage_C: Tensor | None = None
    columns: dict[str, Tensor] = field(default_factory=dict)
    sampled: dict[str, float] = field(default_factory=dict)

    @property
    def flat(self) -> list[Completion]:
        """All completions."""
        return [completion for some in self.completions for completion in some]

    @property
    def size_G(self) -> Tensor:
        """Completions of each prompt, int64."""
        return torch.tensor([len(some) for some in self.completions])

    @property
    def length_C(self) -> Tensor:
        """Tokens of each completion, int64."""
        return torch.tensor([len(completion.token_ids) for completion in self.flat])

    @property
    def truncated_C(self) -> Tensor:
        """Bool: the completion was cut off."""
        return torch.tensor([completion.finish_reason == "length" for completion in self.flat])

    def engine_logprobs(self) -> Tensor:
        """Return the engine's log-prob of each token, ``[N]`` fp64; NaN where it gave none."""
        return torch.tensor([x for completion in self.flat for x in completion.logprobs], dtype=torch.float64)

    def of_groups(self, groups: np.ndarray) -> Rollouts:
        """Return some of the prompts in this order, without what is computed after rewards."""
        ends_G = np.cumsum([len(some) for some in self.completions])
        places = [np.arange(ends_G[g] - len(self.completions[g]), ends_G[g]) for g in groups]
        index_C = np.concatenate([np.empty(0, np.int64), *places])
        return Rollouts(
            prompt_G=self.prompt_G[groups],
            prompt_ids=[self.prompt_ids[g] for g in groups],
            texts=[self.texts[g] for g in groups],
            completions=[self.completions[g] for g in groups],
            rewards={name: [values[i] for i in index_C] for name, values in self.rewards.items()},
            reward_C=self.reward_C[index_C],
            scored_C=self.scored_C[index_C],
            weight_G=self.weight_G[groups],
        )

    def table(self, row_columns: Mapping[str, Tensor]) -> MemoryTable:
        """Return the rollouts as samples: each prompt with its completions, all of whose tokens are trained.

        Args:
            row_columns: ``[N]`` each, by name.
        """
        samples = [
            _sample(ids, some, float(weight))
            for ids, some, weight in zip(
                self.prompt_ids, self.completions, self.weight_G.tolist(), strict=True
            )
        ]
        columns = {name: column.numpy() for name, column in row_columns.items()}
        return MemoryTable(
            samples, completion_columns={"scored": self.scored_C.double().numpy()}, row_columns=columns
        )


def _sample(prompt: np.ndarray, completions: Sequence[Completion], weight: float) -> Sample:
    ids = [np.asarray(completion.token_ids, np.int32) for completion in completions]
    tokens_L = np.concatenate([np.asarray(prompt, np.int32), *ids])
    return Sample(
        tokens_L,
        np.arange(len(tokens_L)) >= len(prompt),
        prompt_length=len(prompt),
        completion_lengths=tuple(len(some) for some in ids),
        weight=weight,
    )


def joined(parts: Sequence[Rollouts]) -> Rollouts:
    """Return the prompts of several sets, one set's after the other, without what is computed after rewards."""
    return Rollouts(
        prompt_G=np.concatenate([part.prompt_G for part in parts]),
        prompt_ids=[ids for part in parts for ids in part.prompt_ids],
        texts=[text for part in parts for text in part.texts],
        completions=[some for part in parts for some in part.completions],
        rewards={
            name: [value for part in parts for value in part.rewards[name]] for name in parts[0].rewards
        },
        reward_C=torch.cat([part.reward_C for part in parts]),
        scored_C=torch.cat([part.scored_C for part in parts]),
        weight_G=torch.cat([part.weight_G for part in parts]),
    )


def rollouts_folder(run: Path, step: int, *, generated: bool = False) -> Path:
    """Return the folder of the rollouts whose first training step is ``step``, 1-based.

    ``generated``: before that step, without log-probs of the trainer and advantages.
    """
    return run / ROLLOUTS / f"{'generated' if generated else 'step'}_{step:06d}"


def write_rollouts(folder: Path, rollouts: Rollouts, key: Mapping[str, Any]) -> None:
    """Write the rollouts as Parquet, one row for each completion: complete or not at all.

    Args:
        folder: of these rollouts, see :func:`rollouts_folder`.
        rollouts: with the columns of their tokens, and advantages.
        key: everything that determined them.

    Raises:
        OSError: the disk refuses it.
    """
    import pyarrow as pa  # imported here: it takes longer than reading a small file
    from pyarrow import parquet

    length_C = rollouts.length_C
    columns: dict[str, Any] = {
        "prompt": _repeat(rollouts, [_as_text(text) for text in rollouts.texts]),
        "completion": [completion.text for completion in rollouts.flat],
        "group": _repeat(rollouts, range(len(rollouts.texts))),
        "prompt_index": _repeat(rollouts, rollouts.prompt_G.tolist()),
        "prompt_token_ids": _repeat(rollouts, [ids.tolist() for ids in rollouts.prompt_ids]),
        "token_ids": [list(completion.token_ids) for completion in rollouts.flat],
        "logprobs": [list(completion.logprobs) for completion in rollouts.flat],
        "finish_reason": [completion.finish_reason for completion in rollouts.flat],
        "weight_version": [completion.weight_version for completion in rollouts.flat],
        "reward": [
            value if scored else None
            for value, scored in zip(rollouts.reward_C.tolist(), rollouts.scored_C.tolist(), strict=True)
        ],
        **{f"reward/{name}": pa.array(values, pa.float64()) for name, values in rollouts.rewards.items()},
    }
    if rollouts.advantage_C is not None:
        columns["advantage"] = rollouts.advantage_C.tolist()
    for name, values_N in rollouts.columns.items():
        parts = [part.tolist() for part in values_N.double().split(length_C.tolist())]
        columns[name] = pa.array(parts, pa.list_(pa.float64()))
    metadata = {_KEY: json.dumps(key, sort_keys=True).encode()}
    if rollouts.sampled:
        metadata[_SAMPLED] = json.dumps(rollouts.sampled).encode()
    table = pa.table(columns).replace_schema_metadata(metadata)
    partial = partial_folder(folder)
    with naming_file("rollouts", folder):
        discard(partial)
        partial.mkdir(parents=True)
        parquet.write_table(table, partial / FILE)
        commit_folder(partial, folder)


def read_rollouts(folder: Path, key: Mapping[str, Any], unread: Collection[str] = ()) -> Rollouts | None:
    """Return the rollouts in a folder; None: there are none, or they were made with another key.

    Args:
        folder: see :func:`rollouts_folder`.
        key: as given to :func:`write_rollouts`.
        unread: entries of the key that may differ.

    Raises:
        InputError: the file is corrupt.
    """
    import pyarrow as pa
    from pyarrow import parquet

    file = folder / FILE
    if not file.is_file():
        return None
    try:
        table = parquet.read_table(file)
        metadata = table.schema.metadata or {}
        found, sampled = (json.loads(metadata.get(name, b"null")) for name in (_KEY, _SAMPLED))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(
            f"rollouts are corrupt: {one_line(error)} in {file}; delete the folder, and they are generated again"
        ) from error
    wanted = json.loads(json.dumps(key))
    if not isinstance(found, dict) or _without(found, unread) != _without(wanted, unread):
        return None
    rollouts = _of_columns({name: table[name].to_pylist() for name in table.column_names})
    rollouts.sampled = sampled or {}
    return rollouts


def _without(key: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in key.items() if name not in names}


def _of_columns(columns: Mapping[str, list[Any]]) -> Rollouts:
    index_C = np.array(columns["prompt_index"])
    places = np.unique(columns["group"], return_index=True)[1]
    completions = [
        Completion(
            token_ids=tuple(ids),
            logprobs=tuple(logprobs),
            text=text,
            finish_reason=reason,
            weight_version=version,
        )
        for ids, logprobs, text, reason, version in zip(
            *(
                columns[name]
                for name in ("token_ids", "logprobs", "completion", "finish_reason", "weight_version")
            ),
            strict=True,
        )
    ]
    ends = [*places[1:].tolist(), len(completions)]
    reward = columns["reward"]
    return Rollouts(
        prompt_G=index_C[places],
        prompt_ids=[np.array(columns["prompt_token_ids"][i], np.int32) for i in places],
        texts=[columns["prompt"][i] for i in places],
        completions=[completions[a:b] for a, b in zip(places.tolist(), ends, strict=True)],
        rewards={
            name.partition("/")[2]: values for name, values in columns.items() if name.startswith("reward/")
        },
        reward_C=torch.tensor([0.0 if value is None else value for value in reward], dtype=torch.float64),
        scored_C=torch.tensor([value is not None for value in reward]),
        weight_G=torch.ones(len(places), dtype=torch.float64),
        advantage_C=torch.tensor(columns["advantage"], dtype=torch.float64)
        if "advantage" in columns
        else None,
        columns={
            name: torch.tensor([x for some in columns[name] for x in some], dtype=torch.float64)
            for name in COLUMNS
            if name in columns
        },
    )


def _repeat(rollouts: Rollouts, of_prompts: Sequence[Any]) -> list[Any]:
    return [value for value, some in zip(of_prompts, rollouts.completions, strict=True) for _ in some]


def _as_text(prompt: str | list[dict[str, Any]]) -> str:
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)
