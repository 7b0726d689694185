"""Records to tokens, and who is trained: the chat template decides both, in the words of the tokenizer.

The boundaries are those of TRL's trainers for a prompt and its completion or completions (text or messages;
SFT, DPO, KTO, reward). In a whole conversation every assistant turn is trained on: what the template marks with
``{% generation %}`` if it has such marks, else what each assistant turn adds to the rendering of the turns
before it (plus the generation prompt). The second way needs renderings that nest; a template that rewrites
earlier turns is refused. A turn with ``train: false`` is left out of what is trained, whichever way is taken.

Shapes: L tokens of one sample.
"""

from __future__ import annotations

import logging
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, TemplateError, TemplateSyntaxError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_align.data.tokenize.prefix_tokens import Pieces, Rendering, common
from megatron_align.errors import InputError
from megatron_align.records import Completion, Conversation, Message, Preference, Record, Sample

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "*.tiktoken",
    "tokenization_*.py",
)

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ANY_MARK = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")
_log = logging.getLogger(__name__)


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a Hugging Face folder; nothing is ever downloaded.

    Raises:
        InputError: if the folder or its tokenizer is missing or malformed.
    """
    path = Path(folder)
    if not path.is_dir():
        raise InputError(f"{folder}: must be a Hugging Face folder with a tokenizer, found none")
    if not any(next(path.glob(name), None) for name in TOKENIZER_FILES):
        raise InputError(f"{folder}: must hold a tokenizer (one of {', '.join(TOKENIZER_FILES)}), found none")
    try:
        # trust_remote_code: unless it is said, transformers asks on the terminal and a job would hang
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, ImportError) as error:
        raise InputError(f"{folder}: tokenizer could not be loaded: {_one_line(error)}") from error
    except Exception as error:
        if type(error) is not Exception:  # the tokenizers library raises bare Exception; all else is a fault
            raise
        raise InputError(f"{folder}: tokenizer could not be loaded: {_one_line(error)}") from error


def load_chat_template(path: str) -> str:
    """Return the text of a Jinja chat template.

    Raises:
        InputError: if the file is missing, empty, not text, or not Jinja; names the line.
    """
    file = Path(path)
    if not file.is_file():
        found = "a folder" if file.is_dir() else "nothing"
        raise InputError(
            f"{path}: data.chat_template must be a file with a Jinja chat template, found {found}"
        )
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: data.chat_template could not be read: {_one_line(error)}") from error
    if not text.strip():
        raise InputError(f"{path}: data.chat_template must hold a Jinja chat template, got an empty file")
    try:
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_ANY_MARK.sub("", text))
    except TemplateSyntaxError as error:
        raise InputError(
            f"{path}:{error.lineno}: data.chat_template must be Jinja, got: {_one_line(error)}"
        ) from error
    return text


class Template:
    """Turns records into samples with one tokenizer.

    Args:
        tokenizer: with a chat template if conversations come, with an EOS token if plain text comes.
        chat_template: text of a Jinja template to use instead of the tokenizer's own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self._pieces = Pieces(tokenizer)
        self._warned = False
        self._written: set[str] = set()

    def sample(self, record: Record) -> Sample:
        """Tokenise one record.

        Raises:
            InputError: if the template is missing, fails, does not nest, or leaves nothing to train on;
                names the record's place.
        """
        if isinstance(record, Preference):
            return self._judged(record)
        if isinstance(record, Completion):
            tokens, scored_L = self._text(record)
        else:
            self._require_chat_template(record)
            self._require_tools_written(record)
            if record.prompt_messages is not None:
                tokens, scored_L = self._completion_turns(record)
            elif _MARK.search(self._template_text(record)):
                tokens, scored_L = self._marked_turns(record)
            else:
                tokens, scored_L = self._assistant_turns(record)
        scored_L[:1] = False  # nothing predicts the first token
        if not scored_L.any():
            raise InputError(f"{record.where}: must have a token to train on, got none after tokenisation")
        return Sample(np.asarray(tokens, dtype=np.int32), scored_L, weight=record.weight)

    # A prompt and its judged completions.
    def _judged(self, record: Preference) -> Sample:
        """Lay out ``prompt | completion | ...``; the prompt ends where the first completion diverges from it."""
        if isinstance(record.prompt, str):
            prompt_ids = self._pieces.ids(record.prompt, added=True)
            pieces = [self._text_ids(record.prompt, text, record.where) for text in record.completions]
            left_out: list[np.ndarray | None] = [None] * len(pieces)
        else:
            prompt_ids, pieces, left_out = self._judged_turns(record)
        start = min(common(prompt_ids, ids) for ids in pieces)
        self._tell_divergence(prompt_ids, start, record.where)
        self._require_difference(record, start, pieces)
        scored = [
            np.ones(len(ids), dtype=bool) if out is None else ~out
            for ids, out in zip(pieces, left_out, strict=True)
        ]
        for j, scored_L in enumerate(scored):
            if not scored_L[start:].any():
                raise InputError(
                    f"{record.where}: completion {j + 1} must have a token to train on, got none after tokenisation"
                )
        tokens = np.concatenate(
            [np.asarray(ids, dtype=np.int32) for ids in _unfolded(prompt_ids[:start], pieces)]
        )
        return Sample(
            tokens,
            np.concatenate([np.zeros(start, dtype=bool), *(scored_L[start:] for scored_L in scored)]),
            prompt_length=start,
            completion_lengths=tuple(len(ids) - start for ids in pieces),
            scores=tuple(math.nan if score is None else score for score in record.scores),
            margin=math.nan if record.margin is None else record.margin,
            label=record.label,
            weight=record.weight,
        )

    def _judged_turns(self, record: Preference) -> tuple[list[int], list[list[int]], list[np.ndarray | None]]:
        """Return the ids of the prompt and of every prompt + completion, and which of their tokens are untrained."""
        prompt_ids: list[int] = []
        pieces, left_out = [], []
        for j, turns in enumerate(record.completions):
            whole = Conversation((*record.prompt, *turns), record.where, record.tools, len(record.prompt))
            if j == 0:
                self._require_chat_template(whole)
                prompt_ids = self._pieces.ids(self._render(whole, len(record.prompt), prompt=True))
            self._require_tools_written(whole)
            rendering = self._whole(whole)
            pieces.append(rendering.ids)
            left_out.append(self._untrained(whole, rendering))
        return prompt_ids, pieces, left_out

    def _require_difference(self, record: Preference, start: int, pieces: list[list[int]]) -> None:
        if start == 0:
            raise InputError(
                f"{record.where}: must have a token of the prompt before its completions, got none"
            )
        # The gold answer of a triple may be the chosen one.
        for j, ids in enumerate(pieces[:2] if record.kind == "triple" else pieces):
            if ids in pieces[:j]:
                raise InputError(
                    f"{record.where}: completion {j + 1} must differ from completion {pieces.index(ids) + 1}, "
                    "got the same tokens"
                )

    # Who is trained: four ways, each returning token ids and a boolean per token.
    def _text(self, record: Completion) -> tuple[list[int], np.ndarray]:
        """Plain text: the completion starts where it diverges from the prompt alone."""
        all_ids = self._text_ids(record.prompt, record.completion, record.where)
        prompt_ids = self._pieces.ids(record.prompt, added=True)
        return all_ids, self._after_prompt(prompt_ids, all_ids, record.where)

    def _text_ids(self, prompt: str, completion: str, where: str) -> list[int]:
        """Return the ids of both, ended by EOS."""
        eos = self.tokenizer.eos_token
        if eos is None:
            raise InputError(f"{where}: plain text needs a tokenizer with an EOS token, got none")
        completion = completion if completion.endswith(eos) else completion + eos
        return self._pieces.ids(prompt + completion, added=True)

    def _completion_turns(self, record: Conversation) -> tuple[list[int], np.ndarray]:
        prompt_ids = self._pieces.ids(self._render(record, record.prompt_messages, prompt=True))
        whole = self._whole(record)
        scored_L = self._after_prompt(prompt_ids, whole.ids, record.where)
        untrained_L = self._untrained(record, whole)
        return whole.ids, scored_L if untrained_L is None else scored_L & ~untrained_L

    def _marked_turns(self, record: Conversation) -> tuple[list[int], np.ndarray]:
        if not self.tokenizer.is_fast:
            raise InputError(
                f"{record.where}: a chat template with generation marks needs a fast tokenizer, "
                f"got {type(self.tokenizer).__name__}"
            )
        ids, scored_L = self._marked(record, len(record.messages))
        for i, message in enumerate(record.messages):
            if message.role == "assistant" and not message.train:
                self._unmark(record, i, ids, scored_L)
        return ids, scored_L

    def _marked(self, record: Conversation, turns: int) -> tuple[list[int], np.ndarray]:
        encoded = self._apply(record, turns, return_dict=True, return_assistant_tokens_mask=True)
        return encoded["input_ids"], np.array(encoded["assistant_masks"], dtype=bool)

    def _unmark(self, record: Conversation, i: int, ids: list[int], scored_L: np.ndarray) -> None:
        """Leave out turn ``i``: the marked stretches that the rendering up to it has more than the one before it."""
        before = len(_stretches(self._marked(record, i)[1])) if i else 0
        ids_here, scored_here = self._marked(record, i + 1)
        whole = _stretches(self._marked(record, len(record.messages))[1])
        mine = list(enumerate(_stretches(scored_here)))[before:]
        for k, (start, end) in mine:
            here = whole[k] if k < len(whole) else (0, 0)
            if ids_here[start:end] != ids[slice(*here)]:
                mine = []
                break
            scored_L[slice(*here)] = False
        if not mine:
            raise InputError(
                f"{record.where}: messages[{i}] with 'train': false must be marked alike whatever follows it, "
                "so that it can be left out; the chat template does not"
            )

    def _assistant_turns(self, record: Conversation) -> tuple[list[int], np.ndarray]:
        whole = self._whole(record)
        scored_L = np.zeros(len(whole.ids), dtype=bool)
        for i, message in enumerate(record.messages):
            if message.role == "assistant" and message.train:
                scored_L[self._turn(record, i, whole)] = True
        return whole.ids, scored_L

    def _whole(self, record: Conversation) -> Rendering:
        text = self._render(record, len(record.messages))
        return Rendering(text, self._pieces.ids(text), self._pieces)

    def _untrained(self, record: Conversation, whole: Rendering) -> np.ndarray | None:
        """Return which tokens are of turns after the prompt that are marked untrained; None: there are none."""
        turns = [
            i
            for i in range(record.prompt_messages or 0, len(record.messages))
            if not record.messages[i].train
        ]
        if not turns:
            return None
        untrained_L = np.zeros(len(whole.ids), dtype=bool)
        for i in turns:
            untrained_L[self._turn(record, i, whole)] = True
        return untrained_L

    def _turn(self, record: Conversation, i: int, whole: Rendering) -> slice:
        """Return the tokens that turn ``i`` adds to the rendering before it; of a trained one, without its header."""
        name = f"{record.where}: messages[{i}]"
        if i == 0:
            raise InputError(
                f"{name} must not be an assistant turn unless the chat template marks {{% generation %}}: "
                "nothing stands before it to tell where it starts"
            )
        before = self._render(record, i, prompt=record.messages[i].train)
        start = self._nested(before, whole, name)
        end = len(whole.ids)
        if i + 1 < len(record.messages):
            end = self._nested(self._render(record, i + 1), whole, name)
        if start >= end:
            raise InputError(f"{name} must add tokens to the conversation, got none")
        return slice(start, end)

    def _nested(self, prefix: str, whole: Rendering, turn: str) -> int:
        """Return how many tokens of the whole rendering the prefix covers.

        Where a token straddles the end of the prefix (an answer that starts with a newline), it belongs to
        what follows, as in TRL.
        """
        if not whole.text.startswith(prefix):
            at = common(prefix, whole.text)
            alone, within = prefix[at : at + 40], whole.text[at : at + 40]
            raise InputError(
                f"{turn}: the chat template must render earlier turns the same whatever follows, or mark "
                f"{{% generation %}}; got {alone!r} up to this turn, {within!r} in the whole"
            )
        return whole.covered(prefix)

    def _after_prompt(self, prompt_ids: list[int], all_ids: list[int], where: str) -> np.ndarray:
        """Score what follows the common start of both, as TRL does where the prompt is no token prefix."""
        start = common(prompt_ids, all_ids)
        self._tell_divergence(prompt_ids, start, where)
        return np.arange(len(all_ids)) >= start

    def _tell_divergence(self, prompt_ids: list[int], start: int, where: str) -> None:
        if start < len(prompt_ids) and not self._warned:
            self._warned = True
            _log.warning(
                "%s: the tokens of the prompt are not the first tokens of prompt + completion; training "
                "starts where they diverge, before %r (said once, other samples may be alike)",
                where,
                self.tokenizer.decode(prompt_ids[start:]),
            )

    # The tokenizer's own functions, with their errors put into one line.
    def _require_chat_template(self, record: Conversation) -> None:
        if not (self.chat_template or self.tokenizer.chat_template):
            raise InputError(
                f"{record.where}: a conversation needs a tokenizer with a chat template, "
                f"got none in '{self.tokenizer.name_or_path}'; data.chat_template can name one"
            )

    def _require_tools_written(self, record: Conversation) -> None:
        """Refuse a template without tools for data with tools: calls would become empty turns, and be trained."""
        without = {
            "tools": replace(record, tools=None),
            "tool_calls": replace(record, messages=tuple(map(_without_calls, record.messages))),
        }
        for part, other in without.items():
            if part in self._written or other == record:
                continue
            if self._render(record, len(record.messages)) == self._render_or_none(other):
                raise InputError(
                    f"{record.where}: the chat template must write the record's {part}, got the same text "
                    "without them; give the tokenizer a chat template that knows tools"
                )
            self._written.add(part)  # seen once: asked once per tokenizer

    def _template_text(self, record: Conversation) -> str:
        try:
            return self.tokenizer.get_chat_template(self.chat_template, tools=_list(record.tools))
        except ValueError as error:  # several templates, none of them the default
            raise InputError(f"{record.where}: the chat template failed: {_one_line(error)}") from error

    def _render_or_none(self, record: Conversation) -> str | None:
        try:
            return self._render(record, len(record.messages))
        except InputError:
            return None

    def _render(self, record: Conversation, turns: int, *, prompt: bool = False) -> str:
        """Render the first ``turns`` messages as text, followed by the generation prompt if asked."""
        return self._apply(record, turns, tokenize=False, add_generation_prompt=prompt)

    def _apply(self, record: Conversation, turns: int, **options: Any) -> Any:
        messages = [message.for_template() for message in record.messages[:turns]]
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=_list(record.tools), chat_template=self.chat_template, **options
            )
        except (TemplateError, ValueError, TypeError, LookupError) as error:
            raise InputError(f"{record.where}: the chat template failed: {_one_line(error)}") from error


def _without_calls(message: Message) -> Message:
    return replace(message, extra={k: v for k, v in message.extra.items() if k != "tool_calls"})


def _list(tools: tuple[Any, ...] | None) -> list[Any] | None:
    return None if tools is None else list(tools)


def _unfolded(prompt_ids: list[int], pieces: list[list[int]]) -> list[list[int]]:
    """Return the prompt, then what each piece adds to it."""
    return [prompt_ids, *(ids[len(prompt_ids) :] for ids in pieces)]


def _stretches(marked_L: np.ndarray) -> list[tuple[int, int]]:
    """Return ``(start, end)`` of every run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], marked_L, [False]]).astype(np.int8)))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
