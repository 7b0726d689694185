r"""Recognise the shape of a record, and convert it (``docs/data.md`` has the table of shapes).

A file has one shape, that of its first record: among the kinds that its fields fit, the most specific one (a pair with
a gold answer, a pair, a ranked list, a labelled completion, then chat), and of that kind exactly one shape must fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron_align.data.formats import chat, preference
from megatron_align.data.formats.fields import RawRecord
from megatron_align.data.formats.foreign_fields import refuse_other_kinds, refuse_unsupported
from megatron_align.errors import InputError, nearest, shown
from megatron_align.records import Record

Kind = Literal["triple", "pair", "ranked", "unpaired", "chat"]
KINDS: tuple[Kind, ...] = ("triple", "pair", "ranked", "unpaired", "chat")  # the most specific first


class MixedShapes(InputError):
    """Records of different shapes in one file: an error of the file, so it is never skipped."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One way to write a record: ``needs`` and ``form`` recognise it, ``convert`` checks its fields.

    ``form`` distinguishes shapes of one kind that need the same fields; None: the fields are enough. ``optional``:
    further fields that ``convert`` reads. ``named``: the user named the shape, or its kind.
    """

    name: str
    kind: Kind
    needs: tuple[str, ...]
    convert: Callable[[RawRecord, str], Record]
    form: Callable[[RawRecord], bool] | None = None
    optional: tuple[str, ...] = ()
    named: bool = False

    def fits(self, record: RawRecord) -> bool:
        """Return whether the record has this shape's fields; ``kto_tag`` is another name of ``label``."""
        return all(name in record or (name == "label" and "kto_tag" in record) for name in self.needs) and (
            self.form is None or self.form(record)
        )

    @property
    def fields(self) -> str:
        """The required fields, for messages."""
        return " + ".join(self.needs)

    @property
    def reads(self) -> tuple[str, ...]:
        """All fields that are read."""
        return (*self.needs, *self.optional, *_OF_KIND[self.kind])

    def read(self, record: RawRecord, where: str, among: Sequence[Shape] | None = None) -> Record:
        """Convert a record of this shape; ``among``: the shapes that it was recognised among.

        Raises:
            MixedShapes: if the record is of another shape.
            InputError: if it is malformed; names file, line and field.
        """
        actual = recognise(record, where, among, expected=self)
        if actual.name != self.name:
            raise MixedShapes(
                f"{where}: must be of shape '{self.name}' like the file's first record, got '{actual.name}'"
            )
        return self.convert(record, where)


def recognise(
    record: RawRecord, where: str, among: Sequence[Shape] | None = None, expected: Shape | None = None
) -> Shape:
    """Return the one shape that the record's fields fit.

    Args:
        record: the raw record.
        where: ``file:line``, for messages.
        among: from :func:`shapes_named`; None: all shapes.
        expected: the shape of the file, for the message if none fits.

    Raises:
        MixedShapes: if it has the fields of several shapes, or only of one that is not ``among`` them.
        InputError: if it has the fields of none.
    """
    refuse_unsupported(record, where)
    fitting = _fitting(record, among or SHAPES)
    if len(fitting) == 1:
        if not fitting[0].named:
            refuse_other_kinds(record, where, fitting[0].name, fitting[0].kind)
        return fitting[0]
    if fitting:
        raise MixedShapes(
            f"{where}: must have the fields of one shape (name it in data.shape), "
            f"got those of {_names(fitting)}"
        )
    if among and (others := _fitting(record, SHAPES)):
        raise MixedShapes(f"{where}: must be of shape {_names(among)}, got {_names(others)}")
    fields = shown(sorted(record))
    if expected is not None:
        raise InputError(
            f"{where}: must have the fields of '{expected.name}' ({expected.fields}), got {fields}"
        )
    forms = " | ".join(dict.fromkeys(shape.fields for shape in among or SHAPES))
    raise InputError(f"{where}: must have the fields of a known shape ({forms}), got {fields}")


def shapes_named(name: str | None) -> tuple[Shape, ...] | None:
    """Return the shapes to recognise a file among: one by its name, those of a kind, or None for all.

    Raises:
        InputError: if there is no shape of that name; names the nearest.
    """
    if name is None:
        return None
    if one := next((shape for shape in SHAPES if shape.name == name), None):
        return (replace(one, form=None, named=True),)
    if of_kind := tuple(replace(shape, named=True) for shape in SHAPES if shape.kind == name):
        return of_kind
    names = [*KINDS, *(shape.name for shape in SHAPES)]
    raise InputError(f"data.shape must be one of {', '.join(names)}, got '{name}'{nearest(name, names)}")


def _fitting(record: RawRecord, among: Sequence[Shape]) -> list[Shape]:
    fitting = [shape for shape in among if shape.fits(record)]
    first = min((KINDS.index(shape.kind) for shape in fitting), default=0)
    return [shape for shape in fitting if shape.kind == KINDS[first]]


def _names(shapes: Sequence[Shape]) -> str:
    return ", ".join(f"'{shape.name}'" for shape in shapes)


# Forms: the types of values, where the names of the fields do not distinguish shapes.
def _prompt_is_list(record: RawRecord) -> bool:
    return isinstance(record["prompt"], list)


def _prompt_is_text(record: RawRecord) -> bool:
    return not isinstance(record["prompt"], list)


def _pair_form(name: str) -> Callable[[RawRecord], bool]:
    return lambda record: _form_of_pair(record) == name


def _form_of_pair(record: RawRecord) -> str:
    if "conversations" in record:
        return "pair_sharegpt"
    if "instruction" in record and "prompt" not in record:
        return "pair_alpaca"
    if isinstance(record.get("prompt"), list):
        return "pair_messages"
    if _is_list_of_objects(record["chosen"]) or _is_list_of_objects(record["rejected"]):
        return "pair_conversations"  # there may be a prompt as text too; both begin with it
    return "pair_text" if "prompt" in record else "pair_hh_rlhf"


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _pair(
    name: str, needs: tuple[str, ...], convert: Callable[[RawRecord, str], Record], *optional: str
) -> Shape:
    return Shape(name, "pair", (*needs, *preference.PAIR), convert, _pair_form(name), optional)


def _judged(
    name: str, needs: tuple[str, ...], convert: Callable[[RawRecord, str], Record], *optional: str
) -> Shape:
    return Shape(name, "unpaired", (*needs, "label"), convert, optional=optional)


_TRIPLE, _ANSWERED, _RANKED = (
    ("prompt", *preference.PAIR, preference.GOLD),
    ("prompt", "completion"),
    ("prompt", "completions"),
)
_SHAREGPT, _ALPACA = ("system", "tools"), ("input", "system", "history", "tools")
# Fields that every shape of a kind reads, where they are given.
_OF_KIND: dict[Kind, tuple[str, ...]] = {
    "triple": ("weight",),
    "pair": ("weight", "margin", *(name for names in preference.SCORES for name in names)),
    "ranked": ("weight",),
    "unpaired": ("weight", "label", "kto_tag"),
    "chat": ("weight",),
}

SHAPES: tuple[Shape, ...] = (
    Shape("triple_text", "triple", _TRIPLE, preference.triple, _prompt_is_text),
    Shape("triple_messages", "triple", _TRIPLE, preference.triple, _prompt_is_list, ("tools",)),
    _pair("pair_text", ("prompt",), preference.pair_of_text),
    _pair("pair_messages", ("prompt",), preference.pair_of_messages, "tools"),
    _pair("pair_conversations", (), preference.pair_of_conversations, "tools"),
    _pair("pair_hh_rlhf", (), preference.pair_of_hh_rlhf),
    _pair("pair_sharegpt", ("conversations",), preference.pair_of_sharegpt, *_SHAREGPT),
    _pair("pair_alpaca", ("instruction",), preference.pair_of_alpaca, *_ALPACA),
    Shape("ranked_text", "ranked", _RANKED, preference.ranked, _prompt_is_text),
    Shape("ranked_messages", "ranked", _RANKED, preference.ranked, _prompt_is_list, ("tools",)),
    replace(_judged("unpaired_text", _ANSWERED, preference.unpaired), form=_prompt_is_text),
    replace(_judged("unpaired_messages", _ANSWERED, preference.unpaired, "tools"), form=_prompt_is_list),
    _judged("unpaired_conversation", ("messages",), preference.unpaired_conversation, "tools"),
    _judged("unpaired_sharegpt", ("conversations",), preference.unpaired_sharegpt, *_SHAREGPT),
    _judged("unpaired_alpaca", ("instruction", "output"), preference.unpaired_alpaca, *_ALPACA),
    Shape("messages", "chat", ("messages",), chat.from_messages, optional=("tools",)),
    Shape("sharegpt", "chat", ("conversations",), chat.from_sharegpt, optional=_SHAREGPT),
    Shape("alpaca", "chat", ("instruction", "output"), chat.from_alpaca, optional=_ALPACA),
    Shape("prompt_completion", "chat", _ANSWERED, chat.from_text, _prompt_is_text),
    Shape(
        "prompt_completion_chat",
        "chat",
        _ANSWERED,
        chat.from_prompt_and_completion,
        _prompt_is_list,
        ("tools",),
    ),
)
# Prompts and completions as text; the others are rendered by a chat template.
PLAIN_TEXT = ("triple_text", "pair_text", "ranked_text", "unpaired_text", "prompt_completion")
FIELDS = tuple(dict.fromkeys(name for shape in SHAPES for name in shape.reads))
