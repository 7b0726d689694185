"""Data tools write records in order, as they were; clusters equal a brute-force search, shares those of an epoch."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron_align.config import DataSource
from megatron_align.curation import dedup as dedup_module
from megatron_align.curation import label as label_module
from megatron_align.curation.chat_models import ChatOptions
from megatron_align.curation.clusters import LayeredClusters
from megatron_align.curation.dedup import dedup
from megatron_align.curation.embeddings import open_embeddings
from megatron_align.curation.label import LabelOptions, label
from megatron_align.curation.mixture import passes_of, split
from megatron_align.curation.raw_prompts import RawPrompt
from megatron_align.curation.select import SelectOptions, select
from megatron_align.data.batching.sampler import EpochOrder
from megatron_align.errors import InputError
from megatron_align.objectives.configuration import parse
from megatron_align.tools.main import main
from tests.harness.http_server import serving


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def rows_of(file):
    return [json.loads(line) for line in Path(file).read_text().split("\n")[:-1]]


def test_dedup_compares_prompts_or_all_texts(tmp_path):
    rows = [
        {"prompt": "Write a poem about the sea", "completion": "Waves.", "id": 1},
        {"prompt": "write a poem  about the sea", "completion": "The wind is in the sails today."},
        {"prompt": "What is two plus two, please?", "completion": "4"},
    ]
    data = write(tmp_path / "in.jsonl", rows)
    counts = dedup(data, str(tmp_path / "prompts.jsonl"), 0.7)
    assert (counts.records, counts.kept) == (3, 2)
    assert rows_of(tmp_path / "prompts.jsonl") == [rows[0], rows[2]]
    assert dedup(data, str(tmp_path / "records.jsonl"), 0.7, "record").kept == 3
    bad = write(tmp_path / "bad.jsonl", [*rows, {"prompt": ""}, {"id": 3}])
    with pytest.raises(InputError, match=r"bad.jsonl:4: field 'prompt' must not be empty"):
        dedup(bad, str(tmp_path / "bad_out.jsonl"), 0.7)
    counts = dedup(bad, str(tmp_path / "good.jsonl"), 0.7, skip_bad=True)
    assert (counts.records, counts.kept, counts.bad) == (3, 2, 2)


def test_dedup_by_embeddings_compares_with_every_distinct_record(tmp_path, monkeypatch):
    monkeypatch.setattr(dedup_module, "CHUNK", 3)
    random = np.random.default_rng(1)
    vectors = random.normal(size=(40, 3))
    rows = [{"prompt": f"p{i}", "e": vector.tolist()} for i, vector in enumerate(vectors)]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    kept = []
    for i, vector in enumerate(vectors):
        if not any(vectors[k] @ vector >= 0.9 for k in kept):
            kept.append(i)
    assert 5 < len(kept) < 35
    data = write(tmp_path / "in.jsonl", rows)
    dedup(data, str(tmp_path / "out.jsonl"), 0.9, embeddings="column:e")
    assert rows_of(tmp_path / "out.jsonl") == [rows[i] for i in kept]


def test_labelling_that_stops_sends_no_request_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(label_module, "CHUNK", 2)
    bodies, dies_after = [], 3

    def answer(path, body):
        if len(bodies) >= dies_after:
            return 400, "gone"
        text = body["messages"][0]["content"]
        bodies.append(text)
        content = '{"score": 7}' if text.startswith("Rate") else '{"category": "code"}'
        if "q3" in text:
            content = "I do not know."
        return 200, {"choices": [{"message": {"content": content}}]}

    rows = [{"prompt": f"q{i}", "id": i} for i in range(5)]
    with serving(answer) as url:
        options = LabelOptions(
            data=write(tmp_path / "in.jsonl", rows),
            out=str(tmp_path / "out.jsonl"),
            quality=f"{url}#m",
            labels=f"{url}#m",
            categories=("maths", "code"),
            failures=0,
            tries=1,
            chat=ChatOptions(workers=1, tries=1),
        )
        with pytest.raises(InputError, match="1 requests failed, 0 are allowed"):
            label(options)
        dies_after = 100
        counts = label(options)
    assert len(bodies) == len(set(bodies)) == 10
    assert (counts.records, counts.unscored) == (5, 1)
    assert counts.categories == {"code": 4, "": 1}
    expected = [{**row, "quality": 7.0, "category": "code"} for row in rows]
    expected[3] |= {"quality": None, "category": None}
    assert rows_of(tmp_path / "out.jsonl") == expected
    assert not list(tmp_path.glob(".out*"))


def brute_force(vectors, thresholds):
    """Return the path of each vector: in each layer the most similar earlier leader within the same cluster."""
    leaders, paths = [], []  # leaders: (path of the cluster they are in, number, vector)
    for vector in vectors:
        path = ()
        for threshold in thresholds:
            own = [(number, other) for parent, number, other in leaders if parent == path]
            cosines = [float(other @ vector) for _, other in own]
            if cosines and max(cosines) >= threshold:
                number = own[int(np.argmax(cosines))][0]
            else:
                number = len(own)
                leaders.append((path, number, vector))
            path = (*path, number)
        paths.append(path)
    return paths


def test_clusters_equal_a_brute_force_search():
    random = np.random.default_rng(0)
    centres = random.normal(size=(6, 8))
    vectors = centres[random.integers(6, size=200)] + 0.6 * random.normal(size=(200, 8))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    clusters = LayeredClusters((0.5, 0.7, 0.9))
    paths = [clusters.add(3 * vector) for vector in vectors]  # lengths do not matter
    assert paths == brute_force(vectors, (0.5, 0.7, 0.9))
    assert clusters.counts == [len({path[: k + 1] for path in paths}) for k in range(3)]
    assert 1 < clusters.counts[0] < clusters.counts[1] < clusters.counts[2] < 200
    with pytest.raises(InputError, match="must be increasing cosines"):
        LayeredClusters((0.9, 0.5))
    with pytest.raises(InputError, match="must have a direction"):
        clusters.add(np.zeros(8))


def test_selection_keeps_the_best_of_each_cluster_within_the_bounds(tmp_path):
    rows = [
        {"prompt": f"p{i}", "level": level, "quality": quality, "e": e}
        for i, (level, quality, e) in enumerate(
            [(1, 5, [1, 0]), (3, 1, [1, 0.1]), (3, 9, [1, 0.05]), (9, 9, [0, 1]), (4, 2, [0, 2]), (0, 9, [0, 1])]
        )
    ]  # fmt: skip
    data = write(tmp_path / "in.jsonl", rows)
    options = {"data": data, "difficulty": "level", "easiest": 1, "hardest": 5}
    counts = select(SelectOptions(**options, out=str(tmp_path / "bounds.jsonl")))
    assert (counts.records, counts.too_easy, counts.too_hard, counts.selected) == (6, 1, 1, 4)
    assert rows_of(tmp_path / "bounds.jsonl") == [rows[0], rows[1], rows[2], rows[4]]
    options |= {"embeddings": "column:e", "layers": (0.5, 0.9)}
    counts = select(SelectOptions(**options, best="quality", out=str(tmp_path / "best.jsonl")))
    assert rows_of(tmp_path / "best.jsonl") == [{**rows[2], "cluster": "0.0"}, {**rows[4], "cluster": "1.0"}]
    assert (counts.clusters, counts.redundant) == ([2, 2], 2)
    select(SelectOptions(**options, per_cluster=2, out=str(tmp_path / "first.jsonl")))
    assert [row["prompt"] for row in rows_of(tmp_path / "first.jsonl")] == ["p0", "p1", "p4"]


def test_embeddings_of_a_model_do_not_depend_on_the_batch(tiny_models, tmp_path):
    prompts = [RawPrompt(text=t, raw={}, where="f:1") for t in ("a", "a longer text", "bb")]
    embed = open_embeddings(str(tiny_models()), 64)
    together = embed(prompts)
    assert together.shape == (3, 64)
    for prompt, vector in zip(prompts, together, strict=True):
        np.testing.assert_allclose(embed([prompt])[0], vector, atol=1e-5)  # fp32, another padding
    file = tmp_path / "mine.py"
    file.write_text("def two(texts):\n    return [[len(t), 1] for t in texts]\n")
    assert open_embeddings(f"{file}:two", 1)(prompts).tolist() == [[1, 1], [13, 1], [2, 1]]
    with pytest.raises(InputError, match="field 'e' must be a list of numbers, got"):
        open_embeddings("column:e", 1)(prompts)


def test_shares_are_those_of_the_samples_of_an_epoch(tmp_path):
    kinds = ["math"] * 10 + ["code"] * 40 + [None] * 8 + ["a/b"] * 2
    rows = [{"prompt": f"p{i}", "completion": "c", "kind": kind} for i, kind in enumerate(kinds)]
    data = write(tmp_path / "in.jsonl", rows)
    parts = split(data, "kind", str(tmp_path / "mix"), {"math": 0.2}, {"code": 0.2})
    assert [part.value for part in parts] == ["a/b", "code", "math", "none"]
    sources = json.loads((tmp_path / "mix" / "mixture.json").read_text())
    assert [Path(source["path"]).name for source in sources] == [
        "a_b.jsonl",
        "code.jsonl",
        "math.jsonl",
        "none.jsonl",
    ]
    found = [rows_of(source["path"]) for source in sources]
    assert [len(of) for of in found] == [2, 40, 10, 8]
    assert sorted(json.dumps(r) for of in found for r in of) == sorted(json.dumps(r) for r in rows)
    order = EpochOrder(np.repeat(np.arange(4), [2, 40, 10, 8]), [source["weight"] for source in sources])
    epochs = np.concatenate([order.samples(epoch) for epoch in range(20)])
    drawn = Counter(np.digitize(epochs, [2, 42, 52]).tolist())
    assert drawn[2] / len(epochs) == pytest.approx(0.2, abs=0.002)
    assert drawn[1] == 20 * 8
    for part, value in zip(parts, (0, 1, 2, 3), strict=True):
        assert drawn[value] / len(epochs) == pytest.approx(part.share, abs=0.002)
    text = (tmp_path / "mix" / "mixture.json").read_text()
    config = parse(["--model.path=m", "--checkpoint.dir=c", "--train.steps=1", f"--data.train={text}"])
    assert config.data.train == [
        DataSource(**source) for source in sources
    ]  # what the run's config.yaml records


def test_shares_of_all_values_and_impossible_ones():
    assert passes_of({"a": 10, "b": 30}, {"a": 0.5, "b": 0.5}, {}) == {"a": 2.0, "b": pytest.approx(2 / 3)}
    with pytest.raises(InputError, match="must leave some to b"):
        passes_of({"a": 10, "b": 30}, {"a": 1.0}, {})
    with pytest.raises(InputError, match="must sum to 1, got 0.9"):
        passes_of({"a": 10, "b": 30}, {"a": 0.5, "b": 0.4}, {})


@pytest.mark.parametrize(
    "arguments, line",
    [
        (
            ["mix", "--by", "kind", "--share", "maths=0.2"],
            "no record has 'maths' in the field 'kind', its values are",
        ),
        (["mix", "--by", "kind", "--share", "math"], "--share must be VALUE=NUMBER, got math"),
        (
            ["mix", "--by", "kind", "--share", "math=0.2", "--weight", "math=2"],
            "a share or a weight, got both for math",
        ),
        (["select"], "select needs bounds of difficulty or embeddings, got neither"),
        (
            ["select", "--difficulty", "kind", "--easiest", "1"],
            "in.jsonl:1: field 'kind' must be a finite number",
        ),
        (["label"], "data label writes the columns of quality or labels, got neither"),
        (["dedup", "--duplicates", "0"], "must be in (0, 1], got 0"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(arguments, line, tmp_path, capsys):
    data = write(tmp_path / "in.jsonl", [{"prompt": "p", "kind": "math"}, {"prompt": "q", "kind": "code"}])
    assert main(["data", arguments[0], "--data", data, "--out", str(tmp_path / "out"), *arguments[1:]]) == 2
    err = capsys.readouterr().err
    assert line in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_commands_print_what_they_did(tmp_path, capsys):
    rows = [{"prompt": "one", "kind": "a"}, {"prompt": "one", "kind": "b"}, {"prompt": "two", "kind": "b"}]
    data = write(tmp_path / "in.jsonl", rows)
    assert main(["data", "dedup", "--data", data, "--out", f"{tmp_path}/a.jsonl"]) == 0
    assert capsys.readouterr().out == f"2 of 3 records kept, 1 near duplicates left out: {tmp_path}/a.jsonl\n"
    assert (
        main(["data", "mix", "--data", data, "--by", "kind", "--share", "a=0.5", "--out", f"{tmp_path}/m"])
        == 0
    )
    assert "a" + 9 * " " + "1         2     50.0%\n" in capsys.readouterr().out
