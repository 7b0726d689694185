"""Complements are appended to prompts in the field that holds them: in files, pipes, generation and evaluation."""

import io
import json
from pathlib import Path

import pytest

import megatron_align
from megatron_align.augmentation.augment import (
    Augmenter,
    AugmentOptions,
    augment_file,
    augment_lines,
    in_place,
)
from megatron_align.augmentation.texts import TEMPLATE, filled
from megatron_align.curation.chat_models import ChatOptions
from megatron_align.errors import InputError
from megatron_align.evaluation.generation import GenerateOptions, generate, generate_file
from megatron_align.rollout.types import Sampling
from megatron_align.tools.lines import arriving
from megatron_align.tools.main import main
from tests.harness import training_ranks
from tests.harness.http_server import serving

USER = {"role": "user", "content": "q"}
SHAPES = [
    ({"prompt": "q", "answer": 1}, {"prompt": "q\nc", "answer": 1}),
    ({"question": "q"}, {"question": "q\nc"}),
    ({"prompt": [USER]}, {"prompt": [{"role": "user", "content": "q\nc"}]}),
    (
        {"messages": [{"role": "system", "content": "s"}, USER, {"role": "assistant", "content": "a"}]},
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "q\nc"},
                {"role": "assistant", "content": "a"},
            ]
        },
    ),
    (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"conversations": [{"from": "human", "value": "q\nc"}, {"from": "gpt", "value": "a"}]},
    ),
    (
        {"messages": [USER, {"role": "assistant", "content": "a"}, {"role": "user", "content": "r"}]},
        {"messages": [USER, {"role": "assistant", "content": "a"}, {"role": "user", "content": "r\nc"}]},
    ),
    ({"instruction": "i", "output": "o"}, {"instruction": "i\nc", "output": "o"}),
    ({"instruction": "i", "input": "q", "output": "o"}, {"instruction": "i", "input": "q\nc", "output": "o"}),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}]},
        {"messages": [{"role": "user", "content": "q\nc"}]},
    ),
]


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def rows_of(file):
    return [json.loads(line) for line in Path(file).read_text().split("\n")[:-1]]


@pytest.fixture
def script(tmp_path):
    """Return the name of a function that always writes the complement ``c``."""
    file = tmp_path / "writer.py"
    file.write_text("def c(prompt):\n    return '' if 'nothing' in prompt else ' c '\n")
    return f"{file}:c"


@pytest.mark.parametrize("raw, augmented", SHAPES)
def test_every_shape_keeps_its_place(raw, augmented, script, tmp_path):
    assert in_place(raw, "c") == augmented
    out = tmp_path / "out.jsonl"
    augment_file(AugmentOptions(model=script), write(tmp_path / "in.jsonl", [raw]), str(out))
    assert rows_of(out) == [{**augmented, "complement": "c"}]


def test_a_pipe(script):
    lines = b"".join(json.dumps(raw).encode() + b"\n\n" for raw, _ in SHAPES)
    written = []
    batches = arriving(io.BytesIO(lines), 3)
    done = augment_lines(AugmentOptions(model=script), batches, written.append)
    assert [json.loads(line) for line in written] == [{**row, "complement": "c"} for _, row in SHAPES]
    assert done.summary() == f"{len(SHAPES)} prompts augmented"


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "standard input:2: must be a JSON object"),
        ("[1]", "standard input:2: must be a JSON object, got another value"),
        ('{"prompt": " "}', "standard input:2: field 'prompt' must not be empty"),
        ('{"text": "x"}', "standard input:2: must have a prompt"),
    ],
)
def test_bad_lines_are_named_and_unusable_records_may_pass(line, message, script):
    lines = ['{"prompt": "q"}', line]

    def batches():
        return arriving(io.BytesIO("\n".join(lines).encode()), 8)

    with pytest.raises(InputError, match=message.replace("[", r"\[")):
        augment_lines(AugmentOptions(model=script), batches(), print)
    written, keeping = [], AugmentOptions(model=script, unusable="keep")
    if line.startswith('{"'):
        done = augment_lines(keeping, batches(), written.append)
        assert json.loads(written[1]) == {**json.loads(line), "complement": None}
        assert done.summary() == "1 prompts augmented; without complement: 1 unusable"


def test_prompts_without_complement_stay_and_are_counted(script, tmp_path):
    tool = {"prompt": [USER, {"role": "assistant", "content": "a"}, {"role": "tool", "content": "t"}]}
    prompts = write(tmp_path / "in.jsonl", [{"prompt": "nothing"}, tool, {"prompt": "q"}])
    done = augment_file(AugmentOptions(model=script), prompts, str(tmp_path / "out.jsonl"))
    assert done.summary() == "1 prompts augmented; without complement: 1 empty, 1 no_user_turn"
    rows = rows_of(tmp_path / "out.jsonl")
    assert rows[0] == {"prompt": "nothing", "complement": None}
    assert rows[1] == {**tool, "complement": None}


def test_a_model_writes_what_its_template_and_generation_say(tiny_models, tmp_path):
    """The complement of a model is what ``generate`` gives for the filled template, greedy."""
    model = str(tiny_models())
    prompts = ["one", "another prompt"]
    turns = [[{"role": "user", "content": filled(TEMPLATE, prompt)}] for prompt in prompts]
    expected = [of[0].text for of in generate(model, turns, temperature=0, max_tokens=5)]
    found = megatron_align.augment(model, prompts, max_tokens=5)
    assert found == [f"{p}\n{c.strip()}" if c.strip() else p for p, c in zip(prompts, expected, strict=True)]
    chats = megatron_align.augment(model, [[{"role": "user", "content": p}] for p in prompts], max_tokens=5)
    assert [chat[0]["content"] for chat in chats] == found
    with pytest.raises(
        InputError, match=r"must fit the model .*: prompts\[0\]: its request has .* context 2048"
    ):
        megatron_align.augment(model, ["x" * 2000])
    (tmp_path / "t.txt").write_text("{prompt} or {prompt}")
    with pytest.raises(InputError, match=r"must hold \{prompt\} once, .* got it 2 times"):
        megatron_align.augment(model, ["x"], template=str(tmp_path / "t.txt"))


def test_a_model_without_chat_template_is_refused_before_anything_is_read(tiny_models, tmp_path):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny_models(), folder)
    for file in folder.glob("chat_template*"):
        file.unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="has no chat template, .*: give one by --chat-template"):
        Augmenter(AugmentOptions(model=str(folder)))
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    Augmenter(AugmentOptions(model=str(folder), chat=ChatOptions(chat_template=str(template)))).close()


def test_generation_answers_augmented_prompts_and_a_killed_one_asks_nothing_again(tiny_models, tmp_path):
    prompts = write(tmp_path / "in.jsonl", [{"prompt": f"q{i}"} for i in range(5)])
    bodies = []

    def answer(path, body):
        bodies.append(body["messages"][0]["content"])
        return 200, {"choices": [{"message": {"content": f"c{len(bodies[-1])}"}}]}

    with serving(answer) as url:
        options = {"model": str(tiny_models()), "prompts": prompts, "out": str(tmp_path / "out.jsonl"),
                   "sampling": Sampling(max_tokens=3, temperature=0), "augment": f"{url}#m"}  # fmt: skip
        counts = generate_file(GenerateOptions(**options))
        assert counts.augmented == "5 prompts augmented"
        complement = f"c{len(filled(TEMPLATE, 'q0'))}"
        rows = rows_of(tmp_path / "out.jsonl")
        assert [row["prompt"] for row in rows] == [f"q{i}\n{complement}" for i in range(5)]
        assert {row["complement"] for row in rows} == {complement}
        assert not list(tmp_path.glob(".*"))
        by_hand = generate(options["model"], [row["prompt"] for row in rows], options["sampling"])
        assert [row["completions"][0]["content"] for row in rows] == [of[0].text for of in by_hand]
        (tmp_path / "out.jsonl").unlink()
        bodies.clear()
        with pytest.raises(InputError, match="must be shorter than the model's context"):
            generate_file(
                GenerateOptions(
                    **{**options, "prompts": write(tmp_path / "l.jsonl", [{"prompt": "x" * 3000}])}
                )
            )
        assert len(bodies) == 1
        with pytest.raises(InputError, match="must be shorter"):
            generate_file(GenerateOptions(**{**options, "prompts": str(tmp_path / "l.jsonl")}))
        assert len(bodies) == 1  # kept


def test_the_same_task_is_compared_with_and_without(tiny_models, tmp_path, pool):
    """``--augment`` changes the prompts of a task and nothing that defines it: ``compare`` takes both."""
    data = write(tmp_path / "data.jsonl", [{"prompt": f"q{i}", "answer": "a"} for i in range(4)])
    (tmp_path / "writer.py").write_text("def c(prompt):\n    return 'please'\n")
    config = {"model": str(tiny_models()), "precision": "fp32",
              "tasks": [{"name": "t", "kind": "generate", "data": data, "max_tokens": 3}]}  # fmt: skip
    first, second = str(tmp_path / "plain"), str(tmp_path / "augmented")
    pool.run(2, training_ranks.evaluate, {**config, "out": first})
    pool.run(2, training_ranks.evaluate, {**config, "out": second, "augment": f"{tmp_path}/writer.py:c"})
    results = json.loads((Path(second) / "results.json").read_text())
    assert results["augment"] == f"{tmp_path}/writer.py:c"
    items = rows_of(Path(second) / "items" / "t.jsonl")
    assert [item["complement"] for item in items] == ["please"] * 4
    by_hand = generate(config["model"], [f"q{i}\nplease" for i in range(4)], temperature=0, max_tokens=3)
    assert [item["answers"] for item in items] == [[of[0].text] for of in by_hand]
    plain = rows_of(Path(first) / "items" / "t.jsonl")
    assert "complement" not in plain[0]
    assert main(["evaluate", "compare", first, second]) == 0
    chat = [{"name": "l", "kind": "loss", "data": data}]
    with pytest.raises(InputError, match="augment is for tasks of the kinds generate and judge"):
        megatron_align.evaluate({**config, "out": first, "augment": "x", "tasks": chat})
