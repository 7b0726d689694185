"""Gradients of PEFT's own model, for the adapters of the tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(folder: Path) -> torch.nn.Module:
    """Return transformers' model of a folder in fp32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def first_chats(file: Path, out: Path, count: int = 3) -> Path:
    """Write the first chats of one turn to another file; return it."""
    chats = [line for line in file.read_text().splitlines() if len(json.loads(line)["messages"]) == 2]
    out.write_text("".join(f"{line}\n" for line in chats[:count]))
    return out


def sft_gradients(model: Path, adapter: Path, file: Path) -> dict[str, torch.Tensor]:
    """Return the gradients of an adapter's tensors of the mean loss per token of all chats of a file."""
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(load(model), adapter, is_trainable=True)
    tokenizer, total, scored = AutoTokenizer.from_pretrained(model), torch.zeros(()), 0
    for line in file.read_text().splitlines():
        messages = json.loads(line)["messages"]
        ids = tokenizer.apply_chat_template(messages, return_dict=False)
        start = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
        logprobs = adapted(torch.tensor([ids])).logits[0].log_softmax(-1)
        total = total - sum(logprobs[t - 1, ids[t]] for t in range(len(start), len(ids)))
        scored += len(ids) - len(start)
    (total / scored).backward()
    parts = {"modules_to_save.default.": "", ".default": "", "magnitude_vector.weight": "magnitude_vector"}
    found = {}
    for name, parameter in adapted.named_parameters():
        if parameter.grad is not None:
            for part, stored in parts.items():
                name = name.replace(part, stored)
            found[name] = parameter.grad
    return found
