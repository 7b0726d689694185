"""The planner: what it shows fits, what it writes runs, and it never needs more than a config.json."""

import re
from dataclasses import replace

import pytest
import yaml

from megatron_align.cost.chips import CHIPS
from megatron_align.cost.memory import GIB
from megatron_align.cost.search import HEADROOM, PlanRequest, best, candidates, run_seconds
from megatron_align.cost.time import one_pass_seconds
from megatron_align.cost.work import full_packs
from megatron_align.model.families import read_shape
from megatron_align.objectives.configuration import parse
from megatron_align.tools.main import main
from megatron_align.tools.plan_text import why
from tests.harness.sizes import write_config
from tests.harness.tiny import run_arguments

RUN = """
model: {{path: {model}}}
data: {{train: nowhere.jsonl, sequence_length: {length}}}
objective: {{name: {objective}}}
parallel: {{tensor: {tensor}}}
train: {{global_batch_size: 64, steps: 10}}
checkpoint: {{dir: {folder}/run}}
"""


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sizes")
    return {size: write_config(folder / size, size) for size in ("qwen2_7b", "qwen2_72b")}


def write_run(folder, model, objective="sft", tensor=8, length=8192):
    file = folder / "run.yaml"
    file.write_text(RUN.format(model=model, folder=folder, objective=objective, tensor=tensor, length=length))
    return file


def ask_for(folder, model, gpus, gib, **options):
    config = parse(["--config", str(write_run(folder, model, **options))])
    return PlanRequest(
        config=config,
        shape=read_shape(model),
        gpus=gpus,
        bytes=round(gib * GIB),
        chip=CHIPS["h100"],
        work=full_packs(config),
    )


def test_what_is_shown_fits_and_the_quickest_stands_first(sizes, tmp_path):
    ask = ask_for(tmp_path, sizes["qwen2_7b"], 8, 80)
    found = best(ask, 5)
    assert len(found) >= 3
    assert all(one.peak <= ask.bytes and one.placement.world_size == 8 for one in found)
    order = [(not one.has_headroom(ask.bytes), one.time.total) for one in found]
    assert order == sorted(order)
    for one in found:  # recomputed only where it must be, for memory that stays free
        assert (one.placement.recompute_layers > 0) == (one.peak_unless_recomputed is not None)
        assert one.peak_unless_recomputed is None or one.peak_unless_recomputed > ask.bytes * (1 - HEADROOM)


def test_a_layout_with_headroom_comes_first(sizes, tmp_path):
    """A faster layout that fills the memory is shown too, where no other has its ranks."""
    ample = best(ask_for(tmp_path, sizes["qwen2_7b"], 8, 141), 1)[0]
    tight = ask_for(tmp_path, sizes["qwen2_7b"], 8, ample.peak / GIB / 0.97)  # it would fit with 3% free
    assert ample.placement in [one.placement for one in candidates(tight) if one.peak <= tight.bytes]
    first = best(tight, 1)[0]
    assert first.has_headroom(tight.bytes)
    assert first.time.total > ample.time.total
    assert "little headroom" in why(tight, next(one for one in candidates(tight) if one.peak == ample.peak))


def test_the_time_of_the_run_is_steps_and_a_pass_of_the_reference(sizes, tmp_path, capsys):
    ask = ask_for(tmp_path, sizes["qwen2_7b"], 8, 80, objective="dpo")
    one = best(ask, 1)[0]
    assert run_seconds(ask, one) is None
    once = one_pass_seconds(one.placement, one.work, ask.chip)
    total = run_seconds(replace(ask, steps=10, epochs=2.0), one)
    assert total == pytest.approx(10 * one.time.total + 5 * once)
    file = write_run(tmp_path, sizes["qwen2_7b"])
    assert main(["plan", "--config", str(file), "--gpus", "8", "--gpu-memory", "80"]) == 0
    said = capsys.readouterr().out
    total = re.search(
        r"total      about ([\d.]+) (s|min) and ([\d.]+) GPU-hours for 10 steps on 8 GPUs", said
    )
    seconds = float(total[1]) * {"s": 1, "min": 60}[total[2]]
    assert float(total[3]) == pytest.approx(8 * seconds / 3600, rel=0.1)
    more = ["--train.steps=null", "--train.epochs=2"]
    assert main(["plan", "--config", str(file), "--gpus", "8", "--gpu-memory", "80", *more]) == 0
    assert "total      not known: 2 epochs of data that are not tokenised" in capsys.readouterr().out


def test_more_memory_is_never_slower(sizes, tmp_path):
    quickest = [
        best(ask_for(tmp_path, sizes["qwen2_7b"], 8, gib), 1)[0].time.total for gib in (24, 40, 80, 141)
    ]
    assert quickest == sorted(quickest, reverse=True)
    assert quickest[0] > quickest[-1]


def test_checkpoints_of_merged_layers_hold_least_near_the_square_root(sizes, tmp_path):
    """The report's k = sqrt(L / n): of the divisors of a stage's layers, the plan takes the best or the next to it."""
    from megatron_align.cost.activations import boundary_bytes, layer_bytes

    tight = [
        one
        for one in candidates(ask_for(tmp_path, sizes["qwen2_72b"], 64, 45, length=16384))
        if one.peak_unless_recomputed is not None and one.placement.parallel.pipeline == 1
    ]
    assert tight
    for one in tight:
        n = layer_bytes(one.placement, 16384) / boundary_bytes(one.placement, 16384)
        k = (80 / n) ** 0.5
        assert k / 2 <= one.placement.recompute_layers <= 2 * k


def test_nothing_fits(sizes, tmp_path, capsys):
    file = write_run(tmp_path, sizes["qwen2_72b"])
    assert main(["plan", "--config", str(file), "--gpus", "8", "--gpu-memory", "80"]) == 1
    said = capsys.readouterr().out
    assert "does not fit" in said
    least = re.search(r"nothing fits: the least that 8 GPUs need is ([\d.]+) GiB each, ([\d.]+) more", said)
    assert float(least[1]) - float(least[2]) == pytest.approx(80, abs=0.11)  # both are rounded
    assert "most of it is optimizer" in said
    gpus = int(re.search(r"(\d+) GPUs would suffice", said)[1])
    [larger] = best(ask_for(tmp_path, sizes["qwen2_72b"], gpus, 80), 1)
    assert larger.placement.world_size == gpus
    assert larger.peak <= 80 * GIB
    assert not best(ask_for(tmp_path, sizes["qwen2_72b"], gpus // 2, 80), 1)


def test_the_file_it_writes_is_the_first_layout(sizes, tmp_path, capsys):
    file, out = write_run(tmp_path, sizes["qwen2_7b"], "dpo"), tmp_path / "planned.yaml"
    arguments = ["plan", "--config", str(file), "--gpus", "8", "--gpu-memory", "80", "--write", str(out)]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "reference cached" in said
    first = next(line for line in said.splitlines() if line.startswith("  1 ")).split()
    written = parse(["--config", str(out)])
    assert [str(written.parallel.tensor), str(written.parallel.pipeline)] == first[1:3]
    assert str(written.train.recompute_layers or "-") == first[6]
    before = parse(["--config", str(file)])
    assert (written.data, written.optimizer, written.objective) == (
        before.data,
        before.optimizer,
        before.objective,
    )
    assert main(arguments) == 2
    assert f"--write needs a new file, '{out}' exists" in capsys.readouterr().err


def test_real_lengths_count_where_there_are_data(tiny_models, chat_file, tmp_path, capsys):
    """Short samples in long packs attend to less than full packs would; and nothing is left behind."""
    model, run = tiny_models("qwen2_tied"), tmp_path / "run"
    options = run_arguments(model, chat_file, run)
    keys = dict(zip(options[::2], options[1::2], strict=True))
    settings = {}
    for key, value in keys.items():
        section, _, name = key.removeprefix("--").partition(".")
        settings.setdefault(section, {})[name] = yaml.safe_load(value)
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(settings))
    assert main(["plan", "--config", str(file), "--gpus", "2", "--gpu-memory", "8"]) == 0
    said = capsys.readouterr().out
    assert "lengths of data.train, 64 samples" in said
    assert not run.exists()
    tokens = int(re.search(r"12 samples, ([\d,]+) tokens", said)[1].replace(",", ""))
    assert 0 < tokens < 12 * 256


@pytest.mark.parametrize(
    "options, message",
    [
        (["--gpus", "0"], "--gpus: must be a positive whole number, got 0"),
        (["--gpu-memory", "-1"], "--gpu-memory: must be a positive number, got -1"),
        (["--efficiency", "1.5"], r"must be in \(0, 1\], got 1.5"),
        (["--chip", "h10"], "--chip must be one of a100, .*; got 'h10'.*h100"),
    ],
)
def test_bad_options(sizes, tmp_path, capsys, options, message):
    file = write_run(tmp_path, sizes["qwen2_7b"])
    given = {"--gpus": "8", "--gpu-memory": "80", options[0]: options[1]}
    arguments = [part for pair in given.items() for part in pair]
    assert main(["plan", "--config", str(file), *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_layout_that_does_not_divide_is_said_and_others_are_found(sizes, tmp_path, capsys):
    file = write_run(tmp_path, sizes["qwen2_7b"], tensor=3)
    assert main(["plan", "--config", str(file), "--gpus", "8", "--gpu-memory", "80"]) == 0
    assert "world size must be a multiple of tensor x pipeline x context = 3" in capsys.readouterr().out


def test_options_of_the_run_may_stand_beside(sizes, tmp_path, capsys):
    file, own = write_run(tmp_path, sizes["qwen2_7b"]), ["--gpus", "8", "--gpu-memory", "80", "--count", "1"]
    changes = ["--data.sequence_length=4096", "--train.global_batch_size", "24"]
    assert main(["plan", "--config", str(file), *changes, *own]) == 0
    assert "4,096 tokens" in capsys.readouterr().out
    assert main(["plan", "--config", str(file), *own, "--data.sequence_lenth", "4096"]) == 2
    assert "did you mean 'data.sequence_length'" in capsys.readouterr().err


def test_a_run_on_rollouts_is_planned_from_its_prompts(tiny_models, tmp_path, capsys):
    """Their lengths with the longest completions, the critic of ppo in a column of its own."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "What is {i}?"}}\n' for i in range(8)))
    options = {"objective__name": "ppo", "rollout__max_tokens": 16, "train__global_batch_size": 4}
    file = tmp_path / "run.yaml"
    file.write_text("rewards: [{kind: length, min: 3}]\n")
    arguments = run_arguments(tiny_models(), prompts, tmp_path / "run", **options)
    assert main(["plan", "--config", str(file), "--gpus", "2", "--gpu-memory", "80", *arguments]) == 0
    said = capsys.readouterr().out
    assert "data       8 prompts, each with 3 completions of 16 tokens" in said
    assert re.search(r"stage .* engine +critic +total", said)
    assert "step       4 samples" in said
