"""What ``{% generation %}`` marks is trained to the character, for every kind of tokenizer and text.

The judge of a token's place is its own text: the trained tokens of each stretch decode to the stretch, after the
tokenizer's own normalisation.
"""

import os
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_align.data.tokenize.record_tokenizer import RecordTokenizer
from megatron_align.records import Conversation, Message
from tests.data.tokenize.test_record_tokenizer import trained

HEAD = (
    "{%- for m in messages %}{%- if m.role == 'assistant' %}{{- '<|im_start|>assistant\n' }}INNER"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
)
CONTENT = HEAD.replace("INNER", "{%- generation %}{{- m.content }}{%- endgeneration %}{{- '<|im_end|>\n' }}")
WITH_END = HEAD.replace(
    "INNER", "{%- generation %}{{- m.content + '<|im_end|>' }}{%- endgeneration %}{{- '\n' }}"
)
IN_A_MACRO = (
    "{%- macro turn(m) %}{{- '<|im_start|>' + m.role + '\n' }}{%- if m.role == 'assistant' %}"
    "{%- generation %}{{- m.content + '<|im_end|>' }}{%- endgeneration %}"
    "{%- else %}{{- m.content + '<|im_end|>' }}{%- endif %}{{- '\n' }}{%- endmacro %}"
    "{%- for m in messages %}{{- turn(m) }}{%- endfor %}"
)
TEMPLATES = {
    "content": (CONTENT, ""),
    "with its end": (WITH_END, "<|im_end|>"),
    "in a macro": (IN_A_MACRO, "<|im_end|>"),
}
WORDS = [
    *(
        "ok",
        "好的",
        "ok 😀",
        "ok 🦜",
        "🫎",
        "caf\u00e9",
        "cafe\u0301",
        "x\u0301",
        "ok\u200d",
        "नमस्ते",
        "ขอบคุณครับ",
    ),
    *(
        "ok ",
        "ok\t",
        " ok",
        "e\u0301 ok",
        "\u110b\u1161\u11ab\u1102\u1167\u11bc",
        "a\u0302\u0301m qua\u0301",
        "ok  \n\n",
        "1/2 ½",
    ),
]


def byte_level(trim=False, normalizer=None):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder, core.normalizer = decoders.ByteLevel(), normalizer
    core.post_processor = processors.ByteLevel(trim_offsets=trim)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return core, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)


def sentencepiece():
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fallback = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    return core, trainers.BpeTrainer(vocab_size=500, special_tokens=fallback, show_progress=False)


def unigram():
    core = Tokenizer(models.Unigram())
    core.normalizer = normalizers.NFKC()
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return core, trainers.UnigramTrainer(
        vocab_size=300, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )


KINDS = {
    "byte level": byte_level,
    "trimmed": lambda: byte_level(trim=True),
    "NFC": lambda: byte_level(normalizer=normalizers.NFC()),
    "trimmed NFKC": lambda: byte_level(trim=True, normalizer=normalizers.NFKC()),
    "sentencepiece": sentencepiece,
    "unigram": unigram,
}


@pytest.fixture(scope="module")
def tokenizers():
    return {name: build(*make()) for name, make in KINDS.items()}


def build(core, trainer):
    core.train_from_iterator(["hello there how are you fine thanks\n ok qua am cafe", *WORDS] * 20, trainer)
    core.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>")


def same(one, other):
    """Compare texts as tokenizers may normalise them, white space at the ends aside."""
    return [unicodedata.normalize("NFKC", text).strip() for text in one] == [
        unicodedata.normalize("NFKC", text).strip() for text in other
    ]


def stretches(tokenizer, template, answers):
    turns = [
        turn for i, a in enumerate(answers) for turn in (Message("user", f"USER{i}"), Message("assistant", a))
    ]
    record = Conversation((*turns, Message("user", "last")), "d:1")
    return trained(tokenizer, RecordTokenizer(tokenizer, template).sample(record))


@pytest.mark.parametrize("template, end", TEMPLATES.values(), ids=list(TEMPLATES))
@pytest.mark.parametrize("kind", KINDS)
def test_marked_answers_are_trained_to_the_character(kind, template, end, tokenizers):
    for word in WORDS:
        if kind == "unigram" and not all(c.isascii() for c in word):
            continue  # what it does not know it cannot decode
        answers = ("fine", word, "thanks")
        found = stretches(tokenizers[kind], template, answers)
        assert same(found, [answer + end for answer in answers]), (word, found)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from([*WORDS, "\n", " ", "<", "|", "é", "a"]), min_size=1, max_size=6).map("".join)
)
def test_any_answer_is_trained_to_the_character(tokenizers, answer):
    for kind in ("byte level", "trimmed", "NFC", "sentencepiece"):
        found = stretches(tokenizers[kind], WITH_END, ("fine", answer, "thanks"))
        assert same(found, [text + "<|im_end|>" for text in ("fine", answer, "thanks")]), kind


@pytest.mark.parametrize("family", ["qwen2", "llama3"])
def test_real_vocabularies(family):
    """Qwen's tokenizer composes characters (NFC), which moves every token after them."""
    folder = Path(os.environ.get("MEGATRON_ALIGN_MODELS", "/nonexistent")) / family
    if not folder.is_dir():
        pytest.skip(
            "examples/real_data/make_model.py makes the models: set MEGATRON_ALIGN_MODELS to their folder"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    for template, end in TEMPLATES.values():
        for word in WORDS:
            found = stretches(tokenizer, template, ("fine", word, "thanks"))
            assert same(found, [answer + end for answer in ("fine", word, "thanks")]), (word, found)


def test_an_untrained_turn_end_is_warned_of_once(tokenizers, caplog):
    tokenizer = RecordTokenizer(tokenizers["byte level"], CONTENT)
    record = Conversation((Message("user", "q"), Message("assistant", "fine")), "d:1")
    for _ in range(2):
        tokenizer.sample(record)
    assert [r.getMessage() for r in caplog.records if "is not trained" in r.getMessage()] == [
        "d:1: the token that ends an answer, <|im_end|>, is not trained, so the model does not learn to stop; "
        "{% generation %} of the chat template should enclose it (logged once; other samples may be affected too)"
    ]
    caplog.clear()
    RecordTokenizer(tokenizers["byte level"], WITH_END).sample(record)
    assert not caplog.records
