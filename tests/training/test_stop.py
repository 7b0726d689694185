"""A process that was started with a signal ignored ignores Ctrl-C alone: a scheduler's signals always stop the run."""

import os
import signal

import pytest

from megatron_align.training.stop import SIGNALS, StopRequests


@pytest.mark.parametrize("number", SIGNALS, ids=[number.name for number in SIGNALS])
def test_only_an_ignored_ctrl_c_stays_ignored(number):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with StopRequests() as requests:
            os.kill(os.getpid(), number)
            assert requests.signal_name == (None if number == signal.SIGINT else number.name)
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)
