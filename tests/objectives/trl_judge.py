"""TRL's own loss code and our objectives on one model that needs no trainer: both sides of the parity tests.

The model is a bigram table: the logits of the next token are the row of the last one. TRL's trainers are built without
``__init__`` and given just what their loss code reads. Our objectives get packs, as in training, but in float64.
"""

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from megatron_align.data.batching.collate import pack
from megatron_align.objectives.base import StepSums, completion_sums
from megatron_align.objectives.registry import build_objective
from megatron_align.records import Columns, Sample

VOCAB, PAIRS, PROMPT, LENGTH = 11, 5, 3, 11
CPU = torch.device("cpu")


class Bigram(nn.Module):
    """Speaks both of TRL's dialects: logits, and per-token log-probs of ``labels`` (``fused_lm_head``)."""

    is_gradient_checkpointing = False

    def __init__(self, seed: int, dtype=torch.float64, scale: float = 1.0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        table = torch.randn(VOCAB, VOCAB, dtype=torch.float64, generator=generator) * scale
        self.table_VV = nn.Parameter(table.to(dtype))

    def forward(self, input_ids, labels=None, fused_lm_head=False, **unused):
        logits = self.table_VV[input_ids]
        if not fused_lm_head:
            return SimpleNamespace(logits=logits)
        logprobs = logits[:, :-1].log_softmax(-1)
        trained = labels[:, 1:] != -100
        token_logprobs = logprobs.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
        return SimpleNamespace(
            log_probs=torch.where(trained, token_logprobs, 0.0),
            log_sum_sq_probs=(2 * logprobs.detach()).logsumexp(-1),
            entropy=-(logprobs.detach().exp() * logprobs.detach()).sum(-1),
            mean_logits=torch.zeros_like(token_logprobs),
            is_top1=trained,
        )


def sequences(n: int, seed: int) -> dict[str, torch.Tensor]:
    """Draw n padded sequences: a prompt, then a completion of 2 tokens or more."""
    generator = torch.Generator().manual_seed(seed)
    ends = torch.randint(PROMPT + 2, LENGTH + 1, (n, 1), generator=generator)
    position = torch.arange(LENGTH).expand(n, LENGTH)
    inside = position < ends
    return {
        "input_ids": torch.randint(VOCAB, (n, LENGTH), generator=generator) * inside,
        "attention_mask": inside.long(),
        "completion_mask": (inside & (position >= PROMPT)).long(),
    }


def same_prompts(*seeds: int) -> list[dict[str, torch.Tensor]]:
    """Draw the completions of PAIRS samples, one batch for each seed, all with the prompts of the first."""
    sides = [sequences(PAIRS, seed) for seed in seeds]
    for side in sides[1:]:
        side["input_ids"][:, :PROMPT] = sides[0]["input_ids"][:, :PROMPT]
    return sides


def cat(*sides: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: torch.cat([side[key] for side in sides]) for key in sides[0]}


def our_loss(options, sides, policy, reference=None, mismatched=None, labels=None) -> torch.Tensor:
    """Return the step's loss by the objective of ``options``, all samples in one pack.

    Args:
        options: of the objective.
        sides: chosen, rejected (and gold) completions; or the single ones.
        policy: carries the gradient.
        reference: for objectives that compare.
        mismatched: other completions of the prompts, for KTO's baseline.
        labels: of single completions.
    """
    objective = build_objective(options)
    scored = _Scored(objective, sides, labels)
    logprobs_NV, logprobs_N = scored.logprobs(policy)
    rows = scored.rows
    if reference is not None:
        rows = scored.with_columns(rows, reference_logprobs=scored.sums(reference))
    seen = {}
    if "batch_statistics" in objective.needs:
        seen["batch_statistics"] = scored.step_sums(policy, reference)
    if "mismatched_logprobs" in objective.needs:
        seen["mismatched_logprobs"] = _Scored(objective, [mismatched], labels).step_sums(policy, reference)
    if seen:
        statistics = objective.observe_batch(seen, training=True)
        rows = scored.with_columns(replace(rows, step_statistics=statistics.values), **statistics.columns)
    squares = (
        {"log_sum_square": logprobs_NV.detach().mul(2).logsumexp(-1)} if objective.row_statistics else {}
    )
    return objective.loss(logprobs_N, rows, squares)[0]


class _Scored:
    """A pack of samples with float64 columns, as a step has them."""

    def __init__(self, objective, sides, labels):
        self.objective = objective
        samples = [self._sample(sides, i, labels) for i in range(len(sides[0]["input_ids"]))]
        tokens = sum(len(sample.tokens_L) for sample in samples)
        self.batch = pack(samples, [1.0] * len(samples), tokens, score_prompt=objective.score_prompt)
        nth_C = torch.arange(len(samples) * len(sides)) % len(sides)
        rows_C = self.batch.rows.completions.rows_C.double()
        tokens_K = torch.zeros(len(sides), dtype=torch.float64).index_add_(0, nth_C, rows_C)
        weight_C = torch.full((len(nth_C),), 1 / len(samples), dtype=torch.float64)
        weights = {"weight_C": weight_C, "token_weight_C": 1 / tokens_K[nth_C]}
        self.rows = replace(self.batch.rows, completions=replace(self.batch.rows.completions, **weights))

    @staticmethod
    def _sample(sides, i, labels) -> Sample:
        ids = [side["input_ids"][i][side["attention_mask"][i].bool()].numpy() for side in sides]
        tokens = np.concatenate([ids[0][:PROMPT], *(of_side[PROMPT:] for of_side in ids)])
        return Sample(
            tokens.astype(np.int32),
            np.arange(len(tokens)) >= PROMPT,
            prompt_length=PROMPT,
            completion_lengths=tuple(len(of_side) - PROMPT for of_side in ids),
            label=None if labels is None else bool(labels[i]),
        )

    @staticmethod
    def with_columns(rows, **columns):
        columns = Columns({**rows.completions.columns, **columns})
        return replace(rows, completions=replace(rows.completions, columns=columns))

    def logprobs(self, model: Bigram) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs_NV = model.table_VV[self.batch.tokens_T[self.rows.row_N]].log_softmax(-1)
        return logprobs_NV, logprobs_NV.gather(-1, self.rows.target_N[:, None])[:, 0]

    def sums(self, model: Bigram) -> torch.Tensor:
        """Score as the pre-pass does."""
        with torch.no_grad():
            weighted = self.objective.weighted(self.logprobs(model)[1], self.rows)
            return completion_sums(weighted, self.rows)

    def step_sums(self, policy: Bigram, reference: Bigram) -> StepSums:
        return StepSums(self.sums(policy), self.sums(reference), self.rows.completions.length_C.double())


def bare(trainer: type, **attributes):
    """Make a trainer of TRL's without ``__init__``, holding only these attributes and what every loss code reads."""
    made = trainer.__new__(trainer)
    same = lambda x: x  # noqa: E731
    made.__dict__.update(
        accelerator=SimpleNamespace(device=CPU, gather=same, gather_for_metrics=same),
        aux_loss_enabled=False,
        is_encoder_decoder=False,
        precompute_ref_logps=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        use_liger_kernel=False,  # read by TRL 1.14, for Python 3.10
        model_kwarg_keys=(),
    )
    made.__dict__.update(attributes)
    return made
