"""Answers during training are those of the checkpoint of their step, of shards too; no number of training changes."""

import json

from megatron_align.evaluation.generation import generate
from tests.harness import training_ranks
from tests.harness.tiny import numbers, run_arguments

PROMPTS = [{"messages": [{"role": "user", "content": f"{i} + {i}\u2028"}]} for i in range(3)]


def test_answers_are_the_checkpoints(pool, tiny_models, chat_file, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    layout = {"parallel__tensor": 2, "checkpoint__save_every": 1, "checkpoint__keep": 9, "train__steps": 3}
    asked = {"validation__generate": f"{{prompts: {file}, limit: 2, every: 2, max_tokens: 9}}"}
    plain, run = tmp_path / "plain", tmp_path / "run"
    pool.run(2, training_ranks.train, run_arguments(tiny_models(), chat_file, plain, **layout))
    pool.run(2, training_ranks.train, run_arguments(tiny_models(), chat_file, run, **layout, **asked))
    assert numbers(run) == numbers(plain)
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().split("\n")[:-1]]
    assert [row["step"] for row in rows] == [2, 2, 3, 3]
    prompts = [prompt["messages"] for prompt in PROMPTS[:2]]
    for step in (2, 3):
        answers = generate(str(run / f"step_{step:06d}"), prompts, temperature=0, max_tokens=9)
        of_step = [row for row in rows if row["step"] == step]
        assert [row["completion"] for row in of_step] == [answer.text for [answer] in answers]
        assert [row["prompt"] for row in of_step] == prompts
        assert [row["finish_reason"] for row in of_step] == [answer.finish_reason for [answer] in answers]

    before = (run / "samples.jsonl").read_bytes()
    (run / "finished").unlink()
    (run / "step_000003" / "card.json").unlink()  # it falls back to step 2, and answers again after step 3
    (run / "samples.jsonl").write_bytes(before + b'{"step": 3, "cut')
    pool.run(2, training_ranks.train, run_arguments(tiny_models(), chat_file, run, **layout, **asked))
    assert (run / "samples.jsonl").read_bytes() == before
