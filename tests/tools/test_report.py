"""A report holds what the runs' files hold, in one page that needs nothing else; what cannot be read is one line."""

import html
import json
import math
import random
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import yaml

from megatron_align.config import to_dict
from megatron_align.errors import InputError
from megatron_align.objectives.configuration import load_config
from megatron_align.tools.main import main
from megatron_align.tools.report_about import about
from megatron_align.tools.report_charts import (
    MOST_POINTS,
    WIDTH,
    Line,
    Scale,
    charts_of,
    thinned,
    tick_texts,
    ticks,
    to_svg,
)
from megatron_align.tools.report_page import to_html
from megatron_align.tools.report_runs import differences, read_runs, short, summary


def write_run(folder, steps=60, seed=0, spike=None, **options):
    """Write the metrics of a DPO run and its configuration."""
    draw, rows = random.Random(seed), []
    for step in range(1, steps + 1):
        loss = 0.7 * math.exp(-step / 50) + draw.gauss(0, 0.02)
        row = {"step": step, "loss": loss, "accuracy": 0.5 + step / 250, "lr": 1e-6 * step, "tokens": 1000,
               "step_seconds": 0.5, "skipped_steps": 0, "loss_spikes": int(spike is not None and step >= spike),
               "grad_norm_outliers": 0}  # fmt: skip
        if step == spike:
            row |= {"loss": 40.0, "suspects": list(range(12)), "grad_norm": None}
        rows.append(row)
        if step % 20 == 0:
            rows.append(
                {"step": step, "split": "validation", "loss": 0.5 - step / 1000, "arc/accuracy": 0.25}
            )
            rows.append({"step": step, "split": "timing", "data_seconds": 0.1, "forward_backward_seconds": 0.6,
                         "wait_seconds": 0.2, "optimizer_seconds": 0.1, "straggler_rank": 7})  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"train": {"steps": steps, "seed": seed}, "optimizer": {"lr": 1e-6, "betas": [0.9, 0.99]}}
    for key, value in options.items():
        section, name = key.split("__")
        config.setdefault(section, {})[name] = value
    config["checkpoint"] = {"dir": str(folder)}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


class Page(HTMLParser):
    """Text, and whatever would load something from elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "line", "circle", "rect", "br"):
            self.open.append(tag)

    handle_startendtag = handle_starttag

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        self.words.append(data)


def test_one_run_end_to_end(tmp_path, capsys):
    run = write_run(tmp_path / "dpo", spike=31)
    assert main(["report", str(run), "--out", str(tmp_path / "out")]) == 0
    assert "dpo (60 steps)" in capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text()
    assert not Page(page).links
    assert "http" not in page.replace("http-equiv", "")
    text = " ".join(Page(page).words)
    for expected in ("60 of 60", "0.44 at step 60", "60,000", "30.0 s", "0 · 1 · 0", "Anomalous steps",
                     "0, 1, 2, 3, 4, 5, 6, 7 …", "slowest: rank 7 in 3 of 3", "1 outside",
                     "the objective's loss over the global batch"):  # fmt: skip
        assert expected in text, expected
    assert "Configuration differences" not in text
    pictures = {path.name for path in (tmp_path / "out" / "png").iterdir()}
    assert {"loss.png", "accuracy.png", "wait_seconds.png", "all.png"} <= pictures
    assert "arc.accuracy.png" in pictures  # of a task during training
    assert "skipped_steps.png" not in pictures  # nothing but zeros
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "out" / "png").iterdir())


def test_the_page_says_what_the_run_is(tmp_path, capsys):
    """From config.yaml and the newest checkpoint that can be read; without one, from config.yaml alone."""
    options = {"model__path": "/models/q", "data__train": ["a.jsonl", {"path": "b.jsonl", "weight": 0.5}]}
    options |= {"objective__name": "dpo", "objective__beta": 0.25, "objective__ld_alpha": None}
    options |= {
        "parallel__tensor": 2,
        "parallel__pipeline": 1,
        "parallel__context": 1,
        "train__precision": "bf16",
    }
    run = write_run(tmp_path / "run", **options, reference__mode="live", optimizer__schedule="cosine")
    [bare] = read_runs([str(run)])
    assert dict(about(bare))["layout"] == "tensor 2 x pipeline 1 x context 1"
    assert dict(about(bare))["versions"] == "–"
    card = {"world_size": 8, "versions": {"torch": "2.13.0"}, "data": {"shapes": ["pair"], "samples": 1234},
            "shape": {"architecture": "Qwen2ForCausalLM", "num_layers": 28, "hidden_size": 3584,
                      "vocab_size": 9}}  # fmt: skip
    for step, content in ((10, json.dumps(card)), (20, "{")):  # the newest is being written
        (run / f"step_{step:06d}").mkdir()
        (run / f"step_{step:06d}" / "card.json").write_text(content)
    assert main(["report", str(run), "--out", str(tmp_path / "report")]) == 0
    printed = capsys.readouterr().out
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    words = html.unescape(" ".join(Page(page).words))
    for text in (
        "/models/q: Qwen2ForCausalLM, 28 layers, hidden 3584, vocabulary 9, bf16",
        "a.jsonl, b.jsonl x 0.5: pair, 1,234 samples",
        "dpo, beta 0.25; reference live",
        "8 ranks = tensor 2 x pipeline 1 x context 1 x data 4",
        "AdamW, lr 1e-06 cosine, betas [0.9, 0.99], seed 0",
        "torch 2.13.0",
    ):
        assert text in words, text
        assert text in printed, text
    assert "objective.ld_alpha" in words  # the complete configuration, folded


def test_no_label_is_cut_off(tmp_path):
    """Every label of a chart is inside of its picture, whatever the size of the numbers."""
    run = write_run(tmp_path / "run", steps=30)
    for scale in (1e-9, 1.0, 123456.0, -7.25e-5):
        lines = [Line(0, [(step * 50_000, scale * (1 + step / 1000)) for step in range(20)])]
        for chart in charts_of(read_runs([str(run)]))[:1]:
            svg = to_svg(replace(chart, lines=lines), ["run"])
        texts = re.findall(r'<text x="([\d.-]+)"[^>]*text-anchor="(\w+)">([^<]*)<', svg)
        assert len(texts) > 4
        for x, anchor, text in texts:
            width = 6 * len(text)
            begin = float(x) - (width if anchor == "end" else width / 2)
            assert begin >= 0, (scale, text)
            assert begin + width <= WIDTH, (scale, text)


def test_charts_carry_every_point(tmp_path):
    runs = read_runs([str(write_run(tmp_path / "a")), str(write_run(tmp_path / "b", steps=30, seed=1))])
    page = to_html(runs, charts_of(runs))
    found = {}
    for label, points in re.findall(r"aria-label=\"(\w+) over steps\" data-points='(.*?)'", page):
        for line in json.loads(html.unescape(points)):
            found[label, line["name"]] = [(step, value) for step, value, _ in line["at"]]
    for run in runs:
        assert found["loss", run.name] == [(step, float(f"{y:.5g}")) for step, y in run.points("loss")]
    assert found["loss", "a, validation"] == [(20, 0.48), (40, 0.46), (60, 0.44)]
    assert found["wait_seconds", "b"] == [(20, 0.2)]


def test_runs_are_compared_by_what_differs(tmp_path):
    one = write_run(tmp_path / "x" / "dpo", objective__beta=0.1)
    options = {"objective__beta": 0.3, "objective__ld_alpha": None}  # null says no more than absence
    two = write_run(tmp_path / "y" / "dpo", data__train=["a<b.jsonl"], **options)
    runs = read_runs([str(one), str(two)])
    assert [run.name for run in runs] == ["x/dpo", "y/dpo"]
    assert differences(runs) == {"objective.beta": ["0.1", "0.3"], "data.train": ["–", '["a<b.jsonl"]']}
    page = to_html(runs, charts_of(runs))
    assert "a&lt;b.jsonl" in page
    assert "a<b.jsonl" not in page
    (two / "config.yaml").unlink()
    bare = read_runs([str(one), str(two)])
    assert "without a config.yaml: y/dpo" in " ".join(Page(to_html(bare, charts_of(bare))).words)


def test_the_same_configuration_is_said_to_be_the_same(tmp_path):
    runs = read_runs([str(write_run(tmp_path / name)) for name in ("a", "b")])
    assert differences(runs) == {}
    assert "the configurations are the same" in to_html(runs, charts_of(runs))


def test_the_summary_is_of_the_rows(tmp_path):
    [run] = read_runs([str(write_run(tmp_path / "a", steps=20))])
    told = dict(summary(run))
    losses = [row["loss"] for row in run.training]
    assert told["loss, first"] == short(losses[0])
    assert told["loss, last tenth"] == short(sum(losses[-2:]) / 2)
    assert told["tokens/s"] == "2,000"
    assert told["accuracy"] == "57.8%"
    assert told["reward margin"] == "–"


def test_the_newest_rewards_are_bars(tmp_path):
    folder = write_run(tmp_path / "reward", steps=2)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row, counts in zip(rows, ([9, 0, 0], [1, 0, 4]), strict=True):
        row["reward_histogram"] = {"edges": [0.0, 4.0], "counts": counts}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = read_runs([str(folder)])
    page = to_html(runs, charts_of(runs))
    heights = re.findall(r'<rect class="column run0" [^>]*height="([\d.]+)"', page)
    assert [float(height) for height in heights] == [35.0, 0.0, 140.0]


def test_a_run_of_one_step_is_a_dot(tmp_path):
    runs = read_runs([str(write_run(tmp_path / "a", steps=1))])
    page = to_html(runs, charts_of(runs))
    assert page.count("<circle") == len(charts_of(runs))
    assert "<polyline" not in page


def test_a_run_that_writes_its_next_row_is_read_up_to_it(tmp_path):
    folder = write_run(tmp_path / "a", steps=3)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert [row["step"] for row in read_runs([str(folder)])[0].training] == [1, 2, 3]


BROKEN = {
    "empty": ("", "metrics.jsonl has no row of a training step"),
    "validation only": (
        '{"step": 1, "split": "validation"}\n',
        "has no row of a training step",
    ),
    "no JSON": ('{"step": 1}\nloss=3\n', r"metrics.jsonl:2: must be a line of JSON"),
    "no object": ("[1]\n", r"metrics.jsonl:1: must be an object with a step, got \[1\]"),
    "no step": ('{"loss": 1}\n', "metrics.jsonl:1: must be an object with a step"),
}


@pytest.mark.parametrize("content, pattern", BROKEN.values(), ids=list(BROKEN))
def test_broken_metrics_are_one_line(tmp_path, capsys, content, pattern):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text(content)
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 2
    assert re.fullmatch(f"error: [^\n]*{pattern}[^\n]*\n", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_other_bad_input_is_one_line(tmp_path, capsys):
    run = write_run(tmp_path / "runs" / "a")
    (tmp_path / "file").write_text("")
    bad = write_run(tmp_path / "bad")
    (bad / "config.yaml").write_text("train: [1")
    for arguments, pattern in (
        ([tmp_path / "absent"], "absent is not the folder of a run: it has no metrics.jsonl"),
        ([tmp_path / "runs"], "it contains runs: .*runs/a"),
        ([run, run], "each run must be given once"),
        ([run, "--out", tmp_path / "file"], "--out must be a folder, got a file"),
        ([bad], "config.yaml is not valid YAML"),
        ([run, "--titel", "x"], "has no option --titel; did you mean '--title'"),
    ):
        assert main(["report", *map(str, arguments)]) == 2
        assert re.fullmatch(f"error: [^\n]*{pattern}[^\n]*\n", capsys.readouterr().err), pattern


def test_thinning_keeps_spikes_and_order():
    points = [(i, math.sin(i / 50)) for i in range(5000)]
    points[1234] = (1234, 99.0)
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS
    assert (1234, 99.0) in kept
    assert kept == sorted(kept)
    assert thinned(points[:10]) == points[:10]


def test_a_trend_is_drawn_of_noise_and_of_nothing_else():
    draw = random.Random(0)
    noisy = Line(0, [(i, 2 - i / 200 + draw.gauss(0, 0.1)) for i in range(200)])
    for (x, y), (at, _) in zip(noisy.smooth, noisy.points, strict=True):
        assert x == at
        assert y == pytest.approx(2 - x / 200, abs=0.15)
    schedule = Line(0, [(i, min(i / 20, 1 - i / 200)) for i in range(200)])
    counter = Line(0, [(i, int(i > 100)) for i in range(200)])
    short_one = Line(0, noisy.points[:20])
    assert (schedule.smooth, counter.smooth, short_one.smooth) == ([], [], [])


@pytest.mark.parametrize("low, high", [(0, 1), (-3.2, 7.9), (1e-7, 9e-7), (120, 64_000), (0.1, 0.1001)])
def test_ticks_are_round_and_within(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 6
    assert all(low - 1e-12 <= value <= high + 1e-12 for value in found)
    assert len(set(tick_texts(found))) == len(found)


def test_a_scale_keeps_what_is_beyond_at_its_edge():
    scale = Scale(0.0, 10.0, 100.0, 0.0)
    assert [scale(value) for value in (0, 5, 10, 99, -1)] == [100, 50, 0, 0, 100]
    assert Scale(3.0, 3.0, 0.0, 10.0)(3.0) == 5


def test_the_newest_answers_are_shown(tmp_path):
    run = write_run(tmp_path / "run") or tmp_path / "run"
    turn = {"role": "user", "content": "2 < 3?"}
    rows = [
        {"step": step, "prompt": [turn], "completion": f"yes\u2028, says {step}", "finish_reason": "stop"}
        for step in range(1, 15)
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (run / "samples.jsonl").write_text(text + '{"cut', encoding="utf-8")
    page = to_html(read_runs([str(run)]), [])
    assert "user: 2 &lt; 3?" in page
    assert [f"says {step}<" in page for step in (14, 5, 4)] == [True, True, False]
    (run / "samples.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(InputError, match=r"samples.jsonl:1: must have prompt, completion, finish_reason"):
        to_html(read_runs([str(run)]), [])


@pytest.mark.parametrize("objective, rewards", [("sft", []), ("ppo", [{"kind": "length", "min": 3}])])
def test_the_configuration_that_a_run_writes_is_read(tmp_path, objective, rewards):
    """With every section and option that there is, as rewards are a list and the critic has an optimizer."""
    config = {
        "model": {"path": "m"},
        "data": {"train": "d"},
        "objective": {"name": objective},
        "train": {"steps": 2},
        "checkpoint": {"dir": "c"},
        "rewards": rewards,
    }
    folders = [write_run(tmp_path / name, steps=2) for name in ("one", "two")]
    for folder, lr in zip(folders, (1e-5, 2e-5), strict=True):
        given = {**config, "critic": {"optimizer": {"lr": lr}}} if objective == "ppo" else config
        text = yaml.safe_dump(to_dict(load_config(given)), sort_keys=False)
        (folder / "config.yaml").write_text(text)
    runs = read_runs([str(folder) for folder in folders])
    assert runs[0].config["objective.name"] == objective
    found = differences(runs)
    assert list(found) == (["critic.optimizer"] if objective == "ppo" else [])
    if rewards:
        assert "min" in str(runs[0].config["rewards.length"])
