"""Fields of other tools' data that change what is trained there and are not read here: refused, never ignored.

``data.columns`` gives the way out: ``{weight: sample_weight}`` reads a column under another name, ``{images: null}``
leaves one alone.
"""

from __future__ import annotations

import re
from typing import Any

from megatron_align.data.formats.fields import RawRecord
from megatron_align.errors import InputError, shown

_TEXT_ONLY = "cannot be trained, as only text is"
_REFERENCE = "is not read: the run computes the log-probs of its reference (reference.path)"
_WEIGHT = "is not read: 'weight' is a sample's weight, and 'train' of a turn decides whether it is trained"
_MASK = "is not read: the chat template decides what is trained, and 'train' of each turn"
_LOGPS = ("ref_{}_logps", "reference_{}_logps", "reference_{}_logprobs")
_REFUSED: dict[str, str] = {
    "chat_template_kwargs": "is not supported yet",
    **{
        f"{medium}{ending}": _TEXT_ONLY
        for medium in ("image", "video", "audio")
        for ending in ("", "s", "_path", "_paths", "_url", "_urls", "_file", "_files", "_bytes")
    },
    **dict.fromkeys(("pixel_values", "input_features"), _TEXT_ONLY),
    **dict.fromkeys(
        ("sample_weight", "sample_weights", "weights", "loss_weight", "loss_weights", "token_weights"),
        _WEIGHT,
    ),
    **dict.fromkeys(("loss_mask", "loss_scale", "assistant_masks", "completion_mask"), _MASK),
    **dict.fromkeys(("mask_history", "train_on_inputs"), _MASK),
    **{name.format(answer): _REFERENCE for name in _LOGPS for answer in ("chosen", "rejected")},
    **dict.fromkeys(("ref_logps", "reference_logps", "reference_KL_logps"), _REFERENCE),
    **dict.fromkeys(("margins", "reward_margin"), "is not read: 'margin' is a pair's margin"),
}
# Of a turn only: in other tools they decide whether it is trained.
_REFUSED_IN_TURNS = {
    **_REFUSED,
    **dict.fromkeys(("mask", "masked", "training", "train_detail", "train_on_turn"), _MASK),
}
_JUDGED = re.compile(r"(^|[^a-z])(chosen|rejected|dispreferred)([^a-z]|$)", re.IGNORECASE)


def refuse_unsupported(item: RawRecord, where: str, prefix: str = "") -> None:
    """Refuse fields that would change what is trained and are not supported.

    Args:
        item: a record, or one of its turns.
        where: ``file:line``, for messages.
        prefix: of a turn's fields, as in ``messages[0].``.
    """
    refused = _REFUSED_IN_TURNS if prefix else _REFUSED
    for name in refused.keys() & item.keys():
        if _is_given(item[name]):
            remedy = "" if prefix else f"; data.columns {{{name}: null}} leaves it alone"
            raise InputError(
                f"{where}: field '{prefix}{name}' {refused[name]}, got {shown(item[name])}{remedy}"
            )


def refuse_other_kinds(record: RawRecord, where: str, shape: str, kind: str) -> None:
    """Refuse fields of a preference pair in a record that was recognised as something else.

    SWIFT's ``rejected_response``, for example, would otherwise be left alone, and its pairs trained as chat.
    """
    if kind in ("pair", "triple"):
        return
    for name in record:
        if _JUDGED.search(name) and _is_given(record[name]):
            raise InputError(
                f"{where}: field '{name}' is of a preference pair, which needs 'chosen' and 'rejected', got shape "
                f"'{shape}'; name its columns in data.columns ({{rejected: {name}}}), or leave it alone with "
                f"data.shape {shape}"
            )


def _is_given(value: Any) -> bool:
    """Return whether a field says something: not an empty one, which tables have in rows without it."""
    return value is not None and value is not False and value != [] and value != {} and value != ""
