"""``megatron-align chat MODEL``: talk to a model in the terminal. Also ``python tools/chat.py``.

Exit code: 0 done, 2 bad input.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from megatron_align.evaluation.engines import TransformersEngine
    from megatron_align.rollout.adapters import EngineAdapters
    from megatron_align.rollout.types import Sampling

PROGRAM = "megatron-align chat"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
COMMANDS = """/reset: forget the conversation   /system TEXT: set the system prompt, and forget
/retry: answer again with other random numbers   /undo: forget the last question   /save FILE: write the conversation
/adapter NAME: answer with this adapter from now on; base: without one
/help: these lines   /quit, Ctrl-D: leave   Ctrl-C: stop the answer   end a line with \\ to write another"""
ABOUT = f"""Talk to a model in the terminal, with its chat template; answers appear as they are written.

MODEL is a Hugging Face folder, one of our checkpoints of any layout, or a run's folder. Lines that begin with a slash
are commands. Questions can be piped in: one a line.

{COMMANDS}"""


def run(arguments: list[str]) -> int:
    """Run with the arguments after ``chat``; return the exit code."""
    from megatron_align.tools.command import Parser
    from megatron_align.tools.generate import add_sampling, sampling_of

    parser = Parser(PROGRAM, ABOUT)
    add = parser.add_argument
    add("model", metavar="MODEL", help="Hugging Face folder, checkpoint, or run folder")
    add("--system", metavar="TEXT", help="system prompt (default: none, or the template's own)")
    add("--chat-template", metavar="FILE", help="Jinja chat template (default: the tokenizer's own)")
    add("--precision", choices=("bf16", "fp32"), help="of weights and computation (default: as stored)")
    about = "adapter of the model, a PEFT folder or a checkpoint; of several as NAME=PATH the first answers"
    add("--adapter", type=str, nargs="+", default=[], metavar="[NAME=]PATH", help=about)
    add_sampling(parser, temperature=0.7)
    options = parser.parse(arguments)
    from megatron_align.data.tokenize.chat_template import load_chat_template
    from megatron_align.evaluation.adapter_names import parse_adapters
    from megatron_align.evaluation.adapters import attach_adapters
    from megatron_align.evaluation.engines import open_engine
    from megatron_align.storage.atomic_write import require_one_process

    require_one_process()
    sampling = sampling_of(options)
    template = load_chat_template(options.chat_template) if options.chat_template else None
    engine = open_engine(options.model, options.precision)
    adapters = attach_adapters(engine, options.model, parse_adapters(options.adapter))
    chat = Chat(engine, sampling, options.system, template, adapters)
    chat.prompt_ids([{"role": "user", "content": "?"}])  # a model without a chat template is refused at once
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  # lines can then be edited, and recalled with the arrow keys

        print(
            f"{options.model}: context of {engine.context:,} tokens, {_described(sampling)}. /help lists commands."
        )
    with suppress(KeyboardInterrupt):
        talk(chat, _questions(interactive), sys.stdout)
    if interactive:
        print()
    return 0


@dataclass
class Chat:
    """A conversation with a model.

    Args:
        engine: of the model.
        sampling: how answers are drawn; the seed counts up with each answer.
        system: system prompt; None: none.
        template: text of a Jinja chat template; None: the tokenizer's own.
        adapters: of the engine; None: it has none.

    Attributes:
        turns: messages so far, without the system prompt.
    """

    engine: TransformersEngine
    sampling: Sampling
    system: str | None = None
    template: str | None = None
    adapters: EngineAdapters | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    def prompt_ids(self, turns: list[dict[str, str]]) -> list[int]:
        """Return the token ids of a conversation and the generation prompt.

        Raises:
            InputError: there is no chat template, or it fails.
        """
        from megatron_align.records import Message
        from megatron_align.rollout.prompts import PromptRecord, PromptTokenizer

        system = [Message("system", self.system)] if self.system else []
        messages = (*system, *(Message(turn["role"], turn["content"]) for turn in turns))
        record = PromptRecord(raw={}, where=self.engine.tokenizer.name_or_path, prompt=messages)
        return PromptTokenizer(self.engine.tokenizer, self.template).continued(record, "")

    def ask(self, question: str, show: Callable[[str], None]) -> None:
        """Answer a question; ``show`` gets the pieces of the answer's text as they are written.

        An interrupted answer is kept as far as it was written. A question that does not fit is forgotten.

        Raises:
            InputError: the conversation does not fit the model's context.
        """
        from megatron_align.rollout.types import Prompt, require_fitting

        turns = [*self.turns, {"role": "user", "content": question}]
        prompt = Prompt(self.prompt_ids(turns), key=len(turns), where="the conversation")
        require_fitting([prompt], self.engine.context, "conversations")
        stream = _Stream(self.engine.tokenizer, show, self.sampling.stop)
        try:
            [[completion]] = self.engine.generate([prompt], self.sampling, stream.add)
            answer = completion.text
            stream.finish(answer)
        except KeyboardInterrupt:
            answer = stream.shown
        self.turns = [*turns, {"role": "assistant", "content": answer}]

    def retry(self, show: Callable[[str], None]) -> bool:
        """Answer the last question again, with another seed; return whether there is one."""
        if not self.turns:
            return False
        question = self.undo()
        self.sampling = replace(self.sampling, seed=self.sampling.seed + 1)
        self.ask(question, show)
        return True

    def undo(self) -> str:
        """Forget the last question and its answer; return the question."""
        question = self.turns[-2]["content"]
        del self.turns[-2:]
        return question

    def messages(self) -> list[dict[str, str]]:
        """Return the conversation with its system prompt."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]


class _Stream:
    """Turns tokens into pieces of text that never change afterwards.

    Text that may be the beginning of a character or of a stop text is held until it is complete.
    """

    def __init__(self, tokenizer: Any, show: Callable[[str], None], stop: tuple[str, ...]) -> None:
        self._tokenizer, self._show, self._stop = tokenizer, show, stop
        self._ids: list[int] = []
        self.shown = ""

    def add(self, _prompt: int, _sample: int, token: int) -> None:
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        held = max((_held(text, stop) for stop in self._stop), default=0)
        text = text[: len(text) - held].rstrip("\ufffd")
        if not any(stop in text for stop in self._stop):
            self.finish(text)

    def finish(self, text: str) -> None:
        """Show what is new in the text."""
        if text.startswith(self.shown) and len(text) > len(self.shown):
            new, self.shown = text[len(self.shown) :], text  # before it is shown, where Ctrl-C may strike
            self._show(new)


def _held(text: str, stop: str) -> int:
    """Return the length of the longest end of ``text`` that ``stop`` begins with."""
    return next((n for n in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:n])), 0)


def talk(chat: Chat, questions: Iterator[str], out: TextIO) -> None:
    """Answer questions and obey commands until there are no more.

    Args:
        chat: the conversation.
        questions: lines.
        out: where answers are written.
    """
    from megatron_align.errors import InputError

    def show(text: str) -> None:
        # A model may write escape sequences, which would move the cursor or change the title of a terminal.
        out.write(_CONTROL.sub("\ufffd", text) if out.isatty() else text)
        out.flush()

    for question in questions:
        command, _, rest = question.strip().partition(" ")
        try:
            if not command:
                continue
            if command in ("/quit", "/exit"):
                return
            if command.startswith("/"):
                show(_obey(chat, command, rest.strip(), show))
            else:
                chat.ask(question.strip(), show)
                show("\n")
        except InputError as error:
            show(f"error: {error}\n")


def _obey(chat: Chat, command: str, rest: str, show: Callable[[str], None]) -> str:
    """Obey a command; return what is shown after it."""
    if command == "/help":
        return f"{COMMANDS}\n"
    if command == "/reset":
        chat.turns = []
        return "the conversation is forgotten\n"
    if command == "/system":
        chat.system, chat.turns = rest or None, []
        return f"system prompt: {rest or 'none'}; the conversation is forgotten\n"
    if command == "/undo":
        return f"forgotten: {chat.undo()}\n" if chat.turns else "there is no question yet\n"
    if command == "/retry":
        return "\n" if chat.retry(show) else "there is no question yet\n"
    if command == "/adapter":
        return _use_adapter(chat, rest)
    if command == "/save":
        return _save(chat, rest)
    return f"there is no command {command}; /help lists them\n"


def _use_adapter(chat: Chat, name: str) -> str:
    """Answer with another adapter, or without one."""
    from megatron_align.evaluation.adapter_names import BASE

    names = chat.adapters.names if chat.adapters else ()
    if name not in (*names, BASE):
        return f"there is no adapter '{name}', there are {', '.join((*names, BASE))}\n"
    if chat.adapters:
        chat.adapters.use(None if name == BASE else name)
    return f"answers come from {name} now\n"


def _save(chat: Chat, name: str) -> str:
    """Append the conversation to a JSONL file, as a record that training reads."""
    import json

    from megatron_align.errors import require

    require(bool(name), "/save needs the name of a file")
    require(bool(chat.turns), "there is no conversation yet")
    try:
        with open(name, "a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": chat.messages()}, ensure_ascii=False) + "\n")
    except OSError as error:
        return f"error: the conversation could not be written: {error.strerror} at {name}\n"
    return f"added to {name}\n"


def _questions(interactive: bool) -> Iterator[str]:
    """Yield lines; a line that ends with a backslash is continued by the next."""
    lines: list[str] = []
    while True:
        try:
            line = input(("... " if lines else "\n> ") if interactive else "")
        except EOFError:
            if lines:
                yield "\n".join(lines)
            return
        except KeyboardInterrupt:  # at the prompt: what was typed is dropped
            if not interactive:
                raise
            print()
            lines = []
            continue
        if line.endswith("\\"):
            lines.append(line[:-1])
            continue
        yield "\n".join([*lines, line])
        lines = []


def _described(sampling: Sampling) -> str:
    return f"temperature {sampling.temperature:g}" if sampling.temperature else "greedy"


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not tools/: its modules would shadow packages
    from megatron_align.tools.main import main

    sys.exit(main(["chat", *sys.argv[1:]]))
