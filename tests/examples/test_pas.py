"""The example of prompt augmentation: its words are learnt, and augmentation decides what cannot be guessed."""

import pytest

from examples.pas import run, words


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
    found = run.main(tmp_path / "out")
    assert found["plain"] < 0.7
    assert found["augmented"] > 0.9
