"""What a chat template drops is refused by name, left out by name, or trained; nothing vanishes without a word."""

import json
from dataclasses import replace
from datetime import datetime
from importlib.resources import files
from types import SimpleNamespace

import pytest
from tokenizers import processors

from megatron_align.data.store import TokenStore
from megatron_align.data.tokenize import cache_key
from megatron_align.data.tokenize.local_ranks import prepare_or_wait
from megatron_align.data.tokenize.prepare import prepare
from megatron_align.data.tokenize.record_tokenizer import RecordTokenizer
from megatron_align.data.tokenize.turn_options import TurnOptions
from megatron_align.data.tokenize.turn_prefixes import TurnPrefixes
from megatron_align.errors import InputError
from megatron_align.records import Completion, Conversation, Message, Preference
from tests.data.tokenize.test_record_tokenizer import TWO_TURNS, judged, trained

LAST = TurnOptions(last_only=True)


@pytest.fixture
def qwen3():
    trl = pytest.importorskip("trl")
    return (files(trl) / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")


def talk(*turns, **more):
    return Conversation(turns, "data.jsonl:7", **more)


def user(text="q", **extra):
    return Message("user", text, extra)


def answer(text="a", train=True, **extra):
    return Message("assistant", text, extra, train)


DROPPED = {
    "reasoning_content": (
        talk(user(), answer(reasoning_content="r")),
        r"reasoning_content \(messages\[1\]\)",
    ),
    "thinking": (talk(user(), answer(thinking="r")), r"thinking \(messages\[1\]\)"),
    "name": (talk(user(name="Ann"), answer()), r"name \(messages\[0\]\)"),
    "any other": (talk(user(), answer(citations=[1])), r"citations \(messages\[1\]\)"),
    "a later turn": (talk(user(), answer(), user(), answer(audio={"id": 1})), r"audio \(messages\[3\]\)"),
    "tools": (talk(user(), answer(), tools=({"name": "f"},)), "tools"),
    "of a completion": (judged((answer(thinking="r"),), (answer("b"),)), r"thinking \(messages\[1\]\)"),
}


@pytest.mark.parametrize("record, named", DROPPED.values(), ids=list(DROPPED))
def test_a_field_that_the_template_drops_is_refused_or_left_out(record, named, tokenizer):
    with pytest.raises(InputError, match=f"must write the record's {named}, .*data.drop_fields") as error:
        RecordTokenizer(tokenizer).sample(record)
    name = str(error.value).split("the record's ")[1].split()[0].rstrip(",")
    sample = RecordTokenizer(tokenizer, options=TurnOptions(drop_fields=(name,))).sample(record)
    plain = replace(record, tools=None)
    if isinstance(record, Conversation):
        turns = tuple(replace(turn, extra={}) for turn in record.messages)
        plain = replace(plain, messages=turns)
    else:
        plain = judged((answer(),), (answer("b"),))
    assert sample.tokens_L.tolist() == RecordTokenizer(tokenizer).sample(plain).tokens_L.tolist()


def test_empty_fields_and_links_of_tool_answers_are_no_loss(tokenizer):
    tool = Message("tool", "3", {"tool_call_id": "call_1", "name": "f"})
    RecordTokenizer(tokenizer).sample(talk(user(), answer(annotations=[], refusal=None), tool, answer("b")))


def test_reasoning_is_trained_where_the_template_writes_it(tokenizer, qwen3):
    for name in ("reasoning_content", "thinking"):
        sample = RecordTokenizer(tokenizer, qwen3).sample(talk(user(), answer(**{name: "because"})))
        assert trained(tokenizer, sample) == ["<think>\nbecause\n</think>\n\na<|im_end|>\n"]
    alone = RecordTokenizer(tokenizer, qwen3).sample(talk(user(), answer("", reasoning_content="because")))
    assert trained(tokenizer, alone) == ["<think>\nbecause\n</think>\n\n<|im_end|>\n"]
    options = TurnOptions(drop_fields=("reasoning_content",))
    with pytest.raises(
        InputError, match="must have more than what data.drop_fields leaves out, got only reasoning"
    ):
        RecordTokenizer(tokenizer, qwen3, options).sample(
            talk(user(), answer("", reasoning_content="because"))
        )


def test_a_template_that_rewrites_history_trains_the_last_turns(tokenizer, qwen3):
    record = talk(
        user("one"), answer("ONE", reasoning_content="r1"), user("two"), answer("TWO", reasoning_content="r2")
    )
    with pytest.raises(
        InputError, match=r"messages\[1\].*; set data.train_turns to last, use a chat template"
    ):
        RecordTokenizer(tokenizer, qwen3).sample(
            replace(record, messages=(user("one"), answer("ONE"), *TWO_TURNS.messages[2:]))
        )
    sample = RecordTokenizer(tokenizer, qwen3, LAST).sample(record)
    assert trained(tokenizer, sample) == ["<think>\nr2\n</think>\n\nTWO<|im_end|>\n"]
    assert "r1" not in tokenizer.decode(sample.tokens_L)


def test_last_turns_are_those_after_the_last_question_with_an_answer(tokenizer, marked_template):
    record = talk(user(), answer("one"), user(), answer("two"), answer("three"), user("bye"))
    for template, end in ((None, "<|im_end|>\n"), (marked_template, "<|im_end|>")):
        sample = RecordTokenizer(tokenizer, template, LAST).sample(record)
        assert trained(tokenizer, sample) == ["two" + end, "three" + end]


def test_last_turns_are_of_conversations_only(make):
    pairs = [{"prompt": "q", "chosen": "a", "rejected": "b"}]
    with pytest.raises(InputError, match="data.train_turns: last is for conversations, got pair data"):
        prepare(make(pairs, train_turns="last"))


# Special tokens.
def test_plain_text_has_one_bos_and_says_so(tokenizer, caplog):
    bos = "<|endoftext|>"
    core = tokenizer.backend_tokenizer
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A <|im_end|>", special_tokens=[(t, core.token_to_id(t)) for t in (bos, "<|im_end|>")]
    )
    texts = RecordTokenizer(tokenizer)
    for prompt in ("hello", bos + "hello"):
        assert tokenizer.decode(texts.sample(Completion(prompt, " world", "d:1")).tokens_L) == (
            "<|endoftext|>hello world<|im_end|>"
        )
        pair = Preference(kind="pair", prompt=prompt, completions=(" world", " cat"), where="d:1")
        assert tokenizer.decode(texts.sample(pair).tokens_L) == (
            "<|endoftext|>hello world<|im_end|> cat<|im_end|>"
        )
    assert [r.getMessage().split(",")[0] for r in caplog.records] == [
        "d:1: the text begins with <|endoftext|>"
    ]


def test_an_eos_inside_a_completion_is_warned_of(tokenizer, caplog):
    RecordTokenizer(tokenizer).sample(Completion("q", " a<|im_end|>\n", "d:1"))
    assert "the completion has <|im_end|> before its end" in caplog.text


def test_a_template_of_another_tokenizer_is_warned_of(tokenizer, caplog):
    trl = pytest.importorskip("trl")
    tokenizer.bos_token = "<|endoftext|>"
    llama = (files(trl) / "chat_templates" / "llama3.jinja").read_text(encoding="utf-8")
    RecordTokenizer(tokenizer, llama).sample(talk(user(), answer()))
    assert "the chat template writes <|start_header_id|>, <|end_header_id|>, <|eot_id|>, which" in caplog.text
    caplog.clear()
    RecordTokenizer(tokenizer).sample(talk(user("say <|eot_id|>"), answer("<|eot_id|>")))
    assert not caplog.records


def test_warnings_are_logged_at_every_start(make, caplog):
    spec = make([{"prompt": "q", "completion": " a<|im_end|>\n"}])
    for _ in range(2):
        caplog.clear()
        path = prepare(spec)
        assert "the completion has <|im_end|> before its end" in caplog.text
    assert len(TokenStore(path).manifest["warnings"]) == 1


# The clock.
DATED = (
    "{{ strftime_now('%d %b %Y') }}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]


def test_the_key_sees_what_the_template_reads_from_the_clock(make, tmp_path, tokenizer, monkeypatch):
    file = tmp_path / "dated.jinja"
    file.write_text(DATED)
    spec = make(CHAT, chat_template=str(file))
    stores = {}
    for day in ("2024-07-26", "2024-07-27", "2024-07-26"):
        monkeypatch.setattr(
            cache_key, "datetime", SimpleNamespace(now=lambda day=day: datetime.fromisoformat(day))
        )
        stores.setdefault(prepare(spec), day)
    assert sorted(stores.values()) == ["2024-07-26", "2024-07-27"]
    for path, day in stores.items():
        start = tokenizer.decode(TokenStore(path).sample(0).tokens_L)
        assert start.startswith(datetime.fromisoformat(day).strftime("%d %b %Y"))
    assert prepare(replace(spec, template_date="2024-07-27")) in stores
    with pytest.raises(InputError, match="data.template_date must be a date such as 2024-07-26"):
        prepare(replace(spec, template_date="yesterday"))


def test_the_tokenizers_own_template_is_read_too(make, tokenizer_folder, tmp_path):
    spec = make(CHAT)
    assert "clock" not in spec.inputs()
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps({"chat_template": DATED}))
    dated = replace(spec, tokenizer=str(tmp_path / "t"), template_date="2024-07-26")
    assert dated.inputs()["clock"] == {"%d %b %Y": "26 Jul 2024"}


def test_ranks_that_read_the_clock_need_one_date(make, tmp_path):
    """Training and evaluation fix one for all ranks, so that none looks for another store."""
    file = tmp_path / "dated.jinja"
    file.write_text(DATED.replace("%d %b %Y", "%H:%M"))
    spec = make(CHAT, chat_template=str(file))
    with pytest.raises(AssertionError, match="at different times"):
        prepare_or_wait(spec, 0)
    dated = replace(spec, template_date="2024-07-26")
    assert prepare_or_wait(dated, 0) == prepare_or_wait(dated, 1)


# Long conversations.
@pytest.mark.parametrize("name", ["qwen2_5", "llama3", "qwen3", "gemma", "phi3", "deepseekv3", "glm4moe"])
def test_long_conversations_have_the_tokens_of_short_ways(name, tokenizer, monkeypatch):
    trl = pytest.importorskip("trl")
    text = (files(trl) / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer.bos_token = "<|endoftext|>"
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    turns = [
        turn
        for i in range(9)
        for turn in (user(f"q{i}"), answer(f"\n{i}" if i % 3 else f"a{i}", train=i != 4))
    ]
    plain = talk(Message("system", "be"), *turns)
    called = talk(*turns[:5], answer("", tool_calls=[call]), Message("tool", "3"), *turns[5:])
    for record in (plain, called):
        results = []
        for few in (3, 1000):
            monkeypatch.setattr("megatron_align.data.tokenize.turn_prefixes.FEW", few)
            try:
                sample = RecordTokenizer(tokenizer, text).sample(record)
                results.append((sample.tokens_L.tolist(), sample.scored_L.tolist()))
            except InputError as error:
                results.append(str(error))
        assert results[0] == results[1]


def test_a_long_conversation_is_rendered_a_few_times(tokenizer, monkeypatch):
    rendered = []
    original = TurnPrefixes.rendered
    monkeypatch.setattr(TurnPrefixes, "rendered", lambda *args: rendered.append(args) or original(*args))
    turns = [turn for i in range(100) for turn in (user(f"q{i}"), answer(f"a{i}"))]
    sample = RecordTokenizer(tokenizer).sample(talk(*turns))
    assert trained(tokenizer, sample) == [f"a{i}<|im_end|>\n" for i in range(100)]
    assert len(rendered) == 2
