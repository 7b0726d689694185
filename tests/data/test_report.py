"""The report's numbers are those of the store and of training's step plans; the shown sample is the sample."""

import json

import numpy as np
import pytest

from megatron_align.data.batching.packing import PackOptions, plan_samples, plan_step
from megatron_align.data.report import PackingSetup, rendered, report
from megatron_align.data.store import TokenStore
from megatron_align.data.tokenize.prepare import prepare
from megatron_align.errors import InputError
from megatron_align.records import Sample

CHAT = [
    {
        "messages": [
            {"role": "user", "content": "the cat " * (1 + i % 5)},
            {"role": "assistant", "content": "sat on the mat " * (1 + i % 11)},
        ]
    }
    for i in range(64)
]
PAIRS = [{"prompt": "hello " * 9, "chosen": "the cat" * (i + 1), "rejected": "mat"} for i in range(8)]


@pytest.fixture
def chat(make):
    return TokenStore(prepare(make(CHAT)))


def test_counts_are_those_of_the_store(chat):
    numbers = report(chat, PackingSetup(pack_length=4096))
    assert numbers["samples"] == len(chat) == 64
    assert numbers["tokens"] == numbers["duplicated_tokens"] == chat.lengths.sum()
    assert numbers["scored_tokens"] == chat.scored_counts.sum()
    told = numbers["lengths"]
    assert (told["min"], told["max"], told["mean"]) == (
        chat.lengths.min(),
        chat.lengths.max(),
        chat.lengths.mean(),
    )
    assert sum(told["histogram"]["counts"]) == 64
    assert len(told["histogram"]["edges"]) == len(told["histogram"]["counts"]) + 1
    json.dumps(numbers, allow_nan=False)


@pytest.mark.parametrize("ranks", [1, 4])
def test_packing_is_what_the_plan_says(chat, ranks):
    """One step takes all samples, so its plan can be made again and counted by hand."""
    numbers = report(chat, PackingSetup(ranks=ranks, pack_length=1024, global_batch_size=64))["packing"]
    plan = plan_step(np.sort(chat.lengths), ranks, PackOptions(capacity=1024))
    packs = sum(len(rank) for rank in plan.packs)
    assert (numbers["steps_planned"], numbers["packs_per_step"]) == (1, packs)
    assert numbers["fill"] == pytest.approx(1 - numbers["padding"])
    assert numbers["fill"] == pytest.approx(chat.lengths.sum() / (packs * numbers["padded_length"]))
    assert numbers["fill_without_packing"] == pytest.approx(chat.lengths.mean() / chat.lengths.max())
    for what in ("tokens", "attention"):
        told = numbers[f"{what}_imbalance"]
        assert 1 <= told["mean"] <= told["max"] < 1.2
        assert (told["max"] == 1) == (ranks == 1)


@pytest.mark.parametrize("share_prefix", [True, False])
def test_attention_is_counted_as_training_plans_it(make, share_prefix):
    """A pair whose prompt is not shared computes it twice: cost (P + c)^2 for each completion."""
    uneven = [{**PAIRS[0], "chosen": "the cat" * 2**i} for i in range(5)]  # no two ranks can be level
    pairs = TokenStore(prepare(make(uneven)))
    setup = PackingSetup(ranks=2, pack_length=1024, global_batch_size=len(pairs), share_prefix=share_prefix)
    options = PackOptions(capacity=1024, share_prefix=share_prefix)
    plan = plan_samples(pairs, np.arange(len(pairs)), 2, options)
    prompts_S, own_S = pairs.prompt_lengths, pairs.lengths - pairs.prompt_lengths
    costs_S = (1 if share_prefix else 2) * prompts_S**2 + 2 * prompts_S * own_S + own_S**2 // 2
    of_rank = [sum(costs_S[pack].sum() for pack in rank) for rank in plan.packs]
    shown = report(pairs, setup)["packing"]["attention_imbalance"]
    assert shown["mean"] == pytest.approx(max(of_rank) * 2 / sum(of_rank))


def test_without_packing_padding_is_that_of_the_longest(chat):
    layout = PackingSetup(pack_length=1024, global_batch_size=64, packing=False)
    packing = report(chat, layout)["packing"]
    assert packing["fill"] == pytest.approx(packing["fill_without_packing"])


def test_shared_prompts_save_tokens(make):
    store = TokenStore(prepare(make(PAIRS)))
    numbers = report(store, PackingSetup(pack_length=4096, global_batch_size=8))
    assert numbers["duplicated_tokens"] - numbers["tokens"] == store.prompt_lengths.sum()
    alone = report(store, PackingSetup(pack_length=4096, global_batch_size=8, share_prefix=False))
    assert alone["packing"]["padded_length"] == store.duplicated_lengths.sum()
    assert numbers["packing"]["padded_length"] == store.lengths.sum()


def test_a_store_smaller_than_a_step_is_planned_whole(chat):
    assert (
        report(chat, PackingSetup(pack_length=4096, global_batch_size=1000))["packing"]["steps_planned"] == 1
    )


def test_the_order_does_not_run_past_the_epoch(chat):
    assert report(chat, PackingSetup(pack_length=4096, global_batch_size=30))["packing"]["steps_planned"] == 2


def test_a_pack_must_hold_the_longest(chat):
    longest = chat.lengths.max()
    with pytest.raises(InputError, match=f"the longest sample, of {longest} tokens .*got a length of 10"):
        report(chat, PackingSetup(pack_length=10))


def test_the_shown_sample_is_the_sample(chat, tokenizer):
    (part,) = rendered(chat.sample(6), tokenizer)
    assert "".join(text for text, _ in part.runs) == tokenizer.decode(chat.sample(6).tokens_L)
    assert [text for text, trained in part.runs if trained] == ["sat on the mat " * 7 + "<|im_end|>\n"]


def test_prompt_and_completions_are_shown_apart(make, tokenizer):
    store = TokenStore(prepare(make(PAIRS)))
    parts = rendered(store.sample(1), tokenizer)
    assert [part.title for part in parts] == ["prompt", "chosen", "rejected"]
    text = "".join(text for part in parts for text, _ in part.runs)
    assert text == tokenizer.decode(store.sample(1).tokens_L)
    assert not any(trained for _, trained in parts[0].runs)
    assert all(trained for part in parts[1:] for _, trained in part.runs)


def test_titles_tell_scores_and_labels(tokenizer):
    tokens, scored = np.arange(6, dtype=np.int32), np.arange(6) > 1

    def titles(lengths, **options):
        sample = Sample(tokens, scored, prompt_length=2, completion_lengths=lengths, **options)
        return [part.title for part in rendered(sample, tokenizer)][1:]

    assert titles((2, 1, 1), scores=(3.0, float("nan"), -0.5)) == [
        "completion 1, score 3",
        "completion 2",
        "completion 3, score -0.5",
    ]
    assert titles((4,), label=False) == ["completion, not desirable"]
