"""ROUGE-L equals its definition by dynamic programming; a duplicate of a kept text is left out, whichever is longer."""

import random

import pytest

from megatron_align.evaluation.near_duplicates import common_subsequence, distinct, rouge_l, words_of


def by_table(one, other):
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, x in enumerate(one):
        for j, y in enumerate(other):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_the_subsequence_is_the_longest():
    draw = random.Random(0)
    for _ in range(300):
        one, other = (draw.choices("abcd", k=draw.randrange(1, 90)) for _ in range(2))
        assert common_subsequence(one, other) == by_table(one, other)


def test_words_and_f1():
    assert words_of("It's 3.5, 答案 OK") == ["it", "s", "3", "5", "答", "案", "ok"]
    assert rouge_l(["a", "b", "c", "d"], ["a", "x", "c", "d", "e", "f"]) == pytest.approx(2 * 3 / 10)
    assert rouge_l([], []) == 1
    assert rouge_l([], ["a"]) == 0


def test_the_first_of_near_duplicates_is_kept():
    texts = ["the answer is four", "The answer is: four!", "it is 4", "...", "...", "!!!"]
    assert distinct(texts, 0.7) == [0, 2, 3]
    assert distinct(texts, 1.0) == [0, 2, 3]
    assert distinct(["the answer is four", "the answer is five"], 0.75) == [0]
    assert distinct(["the answer is four", "the answer is five"], 0.76) == [0, 1]
