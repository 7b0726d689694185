"""Tokens and trained tokens equal those of TRL's SFTTrainer, wherever TRL defines the answer."""

import copy
import json
from importlib.resources import files

import pytest

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

from tokenizers import processors
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_align.data.sources import read_conversations
from megatron_align.data.prepare import prepare
from megatron_align.data.spec import StoreSpec
from megatron_align.data.store import TokenStore
from megatron_align.data.templates import Template

QWEN25 = (files("trl") / "chat_templates" / "qwen2_5.jinja").read_text()
QWEN25_MARKED = (files("trl") / "chat_templates" / "qwen2_5_training.jinja").read_text()
LLAMA3 = (files("trl") / "chat_templates" / "llama3.jinja").read_text()
NO_PREFIX = (  # the generation prompt is not how an answer starts
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: think' }}{% endif %}"
)

USER, ANSWER = {"role": "user", "content": "the cat?"}, {"role": "assistant", "content": "hello world"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
PAIRS = [
    {"prompt": [USER], "completion": [ANSWER]},
    {"prompt": [{"role": "system", "content": "s"}, USER], "completion": [ANSWER]},
    {"prompt": [USER, ANSWER, USER], "completion": [{"role": "assistant", "content": "\n\nhi"}]},
    {"prompt": [USER], "completion": [ANSWER, USER, ANSWER]},
]
TALKS = [
    {"messages": [USER, ANSWER]},
    {
        "messages": [
            {"role": "system", "content": "s"},
            USER,
            ANSWER,
            USER,
            {"role": "assistant", "content": "\nx"},
        ]
    },
    {"messages": [USER, ANSWER, ANSWER, USER]},
]
TOOL_TALKS = [
    {
        "messages": [
            USER,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "{}"},
            ANSWER,
        ],
        "tools": json.dumps([TOOL]),
    }
]
TOOL_PAIRS = [
    {"prompt": talk["messages"][:3], "completion": talk["messages"][3:], "tools": talk["tools"]}
    for talk in TOOL_TALKS
]
TEXTS = [
    {"prompt": "hello", "completion": " world"},
    {"prompt": "hello\n", "completion": "\nthe cat"},
    {"prompt": "the c", "completion": "at<|im_end|>"},
    {"prompt": "", "completion": "hello world"},
    {"prompt": "好", "completion": "的🙂"},
]


def of_trl(records, tokenizer, tmp_path, **options):
    """Return ``(ids, trained)`` per record, as TRL prepares them; the first token is never a target."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        report_to="none",
        use_cpu=True,
        bf16=False,
        **{"max_length": None, "shuffle_dataset": False, **options},
    )
    trainer = trl.SFTTrainer(
        LlamaForCausalLM(config),
        arguments,
        train_dataset=datasets.Dataset.from_list(copy.deepcopy(records)),
        processing_class=copy.deepcopy(tokenizer),
    )
    rows = trainer.train_dataset
    return [(r["input_ids"], [False] + [label != -100 for label in r["labels"][1:]]) for r in rows]


def of_ours(path, tokenizer):
    samples = map(Template(tokenizer).sample, read_conversations(path))
    return [(s.tokens_L.tolist(), s.scored_L.tolist()) for s in samples]


@pytest.mark.parametrize(
    "template, records",
    [
        (None, PAIRS),
        (QWEN25, PAIRS),
        (QWEN25, TOOL_PAIRS),
        (QWEN25_MARKED, PAIRS),
        (LLAMA3, PAIRS),
        (NO_PREFIX, PAIRS),
    ],
    ids=["qwen2", "qwen2.5", "qwen2.5 tools", "qwen2.5 marked", "llama3", "no prefix"],
)
def test_prompt_and_completion_messages(template, records, tokenizer, jsonl, tmp_path):
    tokenizer.chat_template = template or tokenizer.chat_template
    tokenizer.bos_token = "<|endoftext|>"  # Llama-3's template needs one
    assert of_ours(jsonl(records), tokenizer) == of_trl(records, tokenizer, tmp_path)


@pytest.mark.parametrize("bos", [False, True])
def test_prompt_and_completion_text(bos, tokenizer, jsonl, tmp_path):
    if bos:
        token = ("<|endoftext|>", tokenizer.convert_tokens_to_ids("<|endoftext|>"))
        core = tokenizer.backend_tokenizer
        core.post_processor = processors.TemplateProcessing(single=f"{token[0]} $A", special_tokens=[token])
    ours = of_ours(jsonl(TEXTS), tokenizer)
    assert ours == of_trl(TEXTS, tokenizer, tmp_path)
    assert all((ids[0] == tokenizer.convert_tokens_to_ids("<|endoftext|>")) == bos for ids, _ in ours)


@pytest.mark.parametrize("records", [TALKS, TOOL_TALKS], ids=["plain", "tools"])
def test_marked_conversations(records, tokenizer, jsonl, tmp_path):
    tokenizer.chat_template = QWEN25_MARKED
    ours = of_ours(jsonl(records), tokenizer)
    assert ours == of_trl(records, tokenizer, tmp_path, assistant_only_loss=True)


@pytest.mark.parametrize("template", [None, QWEN25, LLAMA3], ids=["qwen2", "qwen2.5", "llama3"])
def test_conversations_without_marks_have_the_same_tokens(template, tokenizer, jsonl, tmp_path):
    tokenizer.chat_template = template or tokenizer.chat_template
    tokenizer.bos_token = "<|endoftext|>"  # Llama-3's template needs one
    ours = [ids for ids, _ in of_ours(jsonl(TALKS), tokenizer)]
    assert ours == [ids for ids, _ in of_trl(TALKS, tokenizer, tmp_path)]


@pytest.mark.parametrize("limit", [20, 28, 42])
def test_truncation_keeps_the_start_and_drops_what_has_no_target_left(
    limit, tokenizer_folder, tokenizer, jsonl, tmp_path
):
    spec = StoreSpec(
        sources=(jsonl(PAIRS),),
        tokenizer=tokenizer_folder,
        sequence_length=limit,
        too_long="truncate",
        cache=str(tmp_path / "cache"),
    )
    theirs = of_trl(PAIRS, tokenizer, tmp_path, max_length=limit)
    assert theirs
    store = TokenStore(prepare(spec))
    ours = [(s.tokens_L.tolist(), s.scored_L.tolist()) for s in map(store.sample, range(len(store)))]
    assert ours == theirs
    assert store.manifest["dropped"] == len(PAIRS) - len(theirs)
