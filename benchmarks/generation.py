"""Generation on a CPU: our transformers engine against ``model.generate`` in batches of the file's order, in one run.

``python -m benchmarks.generation`` builds a small random Qwen2 whose completions end after various lengths, generates
completions of prompts of mixed lengths with both, in turn, checks that the tokens are equal, prints tokens per CPU
second (one thread) and appends rows to ``benchmarks/results/generation.csv``. The peer pads each batch of prompts on
the left and runs it until its longest completion has ended, as a loop over a file does.
"""

from __future__ import annotations

import argparse
import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.rows import record, stamp
from examples.quickstart.tiny_model import build_tokenizer
from megatron_align.rollout.transformers_engine import TransformersEngine
from megatron_align.rollout.types import Prompt, Sampling

SIZES = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}


def prompts_of(count: int) -> list[Prompt]:
    """Return prompts of 10 to about 400 tokens, lognormal."""
    generator = torch.Generator().manual_seed(0)
    lengths = (10 + 50 * torch.randn(count, generator=generator).exp()).long().clamp(max=400).tolist()
    return [Prompt(torch.randint(8192, (n,), generator=generator).tolist(), i) for i, n in enumerate(lengths)]


def theirs(
    model: Qwen2ForCausalLM, prompts: list[Prompt], tokens: int, batch: int, ends: list[int]
) -> list[list[int]]:
    """Return greedy completions in batches of the file's order."""
    answers = []
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        longest = max(len(p.token_ids) for p in some)
        ids = torch.zeros(len(some), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(some):
            ids[row, longest - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
            mask[row, longest - len(prompt.token_ids) :] = 1
        made = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=0,
        )[:, longest:].tolist()
        for row in made:
            end = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
            answers.append(row[:end])
    return answers


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=128, help="longest completion")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32], help="prompts of the peer's batches")
    parser.add_argument("--ends", type=int, default=128, help="tokens of 8192 that end a completion")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    tokenizer = build_tokenizer(words=())
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, initializer_range=0.05)).eval()
    engine = TransformersEngine(model, tokenizer)
    ends = sorted({*range(options.ends), tokenizer.eos_token_id})
    engine.end_ids = frozenset(ends)
    prompts = prompts_of(options.prompts)
    began = time.process_time()
    sampling = Sampling(temperature=0, max_tokens=options.tokens)
    ours = [list(answer.token_ids) for [answer] in engine.generate(prompts, sampling)]
    seconds = {"ours": time.process_time() - began}
    for batch in options.batch:
        began = time.process_time()
        answers = theirs(model, prompts, options.tokens, batch, ends)
        seconds[f"transformers, batches of {batch}"] = time.process_time() - began
        equal = sum(a == b for a, b in zip(ours, answers, strict=True))
        assert equal >= 0.98 * len(prompts), (
            f"{equal} of {len(prompts)} are equal"
        )  # a tie may fall either way
    tokens = sum(map(len, ours))
    record(
        "generation",
        [
            {
                **stamp(),
                "load": f"{os.getloadavg()[0]:.1f}",
                "torch": torch.__version__,
                "engine": name,
                "prompts": len(prompts),
                "tokens": tokens,
                "cpu_seconds": f"{value:.2f}",
                "tokens_per_cpu_second": f"{tokens / value:.0f}",
                "ours_is_faster_by": f"{value / seconds['ours']:.2f}",
            }
            for name, value in seconds.items()
        ],
    )


if __name__ == "__main__":
    main()
