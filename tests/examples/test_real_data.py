"""Real vocabularies and real data: the tokens are tiktoken's, and what is trained is what the assistant said.

Neither is part of the repository. The data are looked for in ``MEGATRON_ALIGN_DATA`` (default: ``shared/data``
beside the repository), ``qwen.tiktoken`` and ``tokenizer.model`` in ``MEGATRON_ALIGN_VOCABS`` (default:
``shared/vocabs``); docs/real_data.md tells where they come from.
"""

import importlib.util
import json
import math
import os
import random
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_align.config import ParallelConfig
from megatron_align.data.batching.collate import pack
from megatron_align.data.formats.files import read_file
from megatron_align.data.tokenize.record_tokenizer import RecordTokenizer
from megatron_align.data.tokenize.tokenizer import load_tokenizer
from megatron_align.records import Sample
from tests.harness import model_ranks, training_ranks
from tests.harness.tiny import metrics_of

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("MEGATRON_ALIGN_DATA", ROOT.parent / "shared" / "data"))
VOCABS = Path(os.environ.get("MEGATRON_ALIGN_VOCABS", ROOT.parent / "shared" / "vocabs"))
VOCAB = {"qwen2": VOCABS / "qwen.tiktoken", "llama3": VOCABS / "tokenizer.model"}
FILES = ("alpaca_en_demo.json", "alpaca_zh_demo.json", "glaive_toolcall_en_demo.json")
# The original patterns, written out: the example builds them from parts.
PATTERN = {
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}
SPECIAL = {
    "qwen2": {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645},
    "llama3": {
        "<|begin_of_text|>": 128000,
        "<|end_of_text|>": 128001,
        "<|finetune_right_pad_id|>": 128004,
        "<|start_header_id|>": 128006,
        "<|end_header_id|>": 128007,
        "<|eom_id|>": 128008,
        "<|eot_id|>": 128009,
        "<|python_tag|>": 128010,
        "<|reserved_special_token_247|>": 128255,
    },
}
ALPHABET = (
    "abcXYZ 0123456789 \t\n\r\n  '’.,;!?()[]{}<>|=+-_/\\\"#$%&*@éßñe\u0301 中文字符，。「」ひらカナ한국어русский"
    "עברית العربية हिन्दी\u00a0\u3000\u200b😀👨‍👩‍👧🇩🇪👍🏽ſK"
)
TEXTS = (
    "I'll say it's what they'd've done, isn't it? WE'LL SEE: 3.14159, 1,234,567.",
    "今天天气很好，我们一起去公园散步；然后在湖边喝茶（三杯）。二〇二四年12月31日",
    "🙂👍🏽 👨‍👩‍👧‍👦 🇨🇳 ❤️ ok…",
    "def f(x):\n\tif x:\n        return {'a': [1, 22, 333, 4444]}  # ok\n\n\n",
    "   leading, trailing   \n\n \n\t\t x\u3000y\u00a0z \r\n\r\n",
    "cafe\u0301 Å Ångström",
    "<|im_start|> is no text, nor <|eot_id|> here",
    "",
)


def example():
    """Load the example, which is a script and in no package."""
    path = ROOT / "examples" / "real_data" / "make_model.py"
    spec = importlib.util.spec_from_file_location("real_data_make_model", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


def require(path: Path) -> Path:
    if not path.is_file():
        pytest.skip(f"{path} is absent: see docs/real_data.md")
    return path


@pytest.fixture(scope="module", params=["qwen2", "llama3"])
def family(request):
    require(VOCAB[request.param])
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    path = tmp_path_factory.mktemp("real_data") / family
    example().make_model(family, str(VOCAB[family]), str(path))
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    """The tokenizer as training loads it, from the written folder."""
    return load_tokenizer(str(folder))


@pytest.fixture(scope="module")
def original(family):
    tiktoken = pytest.importorskip("tiktoken")
    from tiktoken.load import load_tiktoken_bpe

    ranks_of = load_tiktoken_bpe(str(VOCAB[family]))
    return tiktoken.Encoding(family, pat_str=PATTERN[family], mergeable_ranks=ranks_of, special_tokens={})


def strings(value):
    """Yield every string of a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings(part)


def assert_same_tokens(texts, family, tokenizer, original):
    form = "NFC" if family == "qwen2" else None  # Qwen normalises before it splits
    texts = [unicodedata.normalize(form, text) if form else text for text in texts]
    ours = tokenizer(texts, add_special_tokens=False)["input_ids"]
    for text, ids in zip(texts, ours, strict=True):
        assert ids == original.encode(text, disallowed_special=()), repr(text)
        assert tokenizer.decode(ids) == text


def test_sizes_and_special_tokens(family, folder, tokenizer, original):
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    assert original.n_vocab == {"qwen2": 151643, "llama3": 128000}[family]
    assert len(tokenizer) == {"qwen2": 151646, "llama3": 128256}[family]
    assert rows == {"qwen2": 151936, "llama3": 128256}[family]
    for token, number in SPECIAL[family].items():
        assert tokenizer.encode(token, add_special_tokens=False) == [number]
    assert tokenizer("hi")["input_ids"][:-1] == ([128000] if family == "llama3" else [])


def test_tokens_equal_tiktoken_on_chosen_text(family, tokenizer, original):
    texts = [text for text in TEXTS if "<|" not in text]
    texts += [
        run * n for run in (" ", "\n", "\t", "a", "9", "!", "中", " \n") for n in (1, 2, 3, 4, 7, 64, 300)
    ]
    texts += [" " * n + "x" for n in range(1, 20)]
    assert_same_tokens(texts, family, tokenizer, original)


def test_tokens_equal_tiktoken_on_random_text(family, tokenizer, original):
    draw = random.Random(0)
    texts = ["".join(draw.choices(ALPHABET, k=draw.randint(1, 60))) for _ in range(3000)]
    assert_same_tokens(texts, family, tokenizer, original)


@pytest.mark.parametrize("file", FILES)
def test_tokens_equal_tiktoken_on_real_text(file, family, tokenizer, original):
    records = json.loads(require(DATA / file).read_text(encoding="utf-8"))
    assert_same_tokens(list(strings(records)), family, tokenizer, original)


def said(record):
    """Return what the assistant says in a raw record, turn by turn: text, or a tool call as an object."""
    if "output" in record:
        return [record["output"]]
    turns = [turn for turn in record["conversations"] if turn["from"] in ("gpt", "function_call")]
    return [json.loads(t["value"]) if t["from"] == "function_call" else t["value"] for t in turns]


def heard(stretch, family):
    """Undo a family's way to write a turn of the assistant."""
    end = {"qwen2": "<|im_end|>\n", "llama3": "<|eot_id|>"}[family]
    assert stretch.endswith(end)
    text = stretch.removesuffix(end)
    if family == "qwen2" and text.startswith("<tool_call>\n"):
        return json.loads(text.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>"))
    if family == "llama3" and text.startswith('{"name": '):
        call = json.loads(text)
        return {"name": call["name"], "arguments": call["parameters"]}
    return text


def plain(turn, family):
    """Return a turn as the family's template and normaliser leave it."""
    if isinstance(turn, dict):
        arguments = turn["arguments"]
        return {**turn, "arguments": json.loads(arguments) if isinstance(arguments, str) else arguments}
    return unicodedata.normalize("NFC", turn) if family == "qwen2" else turn.strip()


@pytest.mark.parametrize("file", FILES)
def test_trained_text_is_what_the_assistant_said(file, family, tokenizer):
    records = json.loads(require(DATA / file).read_text(encoding="utf-8"))
    template = RecordTokenizer(tokenizer)
    conversations = list(read_file(str(DATA / file))[1])
    assert len(conversations) == len(records) > 0
    turns = 0
    for record, conversation in zip(records, conversations, strict=True):
        sample = template.sample(conversation)
        assert sample.scored_L.any()
        edges = np.flatnonzero(np.diff(np.concatenate([[0], sample.scored_L.astype(int), [0]]))).reshape(
            -1, 2
        )
        trained = [heard(tokenizer.decode(sample.tokens_L[a:b]), family) for a, b in edges]
        assert trained == [plain(turn, family) for turn in said(record)], conversation.where
        turns += len(trained)
    assert turns >= len(records)
    if "glaive" in file:
        assert turns > 2 * len(records)  # multi-turn, with calls


@pytest.mark.slow
def test_training_agrees_over_layouts_and_reloads_in_transformers(family, folder, pool, tmp_path):
    files = [str(require(DATA / file)) for file in FILES]
    losses, norms = {}, {}
    for layout in ("tensor", "pipeline"):
        run = tmp_path / layout
        arguments = ["--config", str(ROOT / "examples" / "real_data" / "sft.yaml"), "--train.steps", "4"]
        arguments += ["--model.path", str(folder), "--data.train", json.dumps(files)]
        arguments += ["--data.cache", str(tmp_path / "tokens"), "--checkpoint.dir", str(run)]
        pool.run(2, training_ranks.train, [*arguments, f"--parallel.{layout}", "2"], timeout=600)
        rows = metrics_of(run)
        losses[layout] = [row["loss"] for row in rows]
        norms[layout] = [row["grad_norm"] for row in rows]
    assert losses["pipeline"] == pytest.approx(losses["tensor"], rel=1e-5)
    assert norms["pipeline"] == pytest.approx(norms["tensor"], rel=1e-5)
    assert losses["tensor"][-1] < losses["tensor"][0]

    trained = tmp_path / "tensor" / "hf"
    model, report = AutoModelForCausalLM.from_pretrained(
        trained, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    ids = load_tokenizer(str(trained))("".join(TEXTS), return_tensors="pt")["input_ids"]
    text = Sample(ids[0].numpy(), np.zeros(ids.shape[1], bool))
    batch = pack([text], [0.0], ids.shape[1])
    [ours] = pool.run(1, model_ranks.logits, trained, ParallelConfig(), batch)
    with torch.no_grad():
        torch.testing.assert_close(ours, model(ids).logits[0], atol=1e-4, rtol=0)


PREFERENCES = {  # file, what the first step must cost
    "dpo": ("dpo_en_demo.json", math.log(2)),
    "kto": ("kto_en_demo.json", 0.5),
    "reward": ("hh_rlhf_harmless_test.jsonl.gz", None),
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", PREFERENCES)
def test_preferences_are_learnt(stage, pool, tmp_path):
    """Twenty steps of the recipe: the loss falls, the margin grows, from where the objective must start."""
    file, first = PREFERENCES[stage]
    example().make_model("qwen2", str(require(VOCAB["qwen2"])), str(tmp_path / "model"))
    run = tmp_path / "run"
    arguments = ["--config", str(ROOT / "examples" / "real_data" / f"{stage}.yaml")]
    arguments += ["--model.path", str(tmp_path / "model"), "--data.train", str(require(DATA / file))]
    arguments += ["--checkpoint.dir", str(run), "--parallel.tensor", "2"]
    pool.run(2, training_ranks.train, arguments, timeout=900)
    rows = metrics_of(run)
    if first is not None:
        assert rows[0]["loss"] == pytest.approx(first, abs=1e-5)
        assert rows[0]["reward_margin"] == pytest.approx(0, abs=1e-5)
    late = rows[-8:]  # single steps are noisy: 16 samples each
    assert np.mean([row["loss"] for row in late]) < rows[0]["loss"]
    assert np.mean([row["reward_margin"] for row in late]) > max(0.0, rows[0]["reward_margin"])
    if stage == "reward":
        assert 0.5 < np.mean([row["accuracy"] for row in late]) < 0.9
