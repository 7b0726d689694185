"""Counting a prefix's tokens without tokenising it gives the same as tokenising it, for every prefix of any text."""

import copy

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
from transformers import PreTrainedTokenizerFast

from megatron_align.data.tokenize.encoder import Encoder, Rendering, common_prefix_length

WORDS = [
    "hello",
    "Hello world",
    "assistant",
    "user",
    "\n",
    "\n\n",
    "  ",
    " a",
    "é",
    "你好",
    "1234",
    "<",
    "|",
    "im_start",
]
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|im_end|>x"]  # the last one starts like another


def train(pre_tokenizer, normalizer, **added):
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer, backend.normalizer = pre_tokenizer, normalizer
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=["<unk>"], initial_alphabet=alphabet)
    corpus = [" ".join(WORDS), "\n".join(WORDS), "hello Hello world assistant\nuser\n\nassistant 12 34"] * 5
    backend.train_from_iterator(corpus, trainer)
    backend.add_tokens([AddedToken(text, special=True, normalized=False, **added) for text in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.fixture(scope="module")
def tokenizers():
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return {
        "byte level": train(level, None),
        "prefix space": train(pre_tokenizers.ByteLevel(add_prefix_space=True), normalizers.NFC()),
        "metaspace first": train(pre_tokenizers.Metaspace(prepend_scheme="first"), None),
        "metaspace always": train(pre_tokenizers.Metaspace(prepend_scheme="always"), normalizers.NFKC()),
        "strips": train(level, None, lstrip=True),
    }


texts = st.lists(st.sampled_from([*WORDS, *SPECIAL, "<|im_"]), max_size=12).map("".join)


@pytest.mark.parametrize(
    "name", ["byte level", "prefix space", "metaspace first", "metaspace always", "strips"]
)
def test_equals_tokenising_the_prefix(tokenizers, name):
    encoder = Encoder(tokenizers[name])

    @settings(max_examples=150, deadline=None)
    @given(texts)
    def check(text):
        ids = encoder.ids(text)
        rendering = Rendering(text, ids, encoder)
        for end in range(len(text) + 1):
            assert rendering.covered(text[:end]) == common_prefix_length(encoder.ids(text[:end]), ids), (
                text,
                end,
            )

    check()


def test_the_quick_way_is_taken(tokenizers, monkeypatch):
    encoder = Encoder(tokenizers["byte level"])
    text = "<|im_start|>user\nhello<|im_end|>\n" * 50 + "<|im_start|>assistant\nHello<|im_end|>\n"
    rendering = Rendering(text, encoder.ids(text), encoder)
    seen = []
    whole_ids = encoder.ids
    monkeypatch.setattr(encoder, "short", lambda text: seen.append(text) or whole_ids(text))
    monkeypatch.setattr(encoder, "ids", lambda text: pytest.fail("the whole prefix was tokenised"))
    assert rendering.covered(text[: text.index("Hello")]) == len(whole_ids(text[: text.index("Hello")]))
    assert seen == ["<|im_start|>assistant\n"]


@pytest.mark.parametrize("name", ["byte level", "prefix space", "metaspace first", "metaspace always"])
def test_the_backend_gives_what_a_call_gives(tokenizers, name):
    tokenizer = copy.deepcopy(tokenizers[name])
    backend = tokenizer.backend_tokenizer
    around = [("<unk>", backend.token_to_id("<unk>"))]
    backend.post_processor = processors.TemplateProcessing("<unk> $A <unk>", special_tokens=around)
    backend.enable_truncation(3)
    backend.enable_padding(length=9)
    encoder = Encoder(tokenizer)
    assert encoder._backend is not None

    @settings(max_examples=60, deadline=None)
    @given(texts, st.booleans())
    def check(text, added):
        assert encoder.ids(text, added=added) == tokenizer(text=text, add_special_tokens=added)["input_ids"]

    check()
    assert len(encoder.ids("", added=True)) == 2


def test_a_tokenizer_with_a_call_of_its_own_is_called(tokenizers):
    class Own(PreTrainedTokenizerFast):
        def _encode_plus(self, text, *args, **options):
            return super()._encode_plus(text + "!", *args, **options)

    own = Own(tokenizer_object=tokenizers["byte level"].backend_tokenizer)
    assert Encoder(own).ids("hello") == Encoder(tokenizers["byte level"]).ids("hello!")


def test_tokens_that_take_in_space_are_left_to_the_slow_way(tokenizers):
    assert Encoder(tokenizers["strips"]).special is None
    assert Encoder(tokenizers["byte level"]).special is not None
