"""Near duplicates by MinHash-LSH are those of the exact Jaccard similarity; few pairs are missed, none is invented."""

import random

import pytest

from megatron_align.data.near_duplicates import (
    MISSED,
    PERMUTATIONS,
    NearDuplicates,
    bands_of,
    jaccard,
    missed,
    shingles_of,
)
from megatron_align.errors import InputError


def exact(texts, threshold):
    """Return for each text whether an earlier, kept one is as similar as this: the law."""
    kept, found = [], []
    for text in texts:
        shingles = shingles_of(text)
        found.append(any(jaccard(shingles, other) >= threshold for other in kept))
        if not found[-1]:
            kept.append(shingles)
    return found


def texts_of(seed, count=150):
    """Return texts and variants of them, from nearly equal to half rewritten."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 7))) for _ in range(60)]
    texts = [" ".join(draw.choices(words, k=25)) for _ in range(count // 3)]
    while len(texts) < count:
        changed = draw.choice(texts).split()
        for place in draw.sample(range(len(changed)), draw.randint(0, 8)):
            changed[place] = draw.choice(words)
        texts.append(" ".join(changed))
    draw.shuffle(texts)
    return texts


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9])
def test_equals_exact_jaccard(threshold):
    texts = texts_of(seed=int(threshold * 10))
    near = NearDuplicates(threshold)
    found = [near.add(i, text) for i, text in enumerate(texts)]
    expected = exact(texts, threshold)
    assert 10 < sum(expected) < 120
    assert [place is not None for place in found] == expected
    for i, place in enumerate(found):
        if place is not None:
            assert place < i
            assert jaccard(shingles_of(texts[i]), shingles_of(texts[place])) >= threshold


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.95, 1.0])
def test_bands_miss_at_most_the_stated_share(threshold):
    bands, rows = bands_of(threshold)
    assert 1 <= bands * rows <= PERMUTATIONS
    assert missed(threshold, bands, rows) <= MISSED


def test_case_and_white_space_do_not_matter():
    near = NearDuplicates(1.0)
    assert near.add("a", "Write  a poem\n") is None
    assert near.add("b", "write a poem") == "a"
    assert near.add("c", "hi") is None
    assert near.add("d", "写一首诗") is None
    assert near.add("e", "写一首诗") == "d"
    with pytest.raises(InputError, match=r"in \(0, 1\]"):
        NearDuplicates(1.5)
