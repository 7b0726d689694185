"""Every assistant turn is trained and nothing else, marks or no marks; what is unclear is refused."""

import numpy as np
import pytest

from megatron_align.data.templates import Template, load_tokenizer
from megatron_align.errors import InputError
from megatron_align.records import Completion, Conversation, Message

HEAD = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def talk(*turns, **more):
    messages = tuple(Message(role, content) for role, content in turns)
    return Conversation(messages, "data.jsonl:7", **more)


def trained(tokenizer, sample):
    """Return the trained stretches as text."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], sample.scored_L.astype(int), [0]])))
    return [tokenizer.decode(sample.tokens_L[a:b]) for a, b in edges.reshape(-1, 2)]


TWO_TURNS = talk(("user", "q1"), ("assistant", "hello"), ("user", "q2"), ("assistant", "world"))


def test_every_assistant_turn_is_trained(tokenizer):
    sample = Template(tokenizer).sample(TWO_TURNS)
    assert tokenizer.decode(sample.tokens_L) == (
        HEAD + "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"
        "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\nworld<|im_end|>\n"
    )
    assert trained(tokenizer, sample) == ["hello<|im_end|>\n", "world<|im_end|>\n"]
    assert sample.tokens_L.dtype == np.int32
    assert sample.scored_L.dtype == bool


def test_generation_marks_decide_where_there_are_any(tokenizer, marked_template):
    tokenizer.chat_template = marked_template
    sample = Template(tokenizer).sample(TWO_TURNS)
    assert trained(tokenizer, sample) == ["hello<|im_end|>", "world<|im_end|>"]


def test_marks_allow_an_opening_assistant_turn(tokenizer, marked_template):
    record = talk(("assistant", "hello"), ("user", "q"), ("assistant", "world"))
    with pytest.raises(InputError, match="data.jsonl:7: messages.0. must not be an assistant turn"):
        Template(tokenizer).sample(record)
    tokenizer.chat_template = marked_template
    assert len(trained(tokenizer, Template(tokenizer).sample(record))) == 2


def test_neighbouring_assistant_turns_and_trailing_context(tokenizer):
    record = talk(("user", "q"), ("assistant", "hello"), ("assistant", "world"), ("user", "q2"))
    # the second turn's header lies between them and is context
    assert trained(tokenizer, Template(tokenizer).sample(record)) == [
        "hello<|im_end|>\n",
        "world<|im_end|>\n",
    ]


def test_only_the_completion_of_a_chat_prompt_is_trained(tokenizer, marked_template):
    turns = TWO_TURNS.messages
    record = Conversation(turns, "data.jsonl:7", prompt_messages=3)
    for template in (tokenizer.chat_template, marked_template):
        tokenizer.chat_template = template
        assert trained(tokenizer, Template(tokenizer).sample(record)) == ["world<|im_end|>\n"]


def test_a_token_across_the_start_belongs_to_the_answer(tokenizer):
    newlines = tokenizer("assistant\n\n\n")["input_ids"]
    assert len(newlines) == 1 + len(tokenizer("assistant")["input_ids"])  # they are one token
    sample = Template(tokenizer).sample(talk(("user", "q"), ("assistant", "\n\nhello")))
    assert trained(tokenizer, sample) == ["\n\n\nhello<|im_end|>\n"]


def test_tools_reach_the_template(tokenizer):
    tokenizer.chat_template = "{{ tools | tojson }}" + tokenizer.chat_template
    sample = Template(tokenizer).sample(talk(("user", "q"), ("assistant", "a"), tools=({"name": "f"},)))
    assert tokenizer.decode(sample.tokens_L).startswith('[{"name": "f"}]')
    assert trained(tokenizer, sample) == ["a<|im_end|>\n"]


def test_a_template_that_loses_tools_or_calls_is_refused(tokenizer):
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    turns = (Message("user", "q"), Message("assistant", "", {"tool_calls": [call]}))
    with pytest.raises(
        InputError, match="data.jsonl:7: the chat template must write the record's tool_calls"
    ):
        Template(tokenizer).sample(Conversation(turns, "data.jsonl:7"))
    with pytest.raises(InputError, match="data.jsonl:7: the chat template must write the record's tools"):
        Template(tokenizer).sample(talk(("user", "q"), ("assistant", "a"), tools=({"name": "f"},)))


def test_plain_text_gets_eos_once_and_no_template(tokenizer):
    tokenizer.chat_template = None
    for completion in (" world", " world<|im_end|>"):
        sample = Template(tokenizer).sample(Completion("hello", completion, "data.jsonl:7"))
        assert tokenizer.decode(sample.tokens_L) == "hello world<|im_end|>"
        assert trained(tokenizer, sample) == [" world<|im_end|>"]


def test_the_first_token_is_never_scored(tokenizer):
    sample = Template(tokenizer).sample(Completion("", "hello world", "data.jsonl:7"))
    assert not sample.scored_L[0]
    assert sample.scored_L[1:].all()


def test_a_prompt_that_is_no_token_prefix_is_told_once(tokenizer, caplog):
    template = Template(tokenizer)
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
        Template(tokenizer).sample(record)
    assert str(error.value).startswith("data.jsonl:7: ")
    assert "\n" not in str(error.value)


def test_plain_text_needs_eos(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="data.jsonl:7: .* EOS token, got none"):
        Template(tokenizer).sample(Completion("p", "c", "data.jsonl:7"))


TOKENIZERS = {
    "nothing": {},
    "model only": {"config.json": '{"model_type": "qwen2"}'},
    "broken": {"tokenizer.json": "{"},
    "empty": {"tokenizer.json": "{}"},
    "no such model": {"tokenizer.json": '{"added_tokens": [], "model": {"type": "Nope"}}'},
    "own code": {
        "tokenization_x.py": "",
        "tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["tokenization_x.X", null]}}',
    },
}


@pytest.mark.parametrize("files", TOKENIZERS.values(), ids=list(TOKENIZERS))
def test_bad_tokenizers_are_named(tmp_path, files):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=f"^{tmp_path}: ") as error:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(error.value)


def test_missing_tokenizer_folder_is_named(tmp_path):
    with pytest.raises(InputError, match="must be a Hugging Face folder"):
        load_tokenizer(str(tmp_path / "no"))
