"""An error that every rank raises is printed once, by rank 0 if it gets there, however late the ranks are."""

import threading
import time

import pytest

from megatron_align import errors


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """The file that torchrun names to each rank: those of one launch share the folder above it."""
    (tmp_path / "attempt_0").mkdir()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "attempt_0" / "0" / "error.json"))
    return tmp_path / "attempt_0"


def report(rank, line):
    return threading.Thread(target=errors.report_once, args=(rank, ValueError(line), 2))


def test_ranks_that_waited_too_long_say_it_once_and_a_late_rank_0_not_again(launch, monkeypatch, capsys):
    monkeypatch.setattr(errors, "REPORT_SECONDS", 0.01)
    ranks = [report(str(rank), "no") for rank in (1, 2, 3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert errors.report_once("0", ValueError("no"), 2) == 2
    assert capsys.readouterr().err == "error: no\n"


def test_the_others_leave_once_rank_0_has_said_it(launch, monkeypatch, capsys):
    """However long they may wait."""
    monkeypatch.setattr(errors, "REPORT_SECONDS", 1e6)
    other = report("1", "of rank 1")
    other.daemon = True
    other.start()
    time.sleep(0.1)
    errors.report_once("0", ValueError("of rank 0"), 2)
    other.join(60)
    assert not other.is_alive()
    assert capsys.readouterr().err == "error: of rank 0\n"


@pytest.mark.parametrize("rank", ["0", "1"])
def test_it_is_printed_where_no_file_can_be(rank, launch, monkeypatch, capsys):
    """Without torchrun, or when its folder is gone."""
    monkeypatch.setattr(errors, "REPORT_SECONDS", 0.01)
    launch.rmdir()
    assert errors.report_once(rank, ValueError("no"), 2) == 2
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    assert errors.report_once(rank, ValueError("no"), 1) == 1
    assert capsys.readouterr().err == "error: no\n" * 2
