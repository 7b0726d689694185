"""Tokens and trained tokens equal those of TRL's trainers (SFT, DPO, KTO, reward), wherever TRL defines the answer."""

import copy
import json
from importlib.resources import files
from types import SimpleNamespace

import pytest

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

from tokenizers import processors
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_align.data.store import TokenStore
from megatron_align.data.tokenize.cache_key import StoreSpec
from megatron_align.data.tokenize.prepare import prepare
from megatron_align.data.tokenize.record_tokenizer import RecordTokenizer
from tests.data.reading import read_records

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
    samples = map(RecordTokenizer(tokenizer).sample, read_records(path))
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


# Preferences: the trainers' own preparation of the data set, without a model.
BAD_ANSWER = {"role": "assistant", "content": "no cat"}
DPO_MESSAGES = [
    {"prompt": [USER], "chosen": [ANSWER], "rejected": [BAD_ANSWER]},
    {
        "prompt": [{"role": "system", "content": "s"}, USER, ANSWER, USER],
        "chosen": [{"role": "assistant", "content": "\n\nhi"}],
        "rejected": [BAD_ANSWER],
    },
    {"prompt": [USER], "chosen": [ANSWER, USER, ANSWER], "rejected": [BAD_ANSWER]},
]
DPO_IMPLICIT = [
    {name: pair["prompt"] + pair[name] for name in ("chosen", "rejected")} for pair in DPO_MESSAGES
] + [{"chosen": [USER, ANSWER, USER, ANSWER], "rejected": [USER, BAD_ANSWER, USER, ANSWER]}]
DPO_TOOLS = [
    {"prompt": pair["prompt"], "chosen": pair["completion"], "rejected": [BAD_ANSWER], "tools": pair["tools"]}
    for pair in TOOL_PAIRS
]
DPO_TEXTS = [
    {"prompt": "hello", "chosen": " world", "rejected": " cat"},
    {"prompt": "hello\n", "chosen": "\nthe cat", "rejected": "the cat"},  # diverges for one of them
    {"prompt": "the c", "chosen": "at<|im_end|>", "rejected": "ow"},
    {"prompt": "好", "chosen": "的🙂", "rejected": "的"},
]
TRAINERS = {
    "dpo": (trl.DPOTrainer, trl.DPOConfig),
    "kto": (trl.KTOTrainer, trl.KTOConfig),
    "reward": (trl.RewardTrainer, trl.RewardConfig),
}


def prepared(trainer, records, tokenizer, tmp_path):
    """Return the rows that a trainer of TRL makes of the records."""
    kind, config = TRAINERS[trainer]
    arguments = config(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, max_length=None)
    rows = datasets.Dataset.from_list(copy.deepcopy(records))
    stub = SimpleNamespace(_tokenizer=tokenizer, calculate_KL=False)
    return kind._prepare_dataset(stub, rows, tokenizer, arguments, "train").to_list()


def parts_of_ours(path, tokenizer):
    """Return ``[prompt, completion, ...]`` ids per record; all of a completion is scored, none of the prompt."""
    parts = []
    for sample in map(RecordTokenizer(tokenizer).sample, read_records(path)):
        lengths = [sample.prompt_length, *sample.completion_lengths]
        assert sum(lengths) == len(sample.tokens_L)
        assert sample.scored_L.tolist() == [t >= sample.prompt_length for t in range(len(sample.tokens_L))]
        ids = iter(sample.tokens_L.tolist())
        parts.append([[next(ids) for _ in range(length)] for length in lengths])
    return parts


def with_bos(tokenizer):
    token = ("<|endoftext|>", tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    processor = processors.TemplateProcessing(single=f"{token[0]} $A", special_tokens=[token])
    tokenizer.backend_tokenizer.post_processor = processor


PREFERENCES = {
    "qwen2": (None, DPO_MESSAGES),
    "qwen2 implicit": (None, DPO_IMPLICIT),
    "qwen2.5 marked": (QWEN25_MARKED, DPO_MESSAGES),
    "qwen2.5 tools": (QWEN25, DPO_TOOLS),
    "llama3 implicit": (LLAMA3, DPO_IMPLICIT),
    "no prefix": (NO_PREFIX, DPO_MESSAGES),
    "text": (None, DPO_TEXTS),
    "text with bos": ("bos", DPO_TEXTS),
}


@pytest.fixture(params=PREFERENCES.values(), ids=list(PREFERENCES))
def preferences(request, tokenizer):
    template, records = request.param
    tokenizer.bos_token = "<|endoftext|>"  # Llama-3's template needs one
    if template == "bos":
        with_bos(tokenizer)
    elif template:
        tokenizer.chat_template = template
    return records


def test_pairs(preferences, tokenizer, jsonl, tmp_path):
    ours = parts_of_ours(jsonl(preferences), tokenizer)
    rows = prepared("dpo", preferences, tokenizer, tmp_path)
    assert ours == [[row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]] for row in rows]


def test_pairs_for_a_reward(preferences, tokenizer, jsonl, tmp_path):
    ours = parts_of_ours(jsonl(preferences), tokenizer)
    rows = prepared("reward", preferences, tokenizer, tmp_path)
    whole = [[prompt + chosen, prompt + rejected] for prompt, chosen, rejected in ours]
    assert whole == [[row["chosen_ids"], row["rejected_ids"]] for row in rows]


@pytest.mark.parametrize("pairs", [DPO_MESSAGES, DPO_TEXTS], ids=["messages", "text"])
def test_ranked_lists_are_as_pairs_to_a_reward(pairs, tokenizer, jsonl, tmp_path):
    ranked = [
        {
            "prompt": pair["prompt"],
            "completions": [
                {"content": pair[name], "score": i} for i, name in enumerate(("chosen", "rejected"))
            ],
        }
        for pair in pairs
    ]
    ours = parts_of_ours(jsonl(ranked), tokenizer)
    rows = prepared("reward", pairs, tokenizer, tmp_path)
    whole = [[prompt + completion for completion in completions] for prompt, *completions in ours]
    assert whole == [[row["chosen_ids"], row["rejected_ids"]] for row in rows]


@pytest.mark.parametrize(
    "template, pairs",
    [(None, DPO_MESSAGES), (NO_PREFIX, DPO_MESSAGES), (None, DPO_TEXTS)],
    ids=["messages", "no prefix", "text"],
)
def test_unpaired(template, pairs, tokenizer, jsonl, tmp_path):
    tokenizer.chat_template = template or tokenizer.chat_template
    records = [
        {"prompt": pair["prompt"], "completion": pair[name], "label": name == "chosen"}
        for pair in pairs
        for name in ("chosen", "rejected")
    ]
    path = jsonl(records)
    rows = prepared("kto", records, tokenizer, tmp_path)
    assert parts_of_ours(path, tokenizer) == [[row["prompt_ids"], row["completion_ids"]] for row in rows]
    samples = map(RecordTokenizer(tokenizer).sample, read_records(path))
    assert [sample.label for sample in samples] == [row["label"] for row in rows]
