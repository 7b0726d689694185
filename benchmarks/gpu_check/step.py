"""What the steps' processes share: arguments, the device, models of published shapes with drawn weights, data."""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu_check.results import Results
from examples.quickstart.tiny_model import build_tokenizer

# hidden, ffn, layers, heads, KV heads, vocabulary, tied: as published, the 7B model with six of its 28 layers.
QWEN2 = {
    "0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "7B cut": (3584, 18944, 6, 28, 4, 152064, False),
    "tiny": (64, 128, 2, 4, 2, 300, True),
}


@dataclass(frozen=True, kw_only=True)
class Context:
    """Arguments of a step's process.

    Args:
        results: of the check.
        scratch: temporary folder that the steps share.
        tiny: sizes for a CPU.
        what: the part of the module that is run; empty: it has one.
    """

    results: Results
    scratch: Path
    tiny: bool
    what: str = ""


def context(*parts: str) -> Context:
    """Read the arguments of a step's process; ``parts``: of its module, if it has several."""
    parser = argparse.ArgumentParser()
    if parts:
        parser.add_argument("what", choices=parts)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    return Context(
        results=Results(options.out),
        scratch=options.scratch,
        tiny=options.tiny,
        what=getattr(options, "what", ""),
    )


def model_folder(scratch: Path, size: str) -> Path:
    """Return a Hugging Face folder of this size with drawn bf16 weights, made at the first call."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = scratch / f"model_{size.replace(' ', '_')}"
    if (folder / "model.safetensors.index.json").exists() or (folder / "model.safetensors").exists():
        return folder
    hidden, ffn, layers, heads, groups, vocab, tied = QWEN2[size]
    tokenizer = build_tokenizer()
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=32768,
        tie_word_embeddings=tied,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_long(file: Path, samples: int, characters: int, pairs: bool) -> Path:
    """Write chats or preference pairs of drawn letters, each of about ``characters`` tokens; return the file.

    A third of a chat is its prompt, half of a pair, whose completions are a quarter each.
    """
    draw = random.Random(0)

    def text(share: float) -> str:
        return "".join(draw.choices("abcdefghij ", k=max(1, int(characters * share))))

    def turn(role: str, share: float) -> list[dict[str, str]]:
        return [{"role": role, "content": text(share)}]

    with open(file, "w", encoding="utf-8") as stream:
        for _ in range(samples):
            if pairs:
                record = {
                    "prompt": turn("user", 0.5),
                    "chosen": turn("assistant", 0.25),
                    "rejected": turn("assistant", 0.25),
                }
            else:
                record = {"messages": turn("user", 1 / 3) + turn("assistant", 2 / 3)}
            stream.write(json.dumps(record) + "\n")
    return file
