"""Examples of complements that people wrote."""

from __future__ import annotations

from megatron_align.augmentation.texts import Example
from megatron_align.data.formats.fields import nonempty_text
from megatron_align.data.formats.files import expand, read_fields
from megatron_align.errors import InputError, require

COMPLEMENTS = ("complement", "ape")  # the second is the released seeds' name


def read_examples(path: str) -> dict[str | None, list[Example]]:
    """Return the examples of a file by category; None: those of categories that have none of their own.

    A record has ``prompt``, ``complement`` (or ``ape``) and may have ``category``.

    Raises:
        InputError: a record is malformed, or there is none.
    """
    examples: dict[str | None, list[Example]] = {}
    for file in expand(path):
        for where, raw in read_fields(file):
            if isinstance(raw, InputError):
                raise raw
            name = next((name for name in COMPLEMENTS if name in raw), COMPLEMENTS[0])
            category = (
                nonempty_text(raw, "category", where).strip() if raw.get("category") is not None else None
            )
            example = Example(
                prompt=nonempty_text(raw, "prompt", where),
                complement=nonempty_text(raw, name, where),
                category=category,
            )
            examples.setdefault(category, []).append(example)
    require(bool(examples), f"{path}: must hold at least one example, got none")
    return examples
