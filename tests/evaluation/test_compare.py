"""Intervals hold the truth as often as they say; paired differences are found that separate intervals would miss."""

import json

import numpy as np
import pytest

from megatron_align.errors import InputError
from megatron_align.evaluation.compare import compare
from megatron_align.evaluation.results import Items
from megatron_align.evaluation.statistics import difference_interval, ratio_interval
from megatron_align.tools.main import main


def test_an_interval_is_that_of_the_mean():
    random = np.random.default_rng(1)
    values = random.normal(3, 2, 400)
    low, high = ratio_interval(values, np.ones(400))
    error = values.std() / 20
    assert (low, high) == pytest.approx(
        (values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.15 * error
    )
    weights = random.uniform(1, 9, 400)
    low, high = ratio_interval(values * weights, weights)
    assert low < (values * weights).sum() / weights.sum() < high
    assert ratio_interval(np.ones(5), np.ones(5)) == [1, 1]


def test_intervals_hold_the_truth_in_95_of_100():
    random = np.random.default_rng(2)
    held = 0
    for _ in range(100):
        low, high = ratio_interval((random.random(200) < 0.3).astype(float), np.ones(200))
        held += low <= 0.3 <= high
    assert 88 <= held <= 100  # 3 standard errors below 95


def test_pairing_finds_what_separate_intervals_miss():
    random = np.random.default_rng(3)
    difficulty, ones = random.normal(0, 3, 300), np.ones(300)
    first, second = difficulty, difficulty + 0.1 + random.normal(0, 0.1, 300)
    assert ratio_interval(first, ones)[1] > ratio_interval(second, ones)[0]
    low, high = difference_interval((first, ones), (second, ones))
    assert 0.05 < low < 0.1 < high < 0.15


def write(folder, data="h", **tasks):
    """Write results of tasks: name -> (primary metric, values, weights)."""
    results = {"tasks": {}, "primary": {}, "data": {}, "model": folder.name}
    (folder / "items").mkdir(parents=True)
    for name, (metric, values, weights) in tasks.items():
        items = Items(
            primary=metric, values={metric: values}, weights_N=weights, sources_N=np.zeros(len(values), int)
        )
        items.write(folder / "items" / f"{name}.jsonl")
        results["tasks"][name], results["primary"][name] = items.result(["x"]), metric
        results["data"][name] = data
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_sentences_say_who_is_better(tmp_path, capsys):
    random = np.random.default_rng(0)
    base, tokens = random.normal(20, 5, 200), random.integers(5, 30, 200).astype(float)
    noise = random.normal(0, 3, 200)
    first = write(
        tmp_path / "a", loss=("loss", base, tokens), same=("accuracy", noise, None), only=("x", base, None)
    )
    second = write(tmp_path / "b", loss=("loss", base - 1, tokens), same=("accuracy", -noise, None))
    assert main(["evaluate", "compare", str(first), str(second)]) == 0
    loss, same = capsys.readouterr().out.splitlines()
    assert loss.startswith("loss: the second model is better (loss ")  # lower is better
    assert same.startswith("same: no real difference")
    written = json.loads((second / "comparison.json").read_text())
    assert written["tasks"]["loss"]["sentence"] == loss
    assert (written["first"], written["second"]) == ("a", "b")
    [back, _] = compare(second, first)
    assert "the first model is better" in back.sentence()


def test_other_definitions_are_not_compared(tmp_path):
    values = np.arange(5.0)

    def defined(name, clock=None, **options):
        folder = write(tmp_path / name, t=("accuracy", values, None))
        results = json.loads((folder / "results.json").read_text())
        results["configuration"] = {"t": {"name": "t", "kind": "generate", "max_tokens": 8, **options}}
        results |= {"clock": {"t": clock} if clock else {}, "template_date": clock and clock["%d"]}
        (folder / "results.json").write_text(json.dumps(results))
        return folder

    one = defined("a", data="x.jsonl", workers=3)
    compare(one, defined("b", data="elsewhere/x.jsonl", workers=4))  # the same items, wherever their file is
    with pytest.raises(
        InputError,
        match=r"task t must be defined identically .*got max_tokens 8 and 9, stop null and 'absent' in",
    ):
        compare(one, defined("c", max_tokens=9, stop="absent"))
    with pytest.raises(InputError, match="got chat_template null and 'a file'"):
        compare(one, defined("d", chat_template="t.jinja"))
    with pytest.raises(InputError, match=r"template_date 01 and 02"):
        compare(defined("e", clock={"%d": "01"}), defined("f", clock={"%d": "02"}))
    compare(one, tmp_path / "f")  # the first one's template reads no date


def test_files_next_to_the_data_are_compared_where_both_have_their_hash(tmp_path):
    """Results of an older version have the hashes of the data only."""
    values, folders = np.arange(5.0), {}
    for name, files in (("old", None), ("a", "1"), ("b", "1"), ("c", "2")):
        folders[name] = write(tmp_path / name, t=("accuracy", values, None))
        results = json.loads((folders[name] / "results.json").read_text())
        results |= {} if files is None else {"files": {"t": {"chat_template": files}}}
        (folders[name] / "results.json").write_text(json.dumps(results))
    compare(folders["old"], folders["a"])
    compare(folders["a"], folders["b"])
    with pytest.raises(InputError, match="task t must be .* got chat_template files of different content in"):
        compare(folders["a"], folders["c"])


def test_texts_with_other_line_separators_are_one_item(tmp_path):
    values, texts = np.arange(5.0), ["\u2028", "\u2029", "\x85", "\x0b\x0c", "\x1c\x1d\x1e"]
    folders = []
    for name in "ab":
        folders.append(write(tmp_path / name, t=("accuracy", values, None)))
        items = Items(
            primary="accuracy",
            values={"accuracy": values},
            sources_N=np.zeros(5, int),
            rows=[{"answers": [f"one{text}line"]} for text in texts],
        )
        items.write(folders[-1] / "items" / "t.jsonl")
    assert compare(*folders)[0].n == 5


def test_a_task_without_numbers_of_its_items_is_named_and_the_others_are_compared(tmp_path, capsys):
    """Metrics such as lm-eval's word_perplexity are no means over items, of which they have no number."""
    values, folders = np.arange(5.0), []
    for name in "ab":
        tasks = {"wikitext": ("word_perplexity", values, None), "t": ("accuracy", values, None)}
        folders.append(write(tmp_path / name, **tasks))
        rows = "".join(json.dumps({"item": i}) + "\n" for i in range(5))
        (folders[-1] / "items" / "wikitext.jsonl").write_text(rows)
    assert main(["evaluate", "compare", *map(str, folders)]) == 0
    wikitext, t = capsys.readouterr().out.splitlines()
    assert wikitext == "wikitext: not compared, its items have no word_perplexity of their own"
    assert t.startswith("t: no real difference")
    assert (
        json.loads((folders[1] / "comparison.json").read_text())["tasks"]["wikitext"]["sentence"] == wikitext
    )
    for folder in folders:
        results = json.loads((folder / "results.json").read_text())
        del results["tasks"]["t"]
        (folder / "results.json").write_text(json.dumps(results))
    with pytest.raises(InputError, match="no task can be compared: wikitext: not compared"):
        compare(*folders)


def test_other_items_are_not_compared(tmp_path):
    values = np.arange(5.0)
    one = write(tmp_path / "a", t=("accuracy", values, None))
    with pytest.raises(InputError, match="same data and metric .* of other files"):
        compare(one, write(tmp_path / "b", data="other", t=("accuracy", values, None)))
    with pytest.raises(InputError, match="5 items with accuracy .* 4 items with accuracy"):
        compare(one, write(tmp_path / "c", t=("accuracy", values[:4], None)))
    with pytest.raises(InputError, match="must share a task"):
        compare(one, write(tmp_path / "d", other=("accuracy", values, None)))
    with pytest.raises(InputError, match="no results of an evaluation"):
        compare(one, tmp_path)
