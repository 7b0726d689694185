"""The page of evaluations holds every metric, interval, paired difference and sample item of their files."""

import json

import pytest

from megatron_align.evaluation.compare import differences
from megatron_align.tools.main import main
from tests.tools.test_report import Page, write_run


def write_evaluation(folder, right, loss=2.0, sha="a"):
    """Write the results of two tasks: ``right`` of eight answers are right, and the losses of five chats."""
    answers = [
        {"item": i, "exact_match": float(i < right), "answers": [f"<b>{folder.name} {i}</b>\n2"]}
        for i in range(8)
    ]
    losses = [{"item": i, "loss": (loss + i) * 4, "weight": 4.0} for i in range(5)]
    (folder / "items").mkdir(parents=True)
    for name, rows in (("sums", answers), ("chat", losses)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "items" / f"{name}.jsonl").write_text(text)
    source = {"exact_match": 0.125, "n": 4, "ci95": [0.0, 0.25]}
    tasks = {
        "sums": {
            "exact_match": right / 8,
            "truncated": 0.0,
            "n": 8,
            "ci95": [0.1234, 0.9876],
            "sources": {"data/x.jsonl": source},
        },
        "chat": {"loss": loss + 2, "perplexity": 54.6, "tokens": 20, "n": 5, "ci95": [loss, loss + 4]},
    }
    results = {"tasks": tasks, "primary": {"sums": "exact_match", "chat": "loss"}, "model": f"runs/{folder.name}",
               "data": {"sums": [sha], "chat": ["c"]}, "precision": "fp32", "parallel": {"tensor": 2}}  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def report(capsys, out, *folders):
    assert main(["report", *map(str, folders), "--out", str(out)]) == 0
    return Page((out / "report.html").read_text()), capsys.readouterr().out


def test_two_evaluations_are_drawn_and_compared(tmp_path, capsys):
    first, second = write_evaluation(tmp_path / "sft", 2), write_evaluation(tmp_path / "dpo", 8, loss=1.0)
    page, printed = report(capsys, tmp_path / "out", first, second)
    assert page.open == []
    assert page.links == []
    text = " ".join(page.words)
    for shown in (
        "runs/sft",
        "runs/dpo",
        "0.2500",
        "1.0000",
        "[0.1234, 0.9876], n 8",
        "x.jsonl",
        "0.1250",
        "54.6000",
    ):
        assert shown in text, shown
    for difference in differences(first, second):
        first_value, second_value = difference.values
        low, high = difference.interval
        assert f"{second_value - first_value:+.4f} [{low:+.4f}, {high:+.4f}]" in text
        assert difference.verdict() in text
    assert "the second model is better" in text
    assert "<b>dpo 7</b>\n2" in text  # as text: nothing that a model writes becomes part of the page
    assert "sft:\nsums" in printed
    assert "[0.1234, 0.9876]" in printed
    assert not (second / "comparison.json").exists()


def test_items_are_the_worst_and_the_best(tmp_path, capsys):
    folder = write_evaluation(tmp_path / "one", 3)
    rows = [{"item": i, "loss": 2.0 * i, "weight": 2.0} for i in range(40)]
    (folder / "items" / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page, _ = report(capsys, tmp_path / "out", folder)
    start = page.words.index("one, chat: 10 of 40 items, worst first")
    shown = [word for word in page.words[start:] if word.strip()]
    order = (39, 38, 37, 36, 35, 4, 3, 2, 1, 0)
    assert [shown[4 + 3 * i] for i in range(10)] == [str(i) for i in order]
    assert [shown[5 + 3 * i] for i in range(10)] == [str(i) for i in order]  # the loss of each token


def test_evaluations_of_other_data_are_drawn_and_not_compared(tmp_path, capsys):
    first, second = write_evaluation(tmp_path / "sft", 2), write_evaluation(tmp_path / "dpo", 8, sha="other")
    page, _ = report(capsys, tmp_path / "out", first, second)
    assert any("dpo is not compared: task sums must have the same data" in word for word in page.words)


def test_answers_during_training_and_evaluations_share_the_page_of_a_run(tmp_path, capsys):
    run = write_run(tmp_path / "run", steps=3)
    row = {"step": 3, "prompt": "question", "completion": "<i>answer</i>", "finish_reason": "stop"}
    (run / "samples.jsonl").write_text(json.dumps(row) + "\n")
    page, printed = report(capsys, tmp_path / "out", run, write_evaluation(tmp_path / "dpo", 8))
    assert page.words.count("Answers during training") == 1
    assert page.words.count("<i>answer</i>") == 1
    assert "run (3 steps)" in printed
    assert "n 8" in " ".join(page.words)


def test_an_evaluation_without_its_items_is_one_line(tmp_path, capsys):
    folder = write_evaluation(tmp_path / "dpo", 8)
    (folder / "items" / "sums.jsonl").unlink()
    assert main(["report", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert "must have the items of each task" in capsys.readouterr().err
    (folder / "results.json").write_text("{}")
    assert main(["report", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert "results must have tasks, data and primary" in capsys.readouterr().err


@pytest.mark.parametrize("value", [[0.0, 0.0], None])
def test_a_metric_without_an_interval_is_drawn(tmp_path, capsys, value):
    folder = write_evaluation(tmp_path / "dpo", 0)
    results = json.loads((folder / "results.json").read_text())
    results["tasks"]["sums"]["ci95"] = value
    (folder / "results.json").write_text(json.dumps(results))
    page, _ = report(capsys, tmp_path / "out", folder)
    assert ", n 8" in " ".join(page.words)
