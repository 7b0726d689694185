"""Law 4 under fire: one run, killed thirty times at random, each time gone on with on another layout; law 1 holds from
the first step to the last. ``make soak``; SOAK_SEED and SOAK_KILLS draw other and longer ones.
"""

import os
import random
import time

import pytest

from megatron_align.checkpoint.folder import list_steps
from megatron_align.faults import POINTS
from tests.harness import crash
from tests.harness.tiny import make_model, metrics_of, run_arguments

SEED, KILLS = int(os.environ.get("SOAK_SEED", "0")), int(os.environ.get("SOAK_KILLS", "30"))
TENSOR, PIPELINE = {"parallel__tensor": 2}, {"parallel__pipeline": 2}
LAYOUTS = {
    "tp2": (2, TENSOR),
    "pp2": (2, PIPELINE),
    "vpp2": (2, {**PIPELINE, "parallel__virtual_pipeline": 2}),
    "dp2": (2, {}),
    "dp3": (3, {}),
    "tp2_pp2": (4, {**TENSOR, **PIPELINE}),
    "tp2_dp2": (4, TENSOR),
    "pp2_dp2": (4, PIPELINE),
}
# Rank 0 comes there for certain: what it does alone, and files, as data-parallel replicas write none.
ALONE = ("row.write", "save.begun", "save.file", "save.named", "save.done")
STRIKES = [point for point in POINTS if point not in ("resume.aside", "prune.hidden")]


def saved(run):
    return max((step for step, _ in list_steps(run)), default=0)


def kill_at_a_point(draw, world, arguments, run, log):
    point = draw.choice(STRIKES)
    rank = 0 if point in ALONE else draw.randrange(world)
    fault = f"kill@{point}:{saved(run) + draw.randint(1, 2)}:{rank}"
    return fault, crash.train(world, arguments, log, fault)


def kill_at_a_moment(draw, world, arguments, run, log):
    """All ranks at once, or one of them, some time after a step."""
    victims = range(world) if draw.random() < 0.5 else [draw.randrange(world)]
    pause = draw.uniform(0.0, 0.3)
    file, row = run / "metrics.jsonl", f'"step": {saved(run) + 1},'
    before = file.stat().st_ino if file.exists() else None  # a run that goes on replaces the file

    def has_made_a_step():
        return file.exists() and file.stat().st_ino != before and row in file.read_text()

    ranks = crash.start(world, arguments, log)
    crash.wait_until(has_made_a_step, ranks, timeout=300)
    time.sleep(pause)
    for victim in victims:
        ranks[victim].kill()
    return f"{list(victims)} after {pause:.2f} s", crash.end(ranks)


@pytest.mark.slow
def test_a_run_survives_random_kills_on_random_layouts(chat_file, tmp_path):
    draw = random.Random(SEED)
    run, log = tmp_path / "run", tmp_path / "log"
    model = make_model(tmp_path / "model")
    steps = 2 * KILLS

    def command(folder, **options):
        settings = {"train__steps": steps, "train__global_batch_size": 6, "optimizer__lr": 1e-4}
        settings |= {"checkpoint__save_every": 1, "data__cache": tmp_path / "cache", **options}
        return run_arguments(model, chat_file, folder, **settings)

    whole = command(tmp_path / "whole", checkpoint__save_every=steps)
    assert crash.train(1, whole, log) == [0], log.read_text()
    kills = 0
    while kills < KILLS:
        name = draw.choice(list(LAYOUTS))
        world, layout = LAYOUTS[name]
        arguments = command(run, checkpoint__async_save=draw.random() < 0.5, **layout)
        strike = draw.choice((kill_at_a_point, kill_at_a_point, kill_at_a_moment))
        told, codes = strike(draw, world, arguments, run, log)
        assert -9 in codes, f"{name}, {told}: {codes}\n{log.read_text()[-3000:]}"
        kills += 1
        print(f"kill {kills}: {name}, {told}, saved {saved(run)} of {steps}", flush=True)
    assert crash.train(1, command(run), log) == [0], log.read_text()[-3000:]
    rows = metrics_of(run)
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    for got, want in zip(rows, metrics_of(tmp_path / "whole"), strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-5), got["step"]
    assert crash.writers_of(log) == []
