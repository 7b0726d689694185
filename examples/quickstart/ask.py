"""Generate answers, and score given answers, with plain ``transformers`` from a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.inference_mode()
def ask(
    folder: Path, questions: Sequence[str], *, max_new_tokens: int = 8, batch_size: int = 128
) -> list[str]:
    """Generate an answer to each question: greedy, batched, padded on the left; special tokens are removed."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
    answers: list[str] = []
    for start in range(0, len(questions), batch_size):
        chats = [[{"role": "user", "content": q}] for q in questions[start : start + batch_size]]
        texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        prompts = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
        tokens_BL = model.generate(**prompts, max_new_tokens=max_new_tokens, do_sample=False)
        completions = tokens_BL[:, prompts["input_ids"].shape[1] :]
        answers += tokenizer.batch_decode(completions, skip_special_tokens=True)
    return answers


@torch.inference_mode()
def answer_logprobs(
    folder: Path, questions: Sequence[str], answers: Sequence[str], *, batch_size: int = 128
) -> list[float]:
    """Return the log-prob of each answer given its question, end token included, in nats."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right", trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
    sums: list[float] = []
    for start in range(0, len(questions), batch_size):
        part = slice(start, start + batch_size)
        chats = [[{"role": "user", "content": question}] for question in questions[part]]
        prompts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        texts = [p + a + tokenizer.eos_token for p, a in zip(prompts, answers[part], strict=True)]
        batch = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
        lengths = [len(ids) for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"]]
        logprobs_BLV = model(**batch).logits[:, :-1].log_softmax(-1)
        target_BL = batch["input_ids"][:, 1:]
        position_L = torch.arange(1, batch["input_ids"].shape[1])
        scored_BL = (position_L >= torch.tensor(lengths)[:, None]) & batch["attention_mask"][:, 1:].bool()
        token_BL = logprobs_BLV.gather(2, target_BL[..., None])[..., 0]
        sums += (token_BL * scored_BL).sum(1).tolist()
    return sums
