"""An exported reward model gives every text the score it was trained on, single and in padded batches, by transformers.

transformers reads the last token that is not padding: a padding token that texts end with would move the score.
"""

import json

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from megatron_align.hf.assets import Padding
from megatron_align.hf.padding import choose_padding
from tests.harness import training_ranks
from tests.harness.tiny import make_model, run_arguments, write_pairs

TURNS = "{{ bos_token or '' }}{% for m in messages %}<s>{{ m.role }}: {{ m.content }}<end>{% endfor %}"


def tokenizer_of(special, pad, end="<end>", unk=None, template=TURNS):
    """Return a byte-level tokenizer with these special tokens; turns end with ``end``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(piece, special=True) for piece in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, pad_token=pad, unk_token=unk, chat_template=template
    )


# special tokens, padding token of the tokenizer, rows of the embeddings -> the padding token that is exported
KINDS = {
    "its own": (["<s>", "<end>", "<pad>"], "<pad>", 301, "<pad>"),
    "none": (["<s>", "<end>", "<|finetune_right_pad_id|>"], None, 301, "<|finetune_right_pad_id|>"),
    "none, reserved tokens": (
        ["<s>", "<end>", "<|reserved_1|>", "<|reserved_0|>"],
        None,
        301,
        "<|reserved_1|>",
    ),
    "the end": (["<s>", "<end>", "<unk>"], "<end>", 301, "<unk>"),
    "only the start is left": (["<s>", "<end>"], "<end>", 301, "<s>"),
    "only the end": (["<end>"], "<end>", 301, "<|pad|>"),
    "only the end, and no row for another": (["<end>"], "<end>", 257, None),
}


@pytest.mark.parametrize("special, pad, rows, expected", KINDS.values(), ids=list(KINDS))
def test_the_exported_model_scores_as_it_was_trained(pool, tmp_path, special, pad, rows, expected):
    template = TURNS if "<s>" in special else TURNS.replace("<s>", "")
    model = make_model(tmp_path / "model", "qwen2_untied", vocab_size=rows, num_hidden_layers=2)
    for file in ("chat_template.jinja", "tokenizer_config.json", "tokenizer.json"):
        (model / file).unlink()
    tokenizer_of(special, pad, template=template).save_pretrained(model)
    data = write_pairs(tmp_path / "pairs.jsonl", samples=12)
    run = tmp_path / "run"
    options = {"objective__name": "reward", "data__validation": data, "checkpoint__export_hf": True}
    pool.run(1, training_ranks.train, run_arguments(model, data, run, train__steps=2, **options))
    rows_written = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    [trained] = [row for row in rows_written if row.get("split") == "validation"]
    for folder in (run / "hf", run / "step_000002" / "hf_assets"):
        assert AutoTokenizer.from_pretrained(folder).pad_token == expected
    scores = scores_of(run / "hf", data, expected)
    for side in (0, 1):
        mean = sum(pair[side] for pair in scores) / len(scores)
        # Scores of size 0.6: our fp32 sums and transformers' round differently, by 1e-7 at most.
        assert mean == pytest.approx(trained[("chosen_reward", "rejected_reward")[side]], abs=1e-6)


def scores_of(folder, data, padding):
    """Return transformers' scores of single texts; those of padded batches and of the last token must be equal."""
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    assert model.config.pad_token_id == tokenizer.pad_token_id
    found = []
    with torch.no_grad():
        for line in data.read_text().splitlines():
            record, pair = json.loads(line), []
            texts = [
                tokenizer.apply_chat_template(record["prompt"] + record[s], tokenize=False)
                for s in ("chosen", "rejected")
            ]
            for text in texts:
                ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
                by_hand = model.score(model.model(ids).last_hidden_state)[0, -1, 0].item()
                assert model(ids).logits.item() == by_hand  # the same operations on the same numbers
                pair.append(by_hand)
            if padding is None:
                batch = torch.zeros(2, 3, dtype=torch.long)
                with pytest.raises(ValueError, match="no padding token"):
                    model(batch)
            else:
                for side in ("right", "left"):
                    batch = tokenizer(
                        texts, padding=True, padding_side=side, add_special_tokens=False, return_tensors="pt"
                    )
                    # A batch's matrix products sum in another order than a text's: 2e-7 for scores of size 0.6.
                    assert model(**batch).logits[:, 0].tolist() == pytest.approx(pair, abs=1e-6)
            found.append(pair)
    return found


def test_a_token_that_may_end_other_texts_is_not_taken():
    tokenizer = tokenizer_of(["<end>", "<stop>", "<tool>"], "<end>")
    end, stop, tool = (tokenizer.convert_tokens_to_ids(token) for token in ("<end>", "<stop>", "<tool>"))
    assert choose_padding(tokenizer, 301, {end}, [stop]) == Padding("<tool>", tool)
    assert choose_padding(tokenizer, 301, {65}, [stop]) == Padding(
        "<end>", end
    )  # as it is: nothing ends with it
    assert choose_padding(tokenizer, 301, {end, tool}, [stop]) == Padding("<|pad|>", len(tokenizer))
