"""Scores of a reward model and labels of a classifier equal those of transformers, one prompt at a time."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from megatron_align.curation.open_scorers import open_labels, open_quality
from megatron_align.curation.raw_prompts import RawPrompt
from megatron_align.errors import InputError
from tests.harness.tiny import make_model

TEXTS = ["one", "a longer prompt, with more words", "one more", "x" * 3000]


def prompts():
    return [RawPrompt(text=text, raw={}, where=f"f:{i}") for i, text in enumerate(TEXTS)]


def logits(folder, text):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False)
    with torch.no_grad():
        return model(**tokenizer(rendered, return_tensors="pt", add_special_tokens=False)).logits[0]


def no_asker(*_):
    pytest.fail("a classifier needs no replies")


def test_a_reward_model_scores_quality(tiny_models, tmp_path):
    folder = str(tiny_models("qwen2_reward"))
    scorer = open_quality(folder, no_asker, tmp_path, tries=1)
    values = scorer.values(prompts())
    assert values[:3] == pytest.approx([logits(folder, text).item() for text in TEXTS[:3]], abs=1e-5)
    assert values[3] is None  # longer than its positions
    scorer.close()
    again = open_quality(folder, no_asker, tmp_path, tries=1)
    again._compute = lambda _: pytest.fail("the values are kept")
    assert again.values(prompts()) == values
    with pytest.raises(InputError, match="a classifier has at least two labels, got"):
        open_labels(folder, no_asker, tmp_path, 1, [])


def test_a_classifier_labels(tmp_path):
    names = {0: "maths", 1: "code", 2: "writing"}
    folder = make_model(tmp_path / "model", "qwen2_reward", num_labels=3, id2label=names)
    values = open_labels(str(folder), no_asker, tmp_path, 1, []).values(prompts())
    assert values[:3] == [names[int(logits(folder, text).argmax())] for text in TEXTS[:3]]
    with pytest.raises(InputError, match="a reward model has one output, got 3 labels"):
        open_quality(str(folder), no_asker, tmp_path, tries=1)
