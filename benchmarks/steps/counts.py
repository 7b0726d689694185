"""How many matrix-product operations a step needs, by arithmetic, and which part of a ratio comes from what.

The operations of a token's layers and of a scored row's head are those of their weights; attention's own products are
left out on both sides (torch's counter has none on a CPU). A training pass costs three times a forward pass, or with
an adapter, whose base needs no weight gradients, two times; a live reference costs one more.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.steps.task import MODELS, Task

REFERENCE = ("dpo", "kto")  # objectives with a frozen reference


@dataclass(frozen=True)
class Tokens:
    """Tokens of one step.

    Args:
        padded: sequences filled to the longest, as a padding trainer computes them.
        plain: without padding.
        shared: each prompt once for all its completions.
        scored: rows whose log-probs or scores are read.
    """

    padded: int
    plain: int
    shared: int
    scored: int


def tokens_of(task: Task, records: list[dict]) -> Tokens:
    """Count the tokens of a step's records; a byte is a token, and an end token follows each answer."""
    groups = [(len(r["prompt"].encode()), [len(a.encode()) + 1 for a in answers_of(r)]) for r in records]
    sequences = [prompt + answer for prompt, answers in groups for answer in answers]
    answered = sum(sum(answers) for _, answers in groups)
    longest = max(sequences)
    padded = longest * len(sequences)
    if task.objective == "grpo":  # prompts and completions are padded separately
        padded = (max(p for p, _ in groups) + max(max(a) for _, a in groups)) * len(sequences)
    scored = len(sequences) if task.objective == "reward" else answered
    return Tokens(padded, sum(sequences), sum(p for p, _ in groups) + answered, scored)


def answers_of(record: dict) -> list[str]:
    """Return all answers of a record."""
    if "completions" in record:
        return [completion["content"] for completion in record["completions"]]
    return [record[name] for name in ("chosen", "rejected", "completion") if name in record]


def parts(task: Task, records: list[dict]) -> dict[str, float]:
    """Return the factors of the ratio of TRL's operations to ours on one step, and their product ``by_arithmetic``.

    ``reference``: it is run live; ``padding``: padded tokens; ``sharing``: prompts are computed for each completion;
    ``head``: the head also computes rows that nothing reads, as TRL's does without Triton.
    """
    count = tokens_of(task, records)
    sizes = MODELS[task.model]
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    body = sizes["num_hidden_layers"] * (3 * hidden**2 + 3 * hidden * inner)  # 4 heads, 2 of keys and values
    head = hidden if task.objective == "reward" else hidden * sizes["vocab_size"]
    passes = 2.0 if task.rank else 3.0

    def step(tokens: int, scored: int, forward: float) -> float:
        return (passes + forward) * (tokens * body + scored * head)

    live = 1.0 if task.objective in REFERENCE else 0.0
    chain = {
        "head": step(count.padded, count.padded, live),
        "reference": step(count.padded, count.scored, live),
        "padding": step(count.padded, count.scored, 0.0),
        "sharing": step(count.plain, count.scored, 0.0),
        "ours": step(count.shared, count.scored, 0.0),
    }
    names = list(chain)
    factors = {name: chain[name] / chain[names[i + 1]] for i, name in enumerate(names[:-1])}
    return {**factors, "by_arithmetic": factors["reference"] * factors["padding"] * factors["sharing"]}
