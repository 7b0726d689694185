"""The tokens that end trained turns are the single tokens that the template writes after an answer or a call."""

from importlib.resources import files

import pytest
from tokenizers import AddedToken

from megatron_align.data.tokenize.turn_ends import turn_end_token_ids

ALWAYS = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}"
    "{{- '<|im_start|>assistant\n' }}"
)
LAST = (
    "{%- for m in messages %}{{- m.role + ': ' + m.content }}"
    "{%- if loop.last and m.role == 'assistant' %}{{- eos_token }}{%- endif %}{{- '\n' }}{%- endfor %}"
)
CALLS = (
    "{%- for m in messages %}{{- m.role + ': ' + m.content }}"
    "{%- if m.tool_calls %}{{- '<tool>' + (m.tool_calls | tojson) + '</tool><|eom_id|>' }}"
    "{%- else %}{{- '<|im_end|>' }}{%- endif %}{%- endfor %}"
)
TEMPLATES = {
    "ChatML": (None, ["<|im_end|>"]),
    "always asks for an answer": (ALWAYS, ["<|im_end|>"]),
    "only after the last turn": (LAST, ["<|im_end|>"]),
    "calls end otherwise": (CALLS, ["<|im_end|>", "<|eom_id|>"]),
    "none": ("{%- for m in messages %}{{- m.role + ': ' + m.content + '\n' }}{%- endfor %}", []),
    "of another tokenizer": ("{%- for m in messages %}{{- m.content + '<|eot_id|>' }}{%- endfor %}", []),
    "refuses everything": ("{{ raise_exception('no') }}", []),
}


@pytest.mark.parametrize("template, expected", TEMPLATES.values(), ids=list(TEMPLATES))
def test_the_tokens_that_end_a_turn(template, expected, tokenizer):
    tokenizer.add_tokens([AddedToken(t, special=True) for t in ("<tool>", "</tool>", "<|eom_id|>")])
    assert turn_end_token_ids(tokenizer, template) == tokenizer.convert_tokens_to_ids(expected)


def test_no_template_ends_no_turn(tokenizer):
    tokenizer.chat_template = None
    assert turn_end_token_ids(tokenizer) == []


@pytest.mark.parametrize(
    "name, expected",
    [("llama3_1", ["<|eot_id|>"]), ("qwen3", ["<|im_end|>"]), ("deepseekv3", ["<｜end▁of▁sentence｜>"])],
)
def test_templates_of_released_models(name, expected, tokenizer):
    trl = pytest.importorskip("trl")
    template = (files(trl) / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    tags = ("<tool_call>", "</tool_call>", "<think>", "</think>")
    tokenizer.add_tokens([AddedToken(t, special=True) for t in (*expected, "<|eom_id|>", *tags)])
    assert turn_end_token_ids(tokenizer, template)[:1] == tokenizer.convert_tokens_to_ids(expected)
