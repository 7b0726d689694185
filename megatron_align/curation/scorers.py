"""Quality scores and categories of prompts: by a function, a classifier, or a model that replies.

Values are kept by content, as replies are: an interrupted run computes none twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from transformers import AutoModelForSequenceClassification
from transformers.utils.logging import disable_progress_bar

from megatron_align.config.user_files import raised_at, user_function
from megatron_align.curation.asking import Asker, Unreadable
from megatron_align.curation.chat_models import NoReply, Request
from megatron_align.curation.raw_prompts import RawPrompt
from megatron_align.data.store import sha256
from megatron_align.data.tokenize.chat_template import ChatTemplate
from megatron_align.data.tokenize.encoder import Encoder
from megatron_align.data.tokenize.tokenizer import load_tokenizer
from megatron_align.errors import InputError, one_line, require, shown
from megatron_align.evaluation.engines import weights_state
from megatron_align.model.families import read_json
from megatron_align.records import Conversation, Message
from megatron_align.rollout.kept_replies import KeptReplies, content_key

BATCH = 16  # prompts of one pass of a classifier
_Value = TypeVar("_Value", float, str)
_Value_co = TypeVar("_Value_co", float, str, covariant=True)


class Scorer(Protocol[_Value_co]):
    """Gives each prompt a value."""

    def values(self, prompts: Sequence[RawPrompt]) -> Sequence[_Value_co | None]:
        """Return a value for each prompt; None: it has none."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


class ColumnScorer(Generic[_Value]):
    """Values of a field of the records.

    Args:
        name: of the field.
        kind: of its values; a prompt whose record has none has no value.
    """

    def __init__(self, name: str, kind: type[_Value]) -> None:
        self._name = name
        self._kind: type[_Value] = kind

    def values(self, prompts: Sequence[RawPrompt]) -> Sequence[_Value | None]:
        """See :meth:`.Scorer.values`."""
        return [self._value(prompt) for prompt in prompts]

    def close(self) -> None:
        """Nothing is held."""

    def _value(self, prompt: RawPrompt) -> _Value | None:
        value = prompt.raw.get(self._name)
        return None if value is None else checked(value, self._kind, f"{prompt.where}: field '{self._name}'")


class RepliedScorer(Generic[_Value]):
    """Values read from the replies of a model.

    Args:
        asker: the model.
        request: of a prompt.
        parse: reads a reply; None: there is no value in it.
        tries: replies of each prompt, until one can be read.
    """

    def __init__(
        self,
        asker: Asker,
        request: Callable[[RawPrompt], Request],
        parse: Callable[[str], _Value | None],
        tries: int,
    ) -> None:
        self._asker, self._request, self._tries = asker, request, tries
        self._parse: Callable[[str], _Value | None] = parse

    def values(self, prompts: Sequence[RawPrompt]) -> Sequence[_Value | None]:
        """See :meth:`.Scorer.values`."""
        read = self._asker.parsed([self._request(prompt) for prompt in prompts], self._parse, self._tries)
        return [None if isinstance(value, (NoReply, Unreadable)) else value for value in read]

    def close(self) -> None:
        """The asker is closed by its owner."""


class ComputedScorer(Generic[_Value]):
    """Values of a function of texts, kept by content.

    Args:
        compute: texts in, a value or None for each out.
        identity: JSON value that differs between functions that differ.
        kept: earlier values.
        close: frees what the function holds.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[str]], Sequence[_Value | None]],
        identity: Any,
        kept: KeptReplies,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self._identity, self._kept, self._close = identity, kept, close
        self._compute: Callable[[Sequence[str]], Sequence[_Value | None]] = compute

    def values(self, prompts: Sequence[RawPrompt]) -> Sequence[_Value | None]:
        """See :meth:`.Scorer.values`."""
        keys = [content_key(self._identity, prompt.text) for prompt in prompts]
        texts = {key: p.text for key, p in zip(keys, prompts, strict=True) if not self._kept.of(key)}
        if texts:
            for key, value in zip(texts, self._compute(list(texts.values())), strict=True):
                self._kept.add(key, value)
        return [self._kept.of(key)[0] for key in keys]

    def close(self) -> None:
        """Free what the function holds."""
        self._close()
        self._kept.close()


def function_scorer(path: str, kind: type[_Value], option: str, kept: KeptReplies) -> ComputedScorer[_Value]:
    """Return the scorer of ``FILE.py:FUNCTION``: a list of texts in, a list of values or None out.

    Raises:
        InputError: there is no such file or function.
    """
    file, function = user_function(path, option)

    def compute(texts: Sequence[str]) -> list[_Value | None]:
        try:
            made = function(list(texts))
        except Exception as error:  # a user's function may raise anything
            raise InputError(f"{option} {raised_at(error, file)}") from error
        if hasattr(made, "tolist"):
            made = made.tolist()
        is_list = isinstance(made, (list, tuple))
        got = f"{len(made)} of them" if is_list else shown(made)
        require(
            is_list and len(made) == len(texts),
            f"{option}: {path} must return a list with a value or None for each of {len(texts)} prompts, got {got}",
        )
        return [None if value is None else checked(value, kind, f"{option}: {path}") for value in made]

    return ComputedScorer(compute, ["function", sha256(file), path.rpartition(":")[2]], kept)


def is_classifier(model: str) -> bool:
    """Return whether a folder holds a classifier or a reward model, rather than a language model."""
    file = Path(model) / "config.json"
    if not file.is_file():
        return False
    names = read_json(file).get("architectures") or [""]
    return str(names[0]).endswith("ForSequenceClassification")


class Classifier:
    """A Hugging Face folder of a sequence classifier or a reward model, which reads a prompt as a user's turn.

    Args:
        folder: of the model.
        option: that names it, for errors.

    Raises:
        InputError: transformers cannot load it.
    """

    def __init__(self, folder: str, option: str) -> None:
        self._folder, self._option = folder, option
        self._tokenizer = load_tokenizer(folder)
        self._template, self._encoder = ChatTemplate(self._tokenizer), Encoder(self._tokenizer)
        config = read_json(Path(folder) / "config.json")
        names = config.get("id2label") or {}
        self.labels = [str(names[name]) for name in sorted(names, key=int)]
        self._positions = int(config.get("max_position_embeddings") or 1 << 30)
        self._model: torch.nn.Module | None = None
        self.identity: Any = ["classifier", weights_state(folder)]

    def scores(self, texts: Sequence[str]) -> list[float | None]:
        """Return the single output of a reward model for each text; None: the text is too long for it."""
        return [None if row is None else row[0] for row in self._logits(texts)]

    def categories(self, texts: Sequence[str]) -> list[str | None]:
        """Return the likeliest label of each text; None: the text is too long for it."""
        rows = self._logits(texts)
        return [None if row is None else self.labels[row.index(max(row))] for row in rows]

    def close(self) -> None:
        """Free the model's memory."""
        self._model = None

    def _logits(self, texts: Sequence[str]) -> list[list[float] | None]:
        ids = [self._ids(text) for text in texts]
        results: list[list[float] | None] = [None] * len(texts)
        order = sorted((len(of_text), i) for i, of_text in enumerate(ids) if len(of_text) <= self._positions)
        for start in range(0, len(order), BATCH):
            indices = [i for _, i in order[start : start + BATCH]]
            for i, row in zip(indices, self._rows([ids[i] for i in indices]), strict=True):
                require(
                    all(map(math.isfinite, row)),
                    f"{self._option}: {self._folder} gave a number that is not finite",
                )
                results[i] = row
        return results

    @torch.no_grad()
    def _rows(self, ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the outputs of some texts, which share lengths or are padded on the right."""
        model: Any = self._model or self._load()
        self._model = model
        device = next(model.parameters()).device
        length, pad = max(map(len, ids)), model.config.pad_token_id
        if pad is None:  # the last position could not be found in a padded row
            return [self._forward(model, [of_text], [1] * len(of_text), device)[0] for of_text in ids]
        padded = [[*of_text, *[pad] * (length - len(of_text))] for of_text in ids]
        mask = [[1] * len(of_text) + [0] * (length - len(of_text)) for of_text in ids]
        return self._forward(model, padded, mask, device)

    def _forward(self, model: Any, ids: Any, mask: Any, device: torch.device) -> list[list[float]]:
        mask_BT = torch.tensor(mask, device=device).reshape(len(ids), -1)
        return model(torch.tensor(ids, device=device), attention_mask=mask_BT).logits.float().tolist()

    def _load(self) -> Any:
        disable_progress_bar()
        try:
            model = AutoModelForSequenceClassification.from_pretrained(
                self._folder, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(
                f"{self._option}: transformers could not load {self._folder} as a classifier: {one_line(error)}"
            ) from error
        return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    def _ids(self, text: str) -> list[int]:
        if not self._template.exists():
            return self._encoder.ids(text, added=True)
        conversation = Conversation((Message("user", text),), self._option, None)
        return self._encoder.ids(self._template.render(conversation, 1))


def checked(value: Any, kind: type[_Value], what: str) -> _Value:
    """Return a finite number or a text that is not blank.

    Raises:
        InputError: it is something else; names ``what``.
    """
    if kind is float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        require(is_number and math.isfinite(value), f"{what} must be a finite number, got {shown(value)}")
        return kind(value)
    require(isinstance(value, str) and bool(value.strip()), f"{what} must be a text, got {shown(value)}")
    return kind(value)
