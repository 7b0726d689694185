"""Where rows are cut into slabs changes no number of a run; samples longer than a slab are counted."""

import pytest

from tests.harness import training_ranks
from tests.harness.marks import mark_slow
from tests.harness.tiny import metrics_of, run_arguments, write_pairs

OBJECTIVES = {
    "dpo": {"objective__name": "dpo"},
    "wpo": {"objective__name": "dpo", "objective__use_weighting": True},
    "sft": {},
}


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl")


@pytest.mark.parametrize("objective", mark_slow(OBJECTIVES, ["wpo"]))
def test_slabs_change_no_number(pool, tiny_models, chat_file, pairs_file, tmp_path, objective):
    """One slab for all, slabs of about 64 rows, slabs that no pair fits into: on one rank, or shared by two."""
    options, rows, recomputed = {"train__steps": 2, **OBJECTIVES[objective]}, {}, {}
    data = chat_file if objective == "sft" else pairs_file
    for name, layout, most in (
        ("whole", {}, None),
        ("some", {}, 64),
        ("tiny", {"parallel__tensor": 2}, 3),
        ("spread", {"parallel__context": 2}, 3),
    ):
        arguments = run_arguments(tiny_models(), data, tmp_path / name, **layout, **options)
        recomputed[name] = pool.run(2 if layout else 1, training_ranks.train_in_slabs, arguments, most)
        rows[name] = metrics_of(tmp_path / name)
    for name in ("some", "tiny", "spread"):
        for row, want in zip(rows[name], rows["whole"], strict=True):
            for key in ("loss", "grad_norm"):
                assert row[key] == pytest.approx(want[key], rel=1e-5), (name, row["step"], key)
    if objective == "sft":
        assert "recomputed_samples" not in rows["tiny"][0]  # rows are cut anywhere
    else:
        assert {row["recomputed_samples"] for row in rows["whole"]} == {0}
        assert {row["recomputed_samples"] for row in rows["tiny"]} == {12}  # the global batch
        # Two ranks share a pair's rows, and a part of some fits: the maximum of the ranks counts, pack by pack.
        first, second = recomputed["spread"]
        assert first != second
        most = sum(max(counts) for counts in zip(first, second, strict=True))
        assert sum(row["recomputed_samples"] for row in rows["spread"]) == most
