"""Every number that a run writes is documented, and every documented one is written by the objectives it names."""

import json
from pathlib import Path

import pytest

from megatron_align.monitoring.metric_names import BY_NAME, METRICS, ROW_KEYS, to_markdown
from megatron_align.objectives.registry import OBJECTIVES
from tests.harness import training_ranks
from tests.harness.tiny import make_model, metrics_of, run_arguments, write_labelled, write_pairs

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"
OPTIONS = {
    "dpo": {"objective__rpo_alpha": 1.0},
    "grpo": {"objective__beta": 0.1},
    "distill": {"objective__top_k": 8},
}  # with the likelihood term, which is off by default
# Only on bad steps, where the chip's peak is known, where completions are generated, or with objective.ptx.
CONDITIONAL = {"suspects", "mfu", "rollout_seconds", "sync_seconds", "staleness", "ptx_loss"}
CONDITIONAL |= {"groups_replaced", "generation_batches", "reward_sampled"}  # with rollout.dynamic_sampling
CONDITIONAL |= {"entropy_threshold"}  # with objective.top_entropy_quantile below 1


def test_the_page_is_the_table():
    assert DOCS.read_text(encoding="utf-8") == to_markdown()


def test_every_metric_is_documented_once():
    assert len(BY_NAME) == len(METRICS)
    assert not BY_NAME.keys() & ROW_KEYS.keys()


@pytest.fixture(scope="module")
def written(pool, chat_file, tmp_path_factory):
    """The names in each objective's rows, of one step on two ranks with validation and timing."""
    folder = tmp_path_factory.mktemp("runs")
    model = make_model(folder / "model", num_hidden_layers=1)
    pairs = write_pairs(folder / "pairs.jsonl", samples=8)
    labelled = write_labelled(folder / "labelled.jsonl", samples=8)
    gold = {"reference": lambda draw: [{"role": "assistant", "content": f"It is {draw.randrange(10**6)}."}]}
    triples = write_pairs(folder / "triples.jsonl", samples=8, **gold)
    ranked = folder / "ranked.jsonl"
    ranked.write_text(
        "".join(
            json.dumps(
                {"prompt": f"p{i}", "completions": [{"content": c, "score": len(c)} for c in ("a", "bc")]}
            )
            + "\n"
            for i in range(8)
        )
    )
    data = {
        "sft": chat_file,
        "distill": chat_file,
        "tpo": triples,
        "kto": labelled,
        "bco": labelled,
        "grpo": ranked,
        "rloo": ranked,
        "ppo": ranked,
    }
    names = {}
    for objective in OBJECTIVES:
        source = data.get(objective, pairs)
        arguments = run_arguments(
            model,
            source,
            folder / objective,
            objective__name=objective,
            **({"rollout__engine": "data"} if source == ranked else {"data__validation": source}),
            train__steps=1,
            train__global_batch_size=4,
            logging__timing_every=1,
            **({"reference__path": model, "reference__mode": "cached"} if objective == "distill" else {}),
            **OPTIONS.get(objective, {}),
        )
        pool.run(2, training_ranks.train, arguments)
        splits = (None, "validation", "timing", "save")
        names[objective] = {
            name for split in splits for row in metrics_of(folder / objective, split) for name in row
        }
    return names


def test_what_is_written_is_documented(written):
    unknown = {objective: names - BY_NAME.keys() - ROW_KEYS.keys() for objective, names in written.items()}
    assert unknown == dict.fromkeys(OBJECTIVES, set())


def test_what_is_documented_is_written_by_whom_it_says(written):
    for metric in METRICS:
        documented = set(metric.written.split(", ")) & OBJECTIVES.keys() or OBJECTIVES.keys()
        writers = {objective for objective, names in written.items() if metric.name in names}
        assert metric.name in CONDITIONAL or writers == documented, metric.name
