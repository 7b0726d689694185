"""The example of prompt augmentation: its words are learnt, and augmentation decides what cannot be guessed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from examples.pas import run, words

ROOT = Path(__file__).parents[2]


def test_the_task_cannot_be_answered_without_the_complement():
    drawn = words.words(400, seed=0)
    assert len(set(drawn)) == 400
    vowels = [word for word in drawn if words.category(word) == "vowel"]
    assert 80 < len(vowels) < 200
    alone = [row["messages"] for row in run.chats(drawn) if "\n" not in row["messages"][0]["content"]]
    ways = [turns[1]["content"] == turns[0]["content"].upper() for turns in alone]
    assert 150 < sum(ways) < 250


@pytest.mark.slow
def test_augmentation_gains(tmp_path):
    command = [sys.executable, "-m", "examples.pas.run", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    plain, augmented = map(float, re.findall(r"([\d.]+)%", done.stdout.splitlines()[-1]))
    assert plain < 70
    assert augmented > 90
