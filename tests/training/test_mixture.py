"""Law 1 for mixtures, weighted samples and steps of tokens: the same steps and losses on any layout, resumed or not."""

import json

import pytest
import yaml

from tests.harness import training_ranks
from tests.harness.tiny import metrics_of, run_arguments, write_chat

SAME = 1e-5  # fp32, sums in another order


@pytest.fixture
def mixture(tmp_path):
    """Two chat files, the first at half weight, the second with weights of its samples; as a configuration."""
    half, weighted = (
        write_chat(tmp_path / "half.jsonl", 30, seed=1),
        write_chat(tmp_path / "w.jsonl", 20, seed=2),
    )
    records = [json.loads(line) for line in weighted.read_text().splitlines()]
    lines = [json.dumps({**record, "weight": 0.5 + i % 3}) for i, record in enumerate(records)]
    weighted.write_text("\n".join(lines) + "\n")
    sources = [{"path": str(half), "weight": 0.5}, str(weighted)]
    config = tmp_path / "mixture.yaml"
    config.write_text(yaml.safe_dump({"data": {"train": sources, "validation": sources}}))
    return config


def arguments(model, config, folder, **options):
    """A run over two epochs in steps of 1500 tokens."""
    tokens = {"train__global_batch_size": "null", "train__global_batch_tokens": 1500}
    listed = run_arguments(
        model, "-", folder, **{**tokens, "train__steps": "null", "train__epochs": 2, **options}
    )
    at = listed.index("--data.train")
    return ["--config", str(config), *listed[:at], *listed[at + 2 :]]


def test_layouts_and_resuming_keep_the_steps(pool, tiny_models, mixture, tmp_path):
    model = tiny_models()
    pool.run(1, training_ranks.train, arguments(model, mixture, tmp_path / "one", checkpoint__save_every=2))
    one = metrics_of(tmp_path / "one")
    assert sum(row["samples"] for row in one) == 2 * (15 + 20)
    assert all(row["tokens"] <= 1500 for row in one)
    assert len({row["samples"] for row in one}) > 1
    pool.run(2, training_ranks.train, arguments(model, mixture, tmp_path / "two", data__packing=False))
    # the first two steps alone, then the others on another layout
    until = {"train__epochs": "null", "train__steps": 2}
    pool.run(1, training_ranks.train, arguments(model, mixture, tmp_path / "again", **until))
    pool.run(2, training_ranks.train, arguments(model, mixture, tmp_path / "again", parallel__tensor=2))
    for folder in ("two", "again"):
        for split in (None, "validation"):
            rows = metrics_of(tmp_path / folder, split)
            expected = metrics_of(tmp_path / "one", split)
            if split == "validation":
                rows, expected = rows[-1:], expected[-1:]
            assert [row["step"] for row in rows] == [row["step"] for row in expected]
            for row, other in zip(rows, expected, strict=True):
                assert row["loss"] == pytest.approx(other["loss"], rel=SAME)
                assert row.get("tokens") == other.get("tokens")
                assert row.get("samples") == other.get("samples")
