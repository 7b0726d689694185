"""Verdicts, scores and categories are read from JSON wherever it stands in a reply; both released spellings are."""

import pytest

from megatron_align.augmentation.texts import FAULTS, complement_of
from megatron_align.augmentation.verdicts import Verdict, parse_verdict
from megatron_align.curation.requests import parse_category, parse_score


@pytest.mark.parametrize("field", ["FinalAPE", "Final APE", "final_ape", "finalApe"])
def test_both_spellings_of_the_correction_are_read(field):
    reply = f'```json\n{{"Reason": "r", "Is_correct": "No", "{field}": " better "}}\n```'
    assert parse_verdict(reply) == Verdict(("unnamed",), "r", "better")


@pytest.mark.parametrize(
    "reply, faults",
    [
        ('{"Is_correct": "Yes", "FinalAPE": "ignored"}', ()),
        ('{"Is_correct": true}', ()),
        ('{"is correct": "No."}', ("unnamed",)),
        ('{"Is_correct": "Yes", "Faults": []}', ()),
        ('{"Is_correct": "Yes", "Faults": "none"}', ()),
        ('{"Is_correct": "Yes", "Faults": ["Answering"]}', ("answering",)),  # a named fault decides
        (
            '{"Is_correct": "No", "Faults": ["intent drift", "over-demanding"]}',
            ("intent_drift", "over_demanding"),
        ),
        ('{"Is_correct": "No", "Fault": "language_mismatch, taste"}', ("language_mismatch", "unnamed")),
        ('{"Is_correct": "Yes"} no, wait: {"Is_correct": "No"}', ("unnamed",)),
        ('{broken {"Is_correct": "No", "Reason": "a\nb"}', ("unnamed",)),
    ],
)
def test_faults(reply, faults):
    assert parse_verdict(reply).faults == faults


@pytest.mark.parametrize(
    "reply", ["", "Yes", "{}", '{"Is_correct": "perhaps"}', '{"Is_correct": 1}', "[" * 5000]
)
def test_no_verdict(reply):
    assert parse_verdict(reply) is None


def test_a_good_verdict_has_no_correction():
    assert parse_verdict('{"Is_correct": "Yes", "FinalAPE": "x"}').correction == ""


def test_every_fault_is_read_by_its_name():
    for name in FAULTS:
        assert parse_verdict(f'{{"Is_correct": "No", "Faults": ["{name}"]}}').faults == (name,)


def test_a_complement_is_read_without_reasoning_and_tag():
    assert complement_of("<think>\nA long\nthought</think>\n\nBe brief. ") == "Be brief."
    assert complement_of("<Complementary information>: Be brief.") == "Be brief."
    assert complement_of("Mind the <think> tag.") == "Mind the <think> tag."


def test_scores_and_categories():
    assert parse_score('score: {"score": 7.5}!') == 7.5
    assert parse_score('{"score": "3"}') == 3
    assert [parse_score(r) for r in ("7", '{"score": null}', '{"score": NaN}', '{"score": true}')] == [
        None
    ] * 4
    assert parse_category('{"category": " Maths "}', ["maths", "code"]) == "maths"
    assert parse_category('{"category": "cooking"}', ["maths", "code"]) is None
