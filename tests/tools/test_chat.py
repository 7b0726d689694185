"""A chat shows exactly the answer that generate gives to its messages, piece by piece, and obeys its commands."""

import io
import json

import pytest

from megatron_align.errors import InputError
from megatron_align.evaluation.engines import open_engine
from megatron_align.evaluation.generation import generate
from megatron_align.rollout.types import Sampling
from megatron_align.tools.chat import Chat, _Stream, talk
from tests.harness.tiny import byte_tokenizer


@pytest.fixture(scope="module")
def engine(tiny_models):
    return open_engine(tiny_models())


def spoken(chat, *questions):
    out = io.StringIO()
    talk(chat, iter(questions), out)
    return out.getvalue()


def test_history_and_system_prompt_are_what_generate_gets(engine):
    sampling = Sampling(temperature=0, max_tokens=12)
    chat = Chat(engine, sampling, system="Be brief.")
    shown = spoken(chat, "2 + 2", "", "3 + 3")
    messages = [{"role": "system", "content": "Be brief."}]
    for question in ("2 + 2", "3 + 3"):
        messages.append({"role": "user", "content": question})
        [[answer]] = generate(engine, [messages], sampling)
        messages.append({"role": "assistant", "content": answer.text})
    assert chat.messages() == messages
    assert shown == "".join(f"{m['content']}\n" for m in messages if m["role"] == "assistant")


def test_commands(engine, tmp_path):
    chat = Chat(engine, Sampling(max_tokens=8))
    file = tmp_path / "saved.jsonl"
    assert "no question yet" in spoken(chat, "/retry")
    assert "no question yet" in spoken(chat, "/undo")
    assert "error: there is no conversation" in spoken(chat, f"/save {file}")
    spoken(chat, "one")
    first = chat.turns[1]["content"]
    spoken(chat, "/retry")
    assert [t["content"] for t in chat.turns][0] == "one"
    assert chat.turns[1]["content"] != first
    assert spoken(chat, f"/save {file}") == f"added to {file}\n"
    assert json.loads(file.read_text()) == {"messages": chat.messages()}
    assert "error: the conversation could not be written" in spoken(chat, f"/save {tmp_path}/no/x")
    assert spoken(chat, "/undo") == "forgotten: one\n"
    assert chat.turns == []
    assert "system prompt: Be kind" in spoken(chat, "/system Be kind")
    assert chat.messages() == [{"role": "system", "content": "Be kind"}]
    assert "no command /restart" in spoken(chat, "/restart")
    assert spoken(chat, "/quit", "never asked") == ""


def test_a_terminal_gets_no_escape_sequences(engine, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    chat, out = Chat(engine, Sampling()), Terminal()
    monkeypatch.setattr(chat, "ask", lambda question, show: show("a\x1b[2Jb\n\tc"))
    talk(chat, iter(["one"]), out)
    assert out.getvalue() == "a\ufffd[2Jb\n\tc\n"


def test_a_question_that_does_not_fit_is_an_error_and_forgotten(engine):
    chat = Chat(engine, Sampling(max_tokens=4))
    shown = spoken(chat, "x" * 5000, "short")
    assert shown.startswith(
        "error: the conversation: a prompt must be shorter than the model's context of 2048"
    )
    assert [t["content"] for t in chat.turns][0] == "short"


def test_pieces_never_show_half_a_character_or_the_beginning_of_a_stop_text():
    tokenizer, pieces = byte_tokenizer(), []
    stream = _Stream(tokenizer, pieces.append, ("END",))
    for token in tokenizer("aé EN E€ENx", add_special_tokens=False)["input_ids"]:
        stream.add(0, 0, token)
    assert "".join(pieces) == "aé EN E€ENx"
    assert not any("\ufffd" in piece for piece in pieces)
    shown = len(pieces)
    for token in tokenizer("yEND", add_special_tokens=False)["input_ids"]:
        stream.add(0, 0, token)
    assert pieces[shown:] == ["y"]


def test_an_interrupted_answer_is_kept_as_far_as_it_was_written(engine):
    chat, pieces = Chat(engine, Sampling(max_tokens=50)), []

    def show(text):
        pieces.append(text)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    chat.ask("one", show)
    assert len(pieces) == 3
    assert chat.turns[-1]["content"] == "".join(pieces)


def test_a_model_without_a_chat_template_is_refused(engine):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    before, engine.tokenizer = engine.tokenizer, tokenizer
    try:
        with pytest.raises(InputError, match="chat template"):
            Chat(engine, Sampling()).prompt_ids([{"role": "user", "content": "?"}])
    finally:
        engine.tokenizer = before
