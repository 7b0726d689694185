"""Calibration of a reward model: probabilities that come true have no error, and those that do not have theirs."""

import math

import pytest

from benchmarks.alignment import calibration


def logit(p):
    return math.log(p / (1 - p))


def test_probabilities_that_come_true_have_no_calibration_error():
    margins = [logit(0.75)] * 75 + [-logit(0.75)] * 25
    found = calibration(margins)
    assert found["accuracy"] == 0.75
    assert found["ece"] == pytest.approx(0, abs=1e-12)
    assert found["brier"] == pytest.approx(0.75 * 0.25)
    assert found["nll"] == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))


def test_one_that_is_always_right_and_never_sure_is_as_far_off_as_one_that_is_sure_and_often_wrong():
    assert calibration([logit(0.73)] * 10)["ece"] == pytest.approx(0.27)
    assert calibration([50.0] * 73 + [-50.0] * 27)["ece"] == pytest.approx(0.27)


def test_errors_of_two_bins_do_not_cancel():
    """Too sure in one bin and not sure enough in another."""
    margins = [logit(0.6)] * 10 + [logit(0.9)] * 5 + [-logit(0.9)] * 5
    assert calibration(margins)["ece"] == pytest.approx((0.4 + 0.4) / 2)


def test_a_margin_of_any_size_is_taken():
    found = calibration([1000.0, -1000.0, 0.0])
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert found["nll"] == pytest.approx((1000 + math.log(2)) / 3)
