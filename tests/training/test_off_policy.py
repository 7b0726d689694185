"""One step off-policy: a set of rollouts is generated with the weights before the first update on the set before it.

It is the same after any kill, as a set in flight is on the disk before a checkpoint is; servers answer it while the run
trains; and the row and the rollouts say how old the weights were.
"""

import json
import time

import pytest
import torch

from megatron_align.objectives.configuration import parse
from megatron_align.rollout.rollouts import FILE, ROLLOUTS
from megatron_align.training.run_context import joined_ranks
from megatron_align.training.setup import prepare_run
from megatron_align.training.trainer import Trainer
from tests.harness import training_ranks
from tests.harness.http_server import VLLMScript, serving
from tests.harness.marks import mark_slow
from tests.harness.tiny import metrics_of, run_arguments

CLOCK = ("tokens_per_second", "step_seconds", "rollout_seconds", "sync_seconds")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": f"What is {i} + {3 * i}?"}) for i in range(30)))
    return file


def arguments(model, prompts, folder, **options):
    settings = {
        "objective__name": "grpo",
        "objective__minibatches": 2,
        "rollout__max_tokens": 6,
        "rollout__off_policy_steps": 1,
        "rollout__dynamic_sampling": "{max_batches: 2}",
        "rewards": '[{kind: regex, pattern: "[a-p]"}, {kind: length, min: 4}]',
        "train__global_batch_size": 3,
        "train__steps": 8,
        "checkpoint__save_every": 1,
        "checkpoint__keep": 9,
        **options,
    }
    return run_arguments(model, prompts, folder, **settings)


@pytest.fixture(scope="module")
def run(pool, tiny_models, prompts, tmp_path_factory):
    """Four sets of rollouts, two steps each."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    pool.run(1, training_ranks.train, arguments(tiny_models(), prompts, folder))
    return folder


def rollouts_of(folder, step):
    from pyarrow import parquet

    return parquet.read_table(folder / ROLLOUTS / f"step_{step:06d}" / FILE).to_pydict()


def test_rows_and_rollouts_say_how_old_the_weights_were(run):
    assert [row["staleness"] for row in metrics_of(run)] == [0, 1, 2, 3, 2, 3, 2, 3]
    versions = [set(rollouts_of(run, step)["weight_version"]) for step in (1, 3, 5, 7)]
    assert versions == [{0}, {0}, {2}, {4}]
    assert not list((run / ROLLOUTS).glob("generated*"))  # each was completed


def test_rollouts_are_those_of_the_older_weights(run, tiny_models):
    """By transformers: the first two sets have the log-probs of the model that the run started from, the third not."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_models(), dtype=torch.float32)
    apart = []
    for step in (1, 3, 5):
        table = rollouts_of(run, step)
        prompt, answer = table["prompt_token_ids"][4], table["token_ids"][4]
        with torch.no_grad():
            logprobs = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        found = logprobs.gather(1, torch.tensor(answer)[:, None])[:, 0]
        apart.append((found - torch.tensor(table["logprobs"][4])).abs().max().item())
    assert max(apart[:2]) < 1e-5
    assert apart[2] > 1e-3


def test_the_ratio_is_to_the_policy_before_the_set_and_the_correction_to_the_one_that_sampled(run):
    rows = metrics_of(run)
    assert [row["ratio_max"] > 1 for row in rows] == [False, True] * 4
    assert [row["mismatch_mean"] > 1e-4 for row in rows] == [False, False] + [True] * 6
    assert [row["ess"] < 1 - 1e-6 for row in rows] == [False, False] + [True] * 6


def train_and_save(rank_info, given, saved, last):
    """In a process of the pool: make steps up to ``last`` and end without notice; save after ``saved`` alone."""
    setup = prepare_run(parse(given), rank_info)
    with joined_ranks(setup) as watchdog:
        trainer = Trainer.build(setup, watchdog)
        with trainer.prefetched() as steps:
            for _ in range(last):
                trainer.train_step(next(steps))
                if trainer.step == saved:
                    trainer.save()


@pytest.mark.parametrize("saved, last", mark_slow([(1, 1), (2, 2), (1, 4), (4, 5)], [(2, 2), (1, 4), (4, 5)]))
def test_a_killed_run_goes_on_with_the_set_that_was_in_flight(
    saved, last, pool, tiny_models, prompts, run, tmp_path
):
    """Within a set and between two; also where sets after the checkpoint were made already."""
    given = arguments(tiny_models(), prompts, tmp_path)
    pool.run(1, train_and_save, given, saved, last)
    pool.run(1, training_ranks.train, given)
    rows, wanted = (
        [
            {name: v for name, v in row.items() if name not in CLOCK}
            for row in metrics_of(folder)[-(8 - saved) :]
        ]
        for folder in (tmp_path, run)
    )
    assert rows == wanted
    for folder in (run / ROLLOUTS).iterdir():
        assert (tmp_path / ROLLOUTS / folder.name / FILE).read_bytes() == (folder / FILE).read_bytes()


class WaitsForTraining(VLLMScript):
    """A vLLM server that answers the prompts of the second set when step 1 has been trained, not before."""

    def __init__(self, folder):
        super().__init__(context=256)
        self.folder, self.waited = folder, []

    def __call__(self, path, body):
        if path == "/v1/completions" and len(self.requests) >= 9:
            deadline, file = time.monotonic() + 60, self.folder / "metrics.jsonl"
            while not (file.exists() and file.read_text()) and time.monotonic() < deadline:
                time.sleep(0.05)
            self.waited.append(time.monotonic() < deadline)
        return super().__call__(path, body)


def test_servers_answer_while_the_run_trains(pool, tiny_models, prompts, tmp_path):
    script = WaitsForTraining(tmp_path / "run")
    options = {
        "rollout__engine": "vllm",
        "rollout__mismatch_stop": 1e3,  # the server makes its log-probs up
        "rollout__dynamic_sampling": "null",
        "objective__minibatches": 1,
        "train__steps": 2,
        "checkpoint__save_every": 2,
    }
    with serving(script) as url:
        given = arguments(tiny_models(), prompts, tmp_path / "run", rollout__url=url, **options)
        pool.run(1, training_ranks.train, given)
    assert script.waited == [True] * 9
    assert [row["staleness"] for row in metrics_of(tmp_path / "run")] == [0, 1]
    assert len(script.weights) == 1  # both sets are of the weights before step 1
