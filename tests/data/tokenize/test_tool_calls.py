"""The arguments of a tool call are trained as one JSON object under templates of every kind, wrapped or bare."""

import json

import pytest

from megatron_align.data.tokenize.chat_template import ChatTemplate
from megatron_align.data.tokenize.tool_calls import Arguments, template_call
from megatron_align.errors import InputError
from megatron_align.records import Conversation, Message

ARGUMENTS = {"city": "Köln", "days": 2}
WRITTEN = '{"city": "Köln", "days": 2}'
CALL = "{% for m in messages %}{% for call in m.tool_calls or [] %}CALL{% endfor %}{% endfor %}"
# How chat templates write arguments.
WAYS = {
    "tojson": "{{ call.function.arguments | tojson }}",
    "text": "{{ call.function.arguments }}",
    "joined by +": "{{ '' + call['function']['arguments'] + '' }}",
    "joined by ~": "{{ call.function.arguments ~ '' }}",
    "is string": (
        "{% if call.function.arguments is string %}{{ call.function.arguments }}"
        "{% else %}{{ call.function.arguments | tojson }}{% endif %}"
    ),
    "is mapping": "{% if call.function.arguments is mapping %}{{ call.function.arguments | tojson }}{% endif %}",
    "items": (
        "{% for k, v in call.function.arguments.items() %}"
        "{{ '{' if loop.first else ', ' }}{{ k | tojson }}: {{ v | tojson }}{% endfor %}{{ '}' }}"
    ),
    "either shape": (
        "{% if call.function is defined %}{% set call = call.function %}{% endif %}{{ call.arguments | tojson }}"
    ),
}
FUNCTION = {"name": "weather", "arguments": ARGUMENTS}
SHAPES = {"wrapped": {"type": "function", "function": FUNCTION}, "bare": FUNCTION}


@pytest.mark.parametrize("call", SHAPES.values(), ids=list(SHAPES))
@pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))
def test_every_template_writes_the_object(way, call, tokenizer):
    record = Conversation((Message("assistant", "", {"tool_calls": [call]}),), "data.jsonl:7")
    assert ChatTemplate(tokenizer, CALL.replace("CALL", way)).render(record, 1) == WRITTEN


def test_a_bare_call_is_written_as_it_is(tokenizer):
    record = Conversation((Message("assistant", "", {"tool_calls": [FUNCTION]}),), "data.jsonl:7")
    text = ChatTemplate(tokenizer, CALL.replace("CALL", "{{ call | tojson }}")).render(record, 1)
    assert json.loads(text) == FUNCTION
    by_name = ChatTemplate(
        tokenizer, CALL.replace("CALL", "{{ call.name }}{{ call.arguments.city }}")
    ).render(record, 1)
    assert by_name == "weatherKöln"


def test_arguments_do_not_join_what_is_no_text(tokenizer):
    record = Conversation((Message("assistant", "", {"tool_calls": [FUNCTION]}),), "data.jsonl:7")
    with pytest.raises(InputError, match="data.jsonl:7: the chat template failed"):
        ChatTemplate(tokenizer, CALL.replace("CALL", "{{ 1 + call.arguments }}")).render(record, 1)


def test_other_keys_of_a_call_are_absent():
    call = template_call(FUNCTION)
    assert "function" not in call
    with pytest.raises(KeyError):
        call["id"]
    assert isinstance(template_call(SHAPES["wrapped"])["function"]["arguments"], Arguments)
