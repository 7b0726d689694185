"""Each instruction accepts an answer that follows it and rejects one that does not; the metrics count them."""

import pytest

from megatron_align.errors import InputError
from megatron_align.rollout.verifiers.instructions import INSTRUCTIONS, METRICS, judge, require_known

# instruction -> (arguments, answers that follow it, answers that do not)
CASES = {
    "keywords:existence": ({"keywords": ["Cat", "dog"]}, ["a cat, a DOG"], ["a cat"]),
    "keywords:frequency": (
        {"keyword": "ab", "frequency": 2, "relation": "at least"},
        ["ab Ab"],
        ["ab"],
    ),
    "keywords:forbidden_words": ({"forbidden_words": ["bad"]}, ["badly done"], ["so Bad."]),
    "keywords:letter_frequency": (
        {"letter": "e", "let_frequency": 2, "let_relation": "less than"},
        ["one"],
        ["Eve here"],
    ),
    "language:response_language": (
        {"language": "de"},
        ["Das ist nicht der Weg zu dem Haus"],
        ["This is not the way to the house", "Это не дорога"],
    ),
    "length_constraints:number_sentences": (
        {"num_sentences": 2, "relation": "at least"},
        ["One is here. Two is 3.5 big!"],
        ["Only 3.5 of one"],
    ),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, ["a\n***\nb"], ["a", "a *** *** b"]),
    "length_constraints:number_words": (
        {"num_words": 3, "relation": "at least"},
        ["one two three"],
        ["one two"],
    ),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Hello"},
        ["x\n\n'hello, you"],
        ["hello\n\nx", "x\n\nhello\n\ny"],
    ),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, ["[a] and [b]"], ["[a]"]),
    "detectable_content:postscript": ({"postscript_marker": "P.S."}, ["Yours\nP.S. more"], ["Yours"]),
    "detectable_format:number_bullet_lists": (
        {"num_bullets": 2},
        ["* a\n- b"],
        ["* a", "* a\n* b\n* c", "**a**\n* b"],
    ),
    "detectable_format:constrained_response": ({}, ["My answer is yes."], ["Yes."]),
    "detectable_format:number_highlighted_sections": (
        {"num_highlights": 2},
        ["*a* and **b**"],
        ["*a*", "** **"],
    ),
    "detectable_format:multiple_sections": (
        {"section_spliter": "Section", "num_sections": 2},
        ["Section 1\nx\nSection 2\ny"],
        ["Section 1\nx"],
    ),
    "detectable_format:json_format": ({}, ['```json\n{"a": 1}\n```', "[1]"], ["{a: 1}"]),
    "detectable_format:title": ({}, ["<<A title>>\ntext"], ["<< >>", "A title"]),
    "combination:two_responses": ({}, ["a\n******\nb"], ["a", "a******a", "a******b******c"]),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Say it"}, ["say it\nyes"], ["yes, say it"]),
    "startend:end_checker": ({"end_phrase": "The end."}, ['So. the END."'], ["The end. Or not"]),
    "startend:quotation": ({}, ['"quoted"'], ['"half', '"']),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "less than"},
        ["ONE only"],
        ["ONE TWO"],
    ),
    "change_case:english_capital": ({}, ["ALL CAPITALS!"], ["Not all"]),
    "change_case:english_lowercase": ({}, ["all small"], ["Not all"]),
    "punctuation:no_comma": ({}, ["no such sign"], ["one, two"]),
}


def record(name, arguments):
    return {"instruction_id_list": [name], "kwargs": [arguments]}


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_an_instruction_accepts_and_rejects(name):
    arguments, good, bad = CASES[name]
    for answer in good:
        assert judge(answer, record(name, arguments))["prompt_strict"] == 1, answer
    for answer in bad:
        assert judge(answer, record(name, arguments))["prompt_strict"] == 0, answer


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("hi", "यह एक घर है"),
        ("ja", "これは家です"),
        ("zh", "这是一个房子"),
        ("ru", "это дом"),
        ("en", "this is not the house"),
    ],
)
def test_a_language_is_recognised_among_the_others(language, text):
    for other in ("hi", "ja", "zh", "ru", "en", "fr"):
        followed = judge(text, record("language:response_language", {"language": other}))["prompt_strict"]
        assert followed == (other == language), other


def test_metrics_count_prompts_and_instructions_strictly_and_loosely():
    both = {
        "instruction_id_list": ["punctuation:no_comma", "change_case:english_lowercase"],
        "kwargs": [{}, {}],
    }
    assert judge("no sign", both) == dict.fromkeys(METRICS, 1.0)
    assert judge("Sure, here:\nno sign", both) == {
        "prompt_strict": 0.0,
        "instruction_strict": 0.0,
        "prompt_loose": 1.0,
        "instruction_loose": 1.0,
    }
    assert judge("One", both)["instruction_strict"] == 0.5
    assert judge("", both)["prompt_loose"] == 0.0


@pytest.mark.parametrize(
    ("bad", "line"),
    [
        ({}, "instruction_id_list"),
        (record("punctuation:no_coma", {}), "did you mean 'punctuation:no_comma'"),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": []}, "a list of 1 mappings"),
        (record("keywords:existence", {}), "must have keywords"),
    ],
)
def test_bad_instructions_name_file_and_field(bad, line):
    with pytest.raises(InputError, match=line):
        require_known(bad, "x.jsonl:3")
