"""Results come in the order of their calls whatever each takes, and an error at the place of its call."""

import time

import pytest

from megatron_align.errors import InputError
from megatron_align.storage.threads import in_order


def test_results_are_in_order_and_few_are_computed_before_they_are_used():
    started = []

    def call(number):
        def run():
            started.append(number)
            time.sleep(0.002 * (number % 3))
            return number

        return run

    seen = []
    for number in in_order(map(call, range(40))):
        seen.append(number)
        assert len(started) <= len(seen) + 8
    assert seen == list(range(40))


def test_an_error_is_raised_at_the_place_of_its_call():
    def fail():
        raise InputError("the second")

    results = in_order([lambda: 1, fail, lambda: 3])
    assert next(results) == 1
    with pytest.raises(InputError, match="the second"):
        next(results)
