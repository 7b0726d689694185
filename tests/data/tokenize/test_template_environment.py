"""Chat templates render what transformers renders, and whatever a template does ends in an InputError or a text."""

import json
import threading
from importlib.resources import files

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_align.data.tokenize import template_limits
from megatron_align.data.tokenize.chat_template import ChatTemplate
from megatron_align.errors import InputError
from megatron_align.records import Conversation, Message

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CALL = {"type": "function", "id": "call00000", "function": {"name": "f", "arguments": {"x": [1, "é<>"]}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "does f",
        "parameters": {"type": "object", "properties": {"x": {"type": "string", "description": "the é"}}},
    },
}
U, A = (
    (lambda text, **more: Message("user", text, more)),
    (lambda text, **more: Message("assistant", text, more)),
)
TALKS = {
    "short": Conversation((U("hi <b>"), A("yo\n")), "d:1"),
    "system": Conversation((Message("system", " be é "), U("q"), A("a"), U("r"), A("b")), "d:1"),
    "reasoning": Conversation(
        (U("q"), A("a", thinking="one"), U("r"), A("b", reasoning_content="two")), "d:1"
    ),
    "calls": Conversation(
        (U("q"), A("", tool_calls=[CALL]), Message("tool", "3", {"tool_call_id": "call00000"}), A("b")),
        "d:1",
        (TOOL,),
    ),
}


def talk(text="q"):
    return Conversation((U(text), A("a")), "data.jsonl:7")


def as_given(record, as_text):
    """Return the messages for transformers, the arguments of calls as objects or as JSON text."""
    messages = [message.for_template() for message in record.messages]
    for message in messages:
        # transformers 5.23 fills in the other name itself, older ones do not.
        if reasoning := message.get("reasoning_content") or message.get("thinking"):
            message |= {"thinking": reasoning, "reasoning_content": reasoning}
        if as_text and "tool_calls" in message:
            functions = [call["function"] for call in message["tool_calls"]]
            message["tool_calls"] = [
                {
                    "type": "function",
                    "function": {**f, "arguments": json.dumps(f["arguments"], ensure_ascii=False)},
                }
                for f in functions
            ]
    return messages


@pytest.mark.parametrize("name", TALKS)
def test_released_templates_render_as_in_transformers(name, tokenizer):
    trl = pytest.importorskip("trl")
    record = TALKS[name]
    tokenizer.bos_token = "<|endoftext|>"
    compared = 0
    for file in sorted((files(trl) / "chat_templates").iterdir(), key=str):
        text = file.read_text(encoding="utf-8") if file.name.endswith(".jinja") else ""
        if not text or "strftime_now" in text:
            continue
        for prompt in (False, True):
            options = {"tools": record.tools and list(record.tools), "add_generation_prompt": prompt}
            expected = None
            for as_text in (False, True):  # DeepSeek's template takes arguments as JSON text alone
                try:
                    expected = expected or tokenizer.apply_chat_template(
                        as_given(record, as_text), chat_template=text, tokenize=False, **options
                    )
                except Exception:  # the template refuses this conversation
                    continue
            try:
                rendered = ChatTemplate(tokenizer, text).render(record, len(record.messages), prompt=prompt)
            except InputError:
                rendered = None
            assert rendered == expected, file.name
            compared += rendered is not None
    assert compared > 40


GROW = "{% set ns = namespace(x='aa') %}{% for i in range(99) %}{% set ns.x = CODE %}{% endfor %}{{ ns.x }}"
NESTED = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
BAD = {
    "division": ("{{ 1 / 0 }}", "division by zero"),
    "a long range": ("{% for i in range(10**9) %}x{% endfor %}", "OverflowError: Range too big"),
    "recursion": ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "RecursionError"),
    "a long text": ("{{ 'a' * 10**12 }}", "characters for one conversation"),
    "a long list": ("{{ ([1] * 10**12) | length }}", "characters for one conversation"),
    "a surrogate": ("{{ '\\ud800' }}", "surrogates not allowed"),
    "a wide format": ("{{ '%1000000000d' | format(1) }}", "a width or count of more than"),
    "a wide format as an operator": ("{{ '%1000000000d' % 1 }}", "a width or count of more than"),
    "a width that is an argument": ("{{ '%*d' | format(1000000000, 1) }}", "a width or count of more than"),
    "a wide str.format": ("{{ '{:1000000000}'.format(1) }}", "a width or count of more than"),
    "a nested str.format": ("{{ '{:{w}}'.format(1, w=1000000000) }}", "a width or count of more than"),
    "ljust": ("{{ 'a'.ljust(10**10) }}", "a width or count of more than"),
    "zfill": ("{{ 'a'.zfill(10**10) }}", "a width or count of more than"),
    "expandtabs": ("{{ ('\t' * 1000000).expandtabs(1000000) }}", "characters for one conversation"),
    "center": ("{{ 'a' | center(10**10) }}", "a width or count of more than"),
    "indent": ("{{ 'a\nb' | indent(10**10) }}", "a width or count of more than"),
    "indented lines": ("{{ ('\n' * 100000) | indent(100000) }}", "characters for one conversation"),
    "indented JSON": ("{{ [1] | tojson(indent=10**10) }}", "a width or count of more than"),
    "batch": ("{{ [1] | batch(10**10, 'x') | list }}", "a width or count of more than"),
    "slice": ("{{ [1] | slice(10**10) | list }}", "a width or count of more than"),
    "round": ("{{ 1.5 | round(10**9, 'ceil') }}", "a width or count of more than"),
    "to_bytes": ("{{ (1).to_bytes(10**10, 'big') }}", "a width or count of more than"),
    "a long number": ("{{ 10**(10**10) }}", "a number of more than"),
    "a growing number": (GROW.replace("'aa'", "3").replace("CODE", "ns.x * ns.x"), "a number of more than"),
    "doubling by +": (GROW.replace("CODE", "ns.x + ns.x"), "characters for one conversation"),
    "doubling by ~": (GROW.replace("CODE", "ns.x ~ ns.x"), "characters for one conversation"),
    "doubling by join": (GROW.replace("CODE", "[ns.x, ns.x] | join"), "characters for one conversation"),
    "doubling by str.join": (
        GROW.replace("CODE", "''.join([ns.x, ns.x])"),
        "characters for one conversation",
    ),
    "doubling by replace": (
        GROW.replace("CODE", "ns.x | replace('a', 'aa')"),
        "characters for one conversation",
    ),
    "doubling by str.replace": (GROW.replace("CODE", "ns.x.replace('a', 'aa')"), "characters for one"),
    "doubling by a block": (
        "{% set ns = namespace(x='aa') %}{% for i in range(99) %}"
        "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
        "characters for one conversation",
    ),
    "nested lists": (GROW.replace("CODE", "[ns.x, ns.x]"), "a value of more than"),
    "nested lists as JSON": (
        GROW.replace("CODE", "[ns.x, ns.x]").replace("{{ ns.x", "{{ ns.x | tojson"),
        "of more than",
    ),
    "nested lists by ~": (
        GROW.replace("CODE", "[ns.x, ns.x]").replace("{{ ns.x", "{{ '' ~ ns.x"),
        "of more than",
    ),
    "nested lists by %": (
        GROW.replace("CODE", "[ns.x, ns.x]").replace("{{ ns.x", "{{ '%s' % [ns.x]"),
        "of more than",
    ),
    "nested dictionaries": (GROW.replace("CODE", "dict(a=ns.x, b=ns.x)"), "a value of more than"),
    "sums of lists": ("{{ [[1], [2]] | sum(start=[]) }}", "sums what are not numbers"),
    "nested loops": (NESTED, "CPU time"),
    "nested sums": ("{{ ([range(99999)] * 99999) | map('sum') | sum }}", "CPU time"),
    "much output": (
        "{% for i in range(9999) %}{{ messages[0].content * 9999 }}xx{% endfor %}",
        "characters for one",
    ),
    "an escape": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "changes a message": ("{{ dict.update(messages[0], {'content': 'x'}) }}", "update"),
    "random": ("{{ ['a', 'b'] | random }}", "No filter named 'random'"),
    "another file": ("{% include 'x' %}", "no loader"),
    "no Jinja": ("{% for %}", "Expected"),
    "many brackets": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", ""),
    "many loops": ("{% for i in [1] %}" * 50 + "{% endfor %}" * 50, "nested blocks"),
    "too long": ("{# " + "x" * 1_000_001 + " #}", "has more than 1,000,000 characters"),
}


@pytest.fixture
def short_time(monkeypatch):
    monkeypatch.setattr(template_limits, "CPU_SECONDS", 0.3)


@pytest.mark.parametrize("code, expected", BAD.values(), ids=list(BAD))
def test_a_template_that_fails_or_never_ends_is_refused_in_one_line(code, expected, tokenizer, short_time):
    with pytest.raises(InputError, match="^data.jsonl:7: the chat template failed: ") as error:
        ChatTemplate(tokenizer, code + CHATML).render(talk(), 2)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_limits_hold_in_a_thread_and_leave_other_threads_alone(tokenizer, short_time):
    endless, ordinary = ChatTemplate(tokenizer, NESTED), ChatTemplate(tokenizer, CHATML)
    failed = []

    def render():
        try:
            endless.render(talk(), 2)
        except InputError as error:
            failed.append(str(error))

    thread = threading.Thread(target=render)
    thread.start()
    assert ordinary.render(talk(), 2).endswith("a<|im_end|>\n")
    thread.join(60)
    assert len(failed) == 1


def test_a_large_record_has_larger_limits(tokenizer):
    text = "x" * 300_000
    loop = "{% for i in range(500) %}{% set ns.t = ns.t + messages[0].content[:999] %}{% endfor %}"
    code = "{% set ns = namespace(t='') %}" + loop
    assert ChatTemplate(tokenizer, code + "{{ ns.t }}").render(talk(text), 2) == "x" * 499_500
    with pytest.raises(InputError, match="characters for one"):
        ChatTemplate(tokenizer, code + "{{ ns.t }}").render(talk("x" * 999), 2)


PIECES = st.sampled_from(
    [
        *(
            "{{ ",
            " }}",
            "{% ",
            " %}",
            "for i in ",
            "range(9)",
            "range(99999)",
            "endfor",
            "if ",
            "endif",
            "set x = ",
        ),
        *(
            "messages",
            "messages[0]",
            "messages[-1].content",
            ".role",
            "[1:]",
            "| tojson",
            "| length",
            "| join(x)",
        ),
        *(
            "'a'",
            "'%9d'",
            "10**9",
            "* 9",
            "** 9",
            "+ x",
            "~ x",
            "/ 0",
            "% x",
            "[x, x]",
            "x",
            "none",
            "loop.last",
        ),
        *(
            "namespace(x=x)",
            "ns.x",
            "set ns = ",
            "| list",
            "| map('upper')",
            ".format(x)",
            ".split()",
            "generation",
        ),
        *(
            "endgeneration",
            "macro f(x)",
            "endmacro",
            "f(x)",
            "raise_exception(x)",
            "strftime_now(x)",
            " text ",
            "(",
        ),
        *(
            ")",
            "is string",
            "not ",
            "| replace('a', x)",
            "continue",
            "break",
            "else",
            "elif x",
            "filter upper",
        ),
    ]
)


@settings(max_examples=250, deadline=None)
@given(st.lists(PIECES, max_size=14).map("".join))
def test_any_template_gives_a_text_or_one_line(session_tokenizer, code):
    for template in (code, "{{ " + code + " }}", "{% for m in messages %}{{ " + code + " }}{% endfor %}"):
        try:
            said = ChatTemplate(session_tokenizer, template).render(talk(), 2) and ""
        except InputError as error:
            said = str(error)
        assert "\n" not in said


@pytest.fixture(scope="module")
def session_tokenizer(tokenizer_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_folder)
