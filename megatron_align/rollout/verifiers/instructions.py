"""Instruction checks of IFEval (Zhou et al. 2023, arXiv:2311.07911), written here: nothing is downloaded.

A record has ``instruction_id_list`` and ``kwargs``, one mapping of arguments for each instruction. The metrics are
shares of prompts (all instructions followed) and of instructions, strict and loose; loose also accepts the answer
without its first line, last line or asterisks. Two checks are approximations, as the published ones need language
models of other packages: sentences are counted by their final punctuation, and the language is recognised by its
script, or among languages of the Latin script by its commonest words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from megatron_align.data.formats.fields import RawRecord, bad_field
from megatron_align.errors import InputError, nearest

METRICS = (
    "prompt_strict",
    "instruction_strict",
    "prompt_loose",
    "instruction_loose",
)
Arguments = Mapping[str, Any]

# First and last code point of the script of each language.
_SCRIPTS = {
    **dict.fromkeys(("hi", "mr", "ne"), ("\u0900", "\u097f")),
    **dict.fromkeys(("ar", "fa", "ur"), ("\u0600", "\u06ff")),
    **dict.fromkeys(("ru", "bg", "uk"), ("\u0400", "\u04ff")),
    "bn": ("\u0980", "\u09ff"),
    "pa": ("\u0a00", "\u0a7f"),
    "gu": ("\u0a80", "\u0aff"),
    "ta": ("\u0b80", "\u0bff"),
    "te": ("\u0c00", "\u0c7f"),
    "kn": ("\u0c80", "\u0cff"),
    "th": ("\u0e00", "\u0e7f"),
    "ko": ("\uac00", "\ud7af"),
    "he": ("\u0590", "\u05ff"),
    "el": ("\u0370", "\u03ff"),
    "zh": ("\u4e00", "\u9fff"),
}
_KANA = ("\u3040", "\u30ff")
_COMMON_WORDS = {
    "en": "the of and to in is that it for was with as are this be on not you",
    "de": "der die und in den von zu das mit sich des auf ist im dem nicht ein eine",
    "fr": "de la le et les des en un du une que est pour qui dans par sur pas",
    "es": "de la que el en y los se del las un por con una su para es al",
    "it": "di e il la che in un per una sono non del con le si da è dei",
    "pt": "de a o que e do da em um para com uma os no se na por mais não",
    "nl": "de van het een en in is dat op te zijn met voor niet aan er die",
    "fi": "ja on ei että se oli hän mutta kun ovat joka myös niin tai sen",
    "sw": "ya na wa kwa ni katika za la kuwa cha hii yake hiyo kama au",
    "vi": "và của là có cho không được trong một các những người với này",
}


def require_known(record: RawRecord, where: str) -> None:
    """Check the instructions of a record.

    Raises:
        InputError: they are missing, unknown, or lack an argument.
    """
    names, arguments = record.get("instruction_id_list"), record.get("kwargs")
    if not isinstance(names, list) or not names:
        raise bad_field(where, "instruction_id_list", "a non-empty list", names)
    if not isinstance(arguments, list) or len(arguments) != len(names):
        raise bad_field(
            where, "kwargs", f"a list of {len(names)} mappings, one for each instruction", arguments
        )
    for i, (name, given) in enumerate(zip(names, arguments, strict=True)):
        if name not in INSTRUCTIONS:
            raise InputError(
                f"{where}: field 'instruction_id_list[{i}]' must be a known instruction, got {name!r}"
                f"{nearest(str(name), list(INSTRUCTIONS))}"
            )
        if not isinstance(given, dict):
            raise bad_field(where, f"kwargs[{i}]", "a mapping", given)
        lacking = [key for key in INSTRUCTIONS[name][1] if given.get(key) is None]
        if lacking:
            raise InputError(
                f"{where}: field 'kwargs[{i}]' must have {', '.join(lacking)} for {name}, got {given}"
            )


def judge(answer: str, record: Arguments) -> dict[str, float]:
    """Return the metrics of one answer: 1 or 0 for the prompt, the share of its instructions."""
    names, arguments = record["instruction_id_list"], record["kwargs"]
    scores = {}
    for mode, texts in (("strict", [answer]), ("loose", _loose(answer))):
        followed = [
            any(text.strip() and INSTRUCTIONS[name][0](text, given) for text in texts)
            for name, given in zip(names, arguments, strict=True)
        ]
        scores[f"prompt_{mode}"] = float(all(followed))
        scores[f"instruction_{mode}"] = sum(followed) / len(followed)
    return scores


def _loose(answer: str) -> list[str]:
    lines = answer.split("\n")
    texts = [answer, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return texts + [text.replace("*", "") for text in texts]


def _compare(count: int, relation: str, than: float) -> bool:
    return count < than if relation == "less than" else count >= than


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def _sentences(text: str) -> int:
    return len(re.findall(r"[^.!?。！？]*\w[^.!?。！？]*(?:[.!?。！？]+(?=\s|$|[\"')\]])|$)", text))


def _found(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text, re.MULTILINE))


def _keywords(text: str, given: Arguments) -> bool:
    return all(re.search(re.escape(word), text, re.IGNORECASE) for word in given["keywords"])


def _frequency(text: str, given: Arguments) -> bool:
    count = len(re.findall(re.escape(given["keyword"]), text, re.IGNORECASE))
    return _compare(count, given["relation"], given["frequency"])


def _forbidden(text: str, given: Arguments) -> bool:
    return not any(re.search(rf"\b{re.escape(w)}\b", text, re.IGNORECASE) for w in given["forbidden_words"])


def _letters(text: str, given: Arguments) -> bool:
    count = text.lower().count(str(given["letter"]).lower())
    return _compare(count, given["let_relation"], given["let_frequency"])


def _language(text: str, given: Arguments) -> bool:
    language = str(given["language"]).lower()
    letters = [c for c in text if c.isalpha() or "\u0900" <= c <= "\u0dff"]
    if not letters:
        return True
    kana = sum(_KANA[0] <= c <= _KANA[1] for c in letters)
    if language == "ja":
        return kana > 0.1 * len(letters)
    if language in _SCRIPTS:
        first, last = _SCRIPTS[language]
        own = sum(first <= c <= last for c in letters)
        return own > 0.5 * len(letters) and (language != "zh" or not kana)
    if 2 * sum(c <= "\u024f" or "\u1e00" <= c <= "\u1eff" for c in letters) < len(letters):
        return False  # mostly of another script
    counts = {
        name: sum(word in common.split() for word in _words(text.lower()))
        for name, common in _COMMON_WORDS.items()
    }
    return language in counts and counts[language] == max(counts.values())


def _paragraphs(text: str, given: Arguments) -> bool:
    return _parts(re.split(r"\s?\*\*\*\s?", text), given["num_paragraphs"]) is not None


def _parts(parts: list[str], count: int) -> list[str] | None:
    """Return the parts between separators without empty ones at the ends; None: an empty one inside, another number."""
    if not parts[0].strip():
        parts = parts[1:]
    if parts and not parts[-1].strip():
        parts = parts[:-1]
    return parts if len(parts) == count and all(part.strip() for part in parts) else None


def _first_word(text: str, given: Arguments) -> bool:
    paragraphs = [part for part in text.split("\n\n") if part.strip()]
    nth = int(given["nth_paragraph"])
    if len(paragraphs) != given["num_paragraphs"] or nth > len(paragraphs):
        return False
    word = re.match(r"\w+", paragraphs[nth - 1].strip().lstrip("'\""))
    return word is not None and word[0].lower() == str(given["first_word"]).lower()


def _postscript(text: str, given: Arguments) -> bool:
    marker = str(given["postscript_marker"])
    known = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return bool(re.search(known.get(marker, re.escape(marker.lower())), text.lower()))


def _bullets(text: str, given: Arguments) -> bool:
    return _found(r"^\s*\*[^*].*$", text) + _found(r"^\s*-.*$", text) == given["num_bullets"]


def _highlights(text: str, given: Arguments) -> bool:
    marked = re.findall(r"\*[^\n*]*\*", text) + re.findall(r"\*\*[^\n*]*\*\*", text)
    return sum(bool(part.strip("*").strip()) for part in marked) >= given["num_highlights"]


def _sections(text: str, given: Arguments) -> bool:
    return _found(rf"\s?{re.escape(given['section_spliter'])}\s?\d+\s?", text) >= given["num_sections"]


def _json(text: str, given: Arguments) -> bool:
    body = re.sub(r"^```(?:json)?|```$", "", text.strip(), flags=re.IGNORECASE).strip()
    try:
        json.loads(body)
    except (ValueError, RecursionError):
        return False
    return True


def _two_answers(text: str, given: Arguments) -> bool:
    parts = _parts(text.split("******"), 2)
    return parts is not None and parts[0].strip() != parts[1].strip()


def _quoted(text: str, given: Arguments) -> bool:
    body = text.strip()
    return len(body) > 1 and body[0] == body[-1] == '"'


def _capital_words(text: str, given: Arguments) -> bool:
    count = sum(word.isupper() for word in _words(text))
    return _compare(count, given["capital_relation"], given["capital_frequency"])


_CHOICES = ("My answer is yes.", "My answer is no.", "My answer is maybe.")

# instruction -> its check, and the arguments that it needs
INSTRUCTIONS: dict[str, tuple[Callable[[str, Arguments], bool], tuple[str, ...]]] = {
    "keywords:existence": (_keywords, ("keywords",)),
    "keywords:frequency": (_frequency, ("keyword", "frequency", "relation")),
    "keywords:forbidden_words": (_forbidden, ("forbidden_words",)),
    "keywords:letter_frequency": (_letters, ("letter", "let_frequency", "let_relation")),
    "language:response_language": (_language, ("language",)),
    "length_constraints:number_sentences": (
        lambda text, given: _compare(_sentences(text), given["relation"], given["num_sentences"]),
        ("num_sentences", "relation"),
    ),
    "length_constraints:number_paragraphs": (_paragraphs, ("num_paragraphs",)),
    "length_constraints:number_words": (
        lambda text, given: _compare(len(_words(text)), given["relation"], given["num_words"]),
        ("num_words", "relation"),
    ),
    "length_constraints:nth_paragraph_first_word": (
        _first_word,
        ("num_paragraphs", "nth_paragraph", "first_word"),
    ),
    "detectable_content:number_placeholders": (
        lambda text, given: _found(r"\[.*?\]", text) >= given["num_placeholders"],
        ("num_placeholders",),
    ),
    "detectable_content:postscript": (_postscript, ("postscript_marker",)),
    "detectable_format:number_bullet_lists": (_bullets, ("num_bullets",)),
    "detectable_format:constrained_response": (lambda text, _: any(c in text for c in _CHOICES), ()),
    "detectable_format:number_highlighted_sections": (_highlights, ("num_highlights",)),
    "detectable_format:multiple_sections": (_sections, ("section_spliter", "num_sections")),
    "detectable_format:json_format": (_json, ()),
    "detectable_format:title": (
        lambda text, _: any(title.strip() for title in re.findall(r"<<([^\n]+?)>>", text)),
        (),
    ),
    "combination:two_responses": (_two_answers, ()),
    "combination:repeat_prompt": (
        lambda text, given: text.strip().lower().startswith(given["prompt_to_repeat"].strip().lower()),
        ("prompt_to_repeat",),
    ),
    "startend:end_checker": (
        lambda text, given: text.strip().strip('"').lower().endswith(given["end_phrase"].strip().lower()),
        ("end_phrase",),
    ),
    "startend:quotation": (_quoted, ()),
    "change_case:capital_word_frequency": (_capital_words, ("capital_frequency", "capital_relation")),
    "change_case:english_capital": (lambda text, _: text.isupper(), ()),
    "change_case:english_lowercase": (lambda text, _: text.islower(), ()),
    "punctuation:no_comma": (lambda text, _: "," not in text, ()),
}
