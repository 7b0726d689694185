"""A generated file is the same however often its process was killed, and its answers are transformers'."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_align import faults
from megatron_align.errors import InputError
from megatron_align.evaluation import generation
from megatron_align.evaluation.engines import open_engine
from megatron_align.evaluation.generation import GenerateOptions, generate, generate_file
from megatron_align.rollout.types import Sampling
from megatron_align.tools.main import main
from tests.harness import training_ranks
from tests.harness.http_server import VLLMScript as Server
from tests.harness.http_server import serving
from tests.harness.tiny import make_model, run_arguments


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def options(tiny_models, chat_file, tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "CHUNK", 4)
    sampling = Sampling(completions=2, max_tokens=6)
    return {
        "model": str(tiny_models()),
        "prompts": str(chat_file),
        "out": str(tmp_path / "out.jsonl"),
        "sampling": sampling,
        "limit": 11,
    }


def test_a_killed_generation_continues_to_the_same_file(options, tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    counts = generate_file(GenerateOptions(**options))
    assert (counts.prompts, counts.resumed, counts.completions) == (11, 0, 22)
    expected = out.read_bytes()
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(InputError, match="must be a new file"):
        generate_file(GenerateOptions(**options))
    out.unlink()

    writes = iter((None, "full"))
    real = faults.at
    monkeypatch.setattr(
        faults, "at", lambda *_: real("row.write") if next(writes, None) is None else disk_full()
    )
    with pytest.raises(OSError):
        generate_file(GenerateOptions(**options))
    monkeypatch.setattr(faults, "at", real)
    partial = tmp_path / ".out.jsonl.partial"
    assert partial.read_bytes() == b"".join(expected.splitlines(keepends=True)[:4])
    with pytest.raises(InputError, match=r"other options \(.*completions.*\)"):
        generate_file(GenerateOptions(**{**options, "sampling": Sampling(completions=1, max_tokens=6)}))
    key = tmp_path / ".out.jsonl.partial.key"
    noted = key.read_text()
    key.write_text(json.dumps({**json.loads(noted), "weights": [["model.safetensors", 1, 2]]}))
    with pytest.raises(
        InputError, match=r"begun by an older version, .*: delete .*\.partial and .*\.key to begin"
    ):
        generate_file(GenerateOptions(**options))
    key.write_text(noted)
    partial.write_bytes(partial.read_bytes() + b'{"cut')  # killed within a line
    assert generate_file(GenerateOptions(**options)).resumed == 4
    assert out.read_bytes() == expected


def test_a_template_that_reads_the_date_keeps_that_of_the_first_start(options, tmp_path, monkeypatch):
    """A generation that is continued on another day writes the same file."""
    (tmp_path / "dated.jinja").write_text("{{ strftime_now('%d %b %Y') }}{{ messages[0].content }}")
    options |= {"chat_template": str(tmp_path / "dated.jinja"), "limit": 8}
    expected = GenerateOptions(**{**options, "out": str(tmp_path / "b.jsonl")}, template_date="2020-02-29")
    generate_file(expected)
    writes = iter((None, "full"))
    monkeypatch.setattr(faults, "at", lambda *_: None if next(writes, None) is None else disk_full())
    with pytest.raises(OSError):
        generate_file(GenerateOptions(**options, template_date="2020-02-29"))
    monkeypatch.setattr(faults, "at", lambda *_: None)
    assert generate_file(GenerateOptions(**options)).resumed == 4
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    with pytest.raises(InputError, match="template_date must be a date"):
        GenerateOptions(**options, template_date="today")


def disk_full():
    raise OSError(28, "No space left on device")


def test_rows_keep_their_record_and_say_how_completions_ended(options, tmp_path):
    generate_file(GenerateOptions(**options, with_tokens=True))
    rows = rows_of(tmp_path / "out.jsonl")
    chats = rows_of(Path(options["prompts"]))
    for row, chat in zip(rows, chats, strict=False):
        assert row["messages"] == chat["messages"]
        assert row["prompt"] == chat["messages"][:-1]
        for completion in row["completions"]:
            assert len(completion["token_ids"]) == len(completion["logprobs"]) == completion["tokens"]
            assert completion["finish_reason"] in ("stop", "length")


@pytest.mark.parametrize("layout", [{"tensor": 2}, pytest.param({"pipeline": 2}, marks=pytest.mark.slow)])
def test_a_checkpoint_of_any_layout_answers_as_its_exported_folder(
    pool, tiny_models, chat_file, tmp_path, layout
):
    arguments = run_arguments(
        tiny_models("llama3"),
        chat_file,
        tmp_path / "run",
        train__steps=1,
        checkpoint__export_hf=True,
        **{f"parallel__{name}": size for name, size in layout.items()},
    )
    pool.run(2, training_ranks.train, arguments)
    chats = [row["messages"][:-1] for row in rows_of(chat_file)[:5]]
    answers = generate(str(tmp_path / "run"), chats, temperature=0, max_tokens=12)
    assert {a.weight_version for [a] in answers} == {1}
    folder = tmp_path / "run" / "hf"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for chat, [answer] in zip(chats, answers, strict=True):
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        made = model.generate(
            torch.tensor([ids]),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=0,
        )
        assert list(answer.token_ids) == made[0, len(ids) :].tolist()
        assert answer.text == tokenizer.decode(answer.token_ids, skip_special_tokens=True)


def test_text_is_continued_and_as_chat_it_is_a_turn(tiny_models):
    engine = open_engine(tiny_models())
    text, turn = generate(engine, ["2 + 2", [{"role": "user", "content": "2 + 2"}]], max_tokens=8)
    assert text[0].token_ids != turn[0].token_ids
    with pytest.raises(InputError, match="got both"):
        generate(engine, ["x"], Sampling(), max_tokens=8)


def write_prompts(file, *records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def test_prompts_that_do_not_fit_are_counted_or_skipped(options, tmp_path):
    model = make_model(tmp_path / "short", max_position_embeddings=32)
    file = write_prompts(tmp_path / "p.jsonl", {"prompt": "a"}, {"prompt": "b" * 50}, {"prompt": "c" * 40})
    options |= {"model": str(model), "prompts": file}
    with pytest.raises(InputError, match=r"p.jsonl:2: .* context of 32 tokens, got 50; 2 of 3 prompts"):
        generate_file(GenerateOptions(**options))
    counts = generate_file(GenerateOptions(**options, too_long="skip"))
    assert (counts.skipped, counts.completions) == (2, 2)
    rows = rows_of(tmp_path / "out.jsonl")
    assert [len(row["completions"]) for row in rows] == [2, 0, 0]
    assert "50 tokens" in rows[1]["skipped"]


@pytest.mark.parametrize(
    ("record", "line"),
    [
        ({"text": "x"}, "p.jsonl:1: must have a prompt .*got text"),
        ({"prompt": 3}, "p.jsonl:1: field 'prompt' must be a string or a list of messages, got 3"),
        ({"prompt": "  "}, "p.jsonl:1: field 'prompt' must not be empty"),
        ({"prompt": [{"role": "assistant", "content": "x"}]}, "p.jsonl:1: the last turn .* assistant"),
        ({"prompt": [{"role": "users", "content": "x"}]}, "did you mean 'user'"),
    ],
)
def test_bad_prompts_are_one_line_on_stderr(options, tmp_path, capsys, record, line):
    file = write_prompts(tmp_path / "p.jsonl", record)
    assert (
        main(["generate", "--model", options["model"], "--prompts", file, "--out", str(tmp_path / "o.jsonl")])
        == 2
    )
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(line, error), error
    assert not list(tmp_path.glob("*o.jsonl*"))


def test_no_prompts_and_no_model(options, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(InputError, match="at least one prompt"):
        generate_file(GenerateOptions(**{**options, "prompts": str(tmp_path / "empty.jsonl")}))
    with pytest.raises(InputError, match="nowhere"):
        generate_file(GenerateOptions(**{**options, "model": str(tmp_path / "nowhere")}))


def test_servers_answer_in_place_of_a_model(options, tmp_path):
    with serving(Server(context=4096)) as url:
        counts = generate_file(GenerateOptions(**options, vllm=(url,)))
    assert (counts.prompts, counts.completions) == (11, 22)
    assert all(len(row["completions"]) == 2 for row in rows_of(tmp_path / "out.jsonl"))
    (tmp_path / "out.jsonl").unlink()
    with (
        serving(Server(context=32)) as url,
        pytest.raises(InputError, match="context of 32 tokens, got .* of 11"),
    ):
        generate_file(GenerateOptions(**options, vllm=(url,)))
    with serving(Server(context=32)) as url:
        counts = generate_file(GenerateOptions(**options, vllm=(url,), too_long="skip"))
    assert counts.skipped == 11
    with pytest.raises(InputError, match="precision is the vllm servers' own"):
        GenerateOptions(**options, vllm=("http://x",), precision="fp32")
