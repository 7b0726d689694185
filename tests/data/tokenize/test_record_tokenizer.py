"""Every assistant turn is trained unless it says otherwise, marks or no marks; ambiguous records are refused."""

import math
from dataclasses import replace

import numpy as np
import pytest

from megatron_align.data.tokenize.chat_template import load_chat_template
from megatron_align.data.tokenize.record_tokenizer import RecordTokenizer
from megatron_align.errors import InputError
from megatron_align.records import Completion, Conversation, Message, Preference

HEAD = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def talk(*turns, **more):
    messages = tuple(Message(role, content) for role, content in turns)
    return Conversation(messages, "data.jsonl:7", **more)


def quiet(role, content):
    return Message(role, content, train=False)


QUESTION = (Message("user", "q"),)


def judged(*completions, prompt=QUESTION, kind="pair", **more):
    return Preference(kind=kind, prompt=prompt, completions=completions, where="data.jsonl:7", **more)


def trained(tokenizer, sample):
    """Return the trained stretches as text."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], sample.scored_L.astype(int), [0]])))
    return [tokenizer.decode(sample.tokens_L[a:b]) for a, b in edges.reshape(-1, 2)]


TWO_TURNS = talk(("user", "q1"), ("assistant", "hello"), ("user", "q2"), ("assistant", "world"))


def test_every_assistant_turn_is_trained(tokenizer):
    sample = RecordTokenizer(tokenizer).sample(TWO_TURNS)
    assert tokenizer.decode(sample.tokens_L) == (
        HEAD + "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"
        "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\nworld<|im_end|>\n"
    )
    assert trained(tokenizer, sample) == ["hello<|im_end|>\n", "world<|im_end|>\n"]
    assert sample.tokens_L.dtype == np.int32
    assert sample.scored_L.dtype == bool


def test_generation_marks_decide_where_there_are_any(tokenizer, marked_template):
    tokenizer.chat_template = marked_template
    sample = RecordTokenizer(tokenizer).sample(TWO_TURNS)
    assert trained(tokenizer, sample) == ["hello<|im_end|>", "world<|im_end|>"]


OPENING = talk(("assistant", "hello"), ("user", "q"), ("assistant", "world"))


def test_a_conversation_may_start_with_the_assistant(tokenizer, marked_template):
    assert trained(tokenizer, RecordTokenizer(tokenizer).sample(OPENING)) == [
        "hello<|im_end|>\n",
        "world<|im_end|>\n",
    ]
    tokenizer.chat_template = marked_template
    assert trained(tokenizer, RecordTokenizer(tokenizer).sample(OPENING)) == [
        "hello<|im_end|>",
        "world<|im_end|>",
    ]


def test_an_opening_answer_without_a_header_needs_marks(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}|{% endfor %}"
    with pytest.raises(InputError, match="data.jsonl:7: messages.0. must not be an assistant turn unless"):
        RecordTokenizer(tokenizer).sample(OPENING)


UNTRAINED = {
    "first": ((False, True, True), ["two", "three"]),
    "middle": ((True, False, True), ["one", "three"]),
    "last": ((True, True, False), ["one", "two"]),
    "two": ((False, True, False), ["two"]),
}


@pytest.mark.parametrize("flags, expected", UNTRAINED.values(), ids=list(UNTRAINED))
@pytest.mark.parametrize("marked", [False, True])
def test_untrained_turns_are_context(marked, flags, expected, tokenizer, marked_template):
    tokenizer.chat_template = marked_template if marked else tokenizer.chat_template
    said = zip(("one", "two", "three"), flags, strict=True)
    # the second and third are neighbours
    turns = [Message("assistant", text, train=flag) for text, flag in said]
    messages = (Message("user", "q1"), turns[0], Message("user", "q2"), *turns[1:], Message("user", "q3"))
    sample = RecordTokenizer(tokenizer).sample(Conversation(messages, "data.jsonl:7"))
    end = "<|im_end|>" if marked else "<|im_end|>\n"
    assert trained(tokenizer, sample) == [text + end for text in expected]
    everything = tuple(replace(message, train=True) for message in messages)
    whole = RecordTokenizer(tokenizer).sample(Conversation(everything, "data.jsonl:7"))
    assert sample.tokens_L.tolist() == whole.tokens_L.tolist()


def test_an_untrained_opening_turn_needs_no_marks(tokenizer):
    record = talk(("assistant", "hi"), ("user", "q"), ("assistant", "world"))
    record = replace(record, messages=(quiet("assistant", "hi"), *record.messages[1:]))
    assert trained(tokenizer, RecordTokenizer(tokenizer).sample(record)) == ["world<|im_end|>\n"]


@pytest.mark.parametrize("marked", [False, True])
def test_a_conversation_without_a_trained_turn_is_refused(marked, tokenizer, marked_template):
    tokenizer.chat_template = marked_template if marked else tokenizer.chat_template
    record = Conversation((Message("user", "q"), quiet("assistant", "a")), "data.jsonl:7")
    with pytest.raises(InputError, match="data.jsonl:7: must have a token to train on"):
        RecordTokenizer(tokenizer).sample(record)


def test_an_untrained_turn_that_is_marked_differently_later_is_refused(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}[{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}{% if loop.last %}!{% endif %}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}]{% endfor %}"
    )
    messages = (Message("user", "q"), quiet("assistant", "a"), *TWO_TURNS.messages[2:])
    with pytest.raises(InputError, match="messages.1. with 'train': false must be marked the same"):
        RecordTokenizer(tokenizer).sample(Conversation(messages, "data.jsonl:7"))


def test_untrained_turns_of_a_chat_completion(tokenizer, marked_template):
    for template in (tokenizer.chat_template, marked_template):
        tokenizer.chat_template = template
        messages = (
            *TWO_TURNS.messages,
            quiet("user", "q3"),
            quiet("assistant", "no"),
            Message("assistant", "yes"),
        )
        sample = RecordTokenizer(tokenizer).sample(Conversation(messages, "data.jsonl:7", prompt_messages=3))
        # as in TRL, what stands between the turns of a completion is trained: here the last turn's header
        last = "<|im_start|>assistant\nyes<|im_end|>\n"
        assert trained(tokenizer, sample) == ["world<|im_end|>\n", last]


def test_weights_reach_the_sample(tokenizer):
    template = RecordTokenizer(tokenizer)
    assert template.sample(replace(TWO_TURNS, weight=0.5)).weight == 0.5
    assert template.sample(Completion("p", "c", "data.jsonl:7", 2.0)).weight == 2.0
    assert template.sample(judged(*TEXTS, prompt="p", weight=3.0)).weight == 3.0
    assert template.sample(TWO_TURNS).weight == 1.0


# A prompt and its judged completions.
TEXTS = (" world", " cat")
GOOD, POOR = (Message("assistant", "good"),), (Message("assistant", "poor"),)
ASKED = HEAD + "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"


def parts(tokenizer, sample):
    ends = np.cumsum([sample.prompt_length, *sample.completion_lengths])
    assert ends[-1] == len(sample.tokens_L)
    return [tokenizer.decode(part) for part in np.split(sample.tokens_L, ends[:-1])]


def test_completions_follow_one_prompt(tokenizer):
    sample = RecordTokenizer(tokenizer).sample(judged(GOOD, POOR, scores=(1.0, None), margin=0.5))
    assert parts(tokenizer, sample) == [ASKED, "good<|im_end|>\n", "poor<|im_end|>\n"]
    assert trained(tokenizer, sample) == ["good<|im_end|>\npoor<|im_end|>\n"]
    assert not sample.scored_L[: sample.prompt_length].any()
    assert (sample.scores[0], math.isnan(sample.scores[1])) == (1.0, True)
    assert (sample.margin, sample.label, sample.weight) == (0.5, None, 1.0)
    assert (sample.tokens_L.dtype, sample.scored_L.dtype) == (np.int32, bool)


def test_text_completions_end_with_eos_and_need_no_template(tokenizer):
    tokenizer.chat_template = None
    record = judged(" a", " b<|im_end|>", " c", prompt="q", kind="ranked", scores=(3.0, 2.0, 1.0))
    sample = RecordTokenizer(tokenizer).sample(record)
    assert parts(tokenizer, sample) == ["q", " a<|im_end|>", " b<|im_end|>", " c<|im_end|>"]
    assert sample.scores == (3.0, 2.0, 1.0)
    assert math.isnan(sample.margin)


def test_a_labelled_completion(tokenizer):
    sample = RecordTokenizer(tokenizer).sample(judged(POOR, kind="unpaired", label=False))
    assert parts(tokenizer, sample) == [ASKED, "poor<|im_end|>\n"]
    assert (sample.label, sample.scores) == (False, ())


def test_a_triples_gold_answer_may_be_the_chosen_one(tokenizer):
    sample = RecordTokenizer(tokenizer).sample(judged(GOOD, POOR, GOOD, kind="triple"))
    assert parts(tokenizer, sample) == [ASKED, "good<|im_end|>\n", "poor<|im_end|>\n", "good<|im_end|>\n"]
    assert sample.scored_L[sample.prompt_length :].all()


def test_the_prompt_ends_where_the_first_completion_diverges(tokenizer, caplog):
    template = RecordTokenizer(tokenizer)
    for _ in range(2):
        sample = template.sample(judged("\nworld", "cat", prompt="hello\n"))
        assert parts(tokenizer, sample) == ["hello", "\n\nworld<|im_end|>", "\ncat<|im_end|>"]
    assert len(caplog.records) == 1
    assert "training starts where they diverge, before '\\n'" in caplog.records[0].getMessage()


@pytest.mark.parametrize("marked", [False, True])
def test_untrained_turns_of_a_judged_completion(marked, tokenizer, marked_template):
    tokenizer.chat_template = marked_template if marked else tokenizer.chat_template
    long = (quiet("assistant", "no"), quiet("user", "why"), *GOOD)
    sample = RecordTokenizer(tokenizer).sample(judged(long, POOR))
    scored = [tokenizer.decode(sample.tokens_L[sample.scored_L])]
    # as in TRL, all of a completion is trained but what says otherwise: here the last turn's header is
    assert scored == ["<|im_start|>assistant\ngood<|im_end|>\npoor<|im_end|>\n"]
    whole = tuple(replace(message, train=True) for message in long)
    assert (
        RecordTokenizer(tokenizer).sample(judged(whole, POOR)).tokens_L.tolist() == sample.tokens_L.tolist()
    )


BAD_JUDGED = {
    "no template": (None, judged(GOOD, POOR), "needs a tokenizer with a chat template"),
    "all untrained": (
        "",
        judged(GOOD, (quiet("assistant", "a"),)),
        "completion 2 must have a token to train on",
    ),
    "same tokens": (
        "",
        judged(" a", " a<|im_end|>", prompt="q"),
        "completion 2 must differ from completion 1",
    ),
    "same after the template": (
        "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}",
        judged((Message("assistant", "a"),), (Message("assistant", " a"),)),
        "completion 2 must differ from completion 1, got the same tokens",
    ),
    "no prompt": (
        "",
        judged(" a", " b", prompt=""),
        "must have a token of the prompt before its completions",
    ),
    "tools lost": ("", judged(GOOD, POOR, tools=({"name": "f"},)), "must write the record's tools"),
}


@pytest.mark.parametrize("template, record, expected", BAD_JUDGED.values(), ids=list(BAD_JUDGED))
def test_judged_completions_that_cannot_be_told_apart_are_refused(tokenizer, template, record, expected):
    tokenizer.chat_template = template if template != "" else tokenizer.chat_template
    with pytest.raises(InputError, match=expected) as error:
        RecordTokenizer(tokenizer).sample(record)
    assert str(error.value).startswith("data.jsonl:7: ")


# A chat template of one's own.
def test_another_chat_template_is_used_in_place_of_the_tokenizers(tokenizer, marked_template, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text(marked_template, encoding="utf-8")
    mine = RecordTokenizer(tokenizer, load_chat_template(str(file)))
    assert trained(tokenizer, mine.sample(TWO_TURNS)) == ["hello<|im_end|>", "world<|im_end|>"]
    assert tokenizer.chat_template != marked_template
    tokenizer.chat_template = None
    assert parts(tokenizer, mine.sample(judged(GOOD, POOR)))[0] == ASKED.removeprefix(HEAD)


def test_neighbouring_assistant_turns_and_trailing_context(tokenizer):
    record = talk(("user", "q"), ("assistant", "hello"), ("assistant", "world"), ("user", "q2"))
    # the second turn's header lies between them and is context
    assert trained(tokenizer, RecordTokenizer(tokenizer).sample(record)) == [
        "hello<|im_end|>\n",
        "world<|im_end|>\n",
    ]


def test_only_the_completion_of_a_chat_prompt_is_trained(tokenizer, marked_template):
    turns = TWO_TURNS.messages
    record = Conversation(turns, "data.jsonl:7", prompt_messages=3)
    for template in (tokenizer.chat_template, marked_template):
        tokenizer.chat_template = template
        assert trained(tokenizer, RecordTokenizer(tokenizer).sample(record)) == ["world<|im_end|>\n"]


def test_a_token_across_the_start_belongs_to_the_answer(tokenizer):
    newlines = tokenizer("assistant\n\n\n")["input_ids"]
    assert len(newlines) == 1 + len(tokenizer("assistant")["input_ids"])  # they are one token
    sample = RecordTokenizer(tokenizer).sample(talk(("user", "q"), ("assistant", "\n\nhello")))
    assert trained(tokenizer, sample) == ["\n\n\nhello<|im_end|>\n"]


def test_tools_reach_the_template(tokenizer):
    tokenizer.chat_template = "{{ tools | tojson }}" + tokenizer.chat_template
    sample = RecordTokenizer(tokenizer).sample(
        talk(("user", "q"), ("assistant", "a"), tools=({"name": "f"},))
    )
    assert tokenizer.decode(sample.tokens_L).startswith('[{"name": "f"}]')
    assert trained(tokenizer, sample) == ["a<|im_end|>\n"]


def test_a_template_that_loses_tools_or_calls_is_refused(tokenizer):
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    turns = (Message("user", "q"), Message("assistant", "", {"tool_calls": [call]}))
    with pytest.raises(
        InputError, match="data.jsonl:7: the chat template must write the record's tool_calls"
    ):
        RecordTokenizer(tokenizer).sample(Conversation(turns, "data.jsonl:7"))
    with pytest.raises(InputError, match="data.jsonl:7: the chat template must write the record's tools"):
        RecordTokenizer(tokenizer).sample(talk(("user", "q"), ("assistant", "a"), tools=({"name": "f"},)))


def test_plain_text_gets_eos_once_and_no_template(tokenizer):
    tokenizer.chat_template = None
    for completion in (" world", " world<|im_end|>"):
        sample = RecordTokenizer(tokenizer).sample(Completion("hello", completion, "data.jsonl:7"))
        assert tokenizer.decode(sample.tokens_L) == "hello world<|im_end|>"
        assert trained(tokenizer, sample) == [" world<|im_end|>"]


def test_the_first_token_is_never_scored(tokenizer):
    sample = RecordTokenizer(tokenizer).sample(Completion("", "hello world", "data.jsonl:7"))
    assert not sample.scored_L[0]
    assert sample.scored_L[1:].all()


def test_a_prompt_that_is_no_token_prefix_is_told_once(tokenizer, caplog):
    template = RecordTokenizer(tokenizer)
    for _ in range(2):
        template.sample(Completion("hello\n", "\nworld", "data.jsonl:7"))
    assert [record.getMessage().split(";")[0] for record in caplog.records] == [
        "data.jsonl:7: the tokens of the prompt are not the first tokens of prompt + completion"
    ]


LAST_TURN_ONLY = (
    "{% for m in messages %}{{ m.role + ': ' + m.content }}"
    "{% if m.role == 'assistant' and loop.last %} (last){% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
BAD = {
    "no template": (None, TWO_TURNS, "needs a tokenizer with a chat template, got none"),
    "does not nest": (
        LAST_TURN_ONLY,
        TWO_TURNS,
        "messages\\[1\\]: the chat template must render earlier turns the same",
    ),
    "another prompt": (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}GO{% endif %}",
        TWO_TURNS,
        "messages\\[1\\]: .* got 'GO' up to this turn, 'hello",
    ),
    "turn left out": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
        TWO_TURNS,
        "messages\\[1\\] must add tokens",
    ),
    "raises": ("{{ raise_exception('no\nsystem') }}", TWO_TURNS, "the chat template failed: no system"),
    "broken": ("{% for %}", TWO_TURNS, "the chat template failed: "),
    "marks nothing": (
        "{% if false %}{% generation %}{% endgeneration %}{% endif %}{{ messages[0].content }}",
        TWO_TURNS,
        "must have a token to train on",
    ),
}


@pytest.mark.parametrize("template, record, expected", BAD.values(), ids=list(BAD))
def test_what_cannot_be_told_apart_is_refused(tokenizer, template, record, expected):
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=expected) as error:
        RecordTokenizer(tokenizer).sample(record)
    assert str(error.value).startswith("data.jsonl:7: ")
    assert "\n" not in str(error.value)


def test_plain_text_needs_eos(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="data.jsonl:7: .* EOS token, got none"):
        RecordTokenizer(tokenizer).sample(Completion("p", "c", "data.jsonl:7"))
