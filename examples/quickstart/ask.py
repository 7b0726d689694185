"""Ask a Hugging Face folder questions with plain ``transformers``: greedy, batched, padded on the left."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.inference_mode()
def ask(
    folder: Path, questions: Sequence[str], *, max_new_tokens: int = 8, batch_size: int = 128
) -> list[str]:
    """Return the model's answer to each question, without special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers: list[str] = []
    for start in range(0, len(questions), batch_size):
        chats = [[{"role": "user", "content": q}] for q in questions[start : start + batch_size]]
        texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        prompts = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
        tokens_BL = model.generate(**prompts, max_new_tokens=max_new_tokens, do_sample=False)
        completions = tokens_BL[:, prompts["input_ids"].shape[1] :]
        answers += tokenizer.batch_decode(completions, skip_special_tokens=True)
    return answers
