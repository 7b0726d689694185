"""TRL's own loss code on a model so small that it needs no trainer: the judge of the parity tests.

The model is a bigram table: the logits of the next token are the row of the last one. TRL's trainers are made without
``__init__`` and given just what their loss code reads.
"""

from collections import defaultdict
from types import SimpleNamespace

import torch
from torch import nn

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
            entropy=torch.zeros_like(token_logprobs),
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


def scored(
    model: Bigram, batch: dict[str, torch.Tensor], prompt: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return per-token log-probs ``[n, LENGTH - 1]``, zero where not scored, and the mask of what is."""
    mask = batch["attention_mask" if prompt else "completion_mask"][:, 1:]
    logprobs = model.table_VV[batch["input_ids"][:, :-1]].log_softmax(-1)
    return logprobs.gather(-1, batch["input_ids"][:, 1:, None])[..., 0] * mask, mask


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
    )
    made.__dict__.update(attributes)
    return made
