"""The quickstart's parts: the task is fair, the tiny model's folder is sound, the report says what happened."""

import io
import json
import shutil

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from examples.quickstart import run, task, tiny_model
from examples.quickstart.ask import answer_logprobs, ask
from examples.quickstart.report import Exam, Report, Stage


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("untrained")
    tiny_model.save(path, seed=0)
    return path


# The task.
def test_splits_depend_on_the_seed_only():
    assert task.make_splits(3) == task.make_splits(3)
    assert task.make_splits(3) != task.make_splits(4)


def test_splits_share_no_sum_and_no_mirrored_sum():
    splits = task.make_splits(0)
    train, held_out = (
        {frozenset((s.left, s.right)) for s in part} for part in (splits.train, splits.held_out)
    )
    assert not train & held_out
    assert len(held_out) == task.HELD_OUT_PAIRS
    assert len({s.question for s in splits.train + splits.held_out}) == task.LIMIT**2


def test_chats_hold_the_right_answers(tmp_path):
    splits = task.make_splits(0)
    task.write_chats(tmp_path / "chats.jsonl", splits.held_out)
    chats = [json.loads(line)["messages"] for line in (tmp_path / "chats.jsonl").open()]
    assert len(chats) == len(splits.held_out)
    for user, assistant in chats:
        assert [user["role"], assistant["role"]] == ["user", "assistant"]
        left, right = user["content"].removesuffix("=").split("+")
        assert int(assistant["content"]) == int(left) + int(right)


def test_pairs_prefer_the_right_answer_to_a_wrong_one(tmp_path):
    splits = task.make_splits(0)
    task.write_pairs(tmp_path / "pairs.jsonl", splits.train)
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").open()]
    assert len(pairs) == len(splits.train)
    for pair in pairs:
        left, right = pair["prompt"][0]["content"].removesuffix("=").split("+")
        assert int(pair["chosen"][0]["content"]) == int(left) + int(right)
        assert int(pair["rejected"][0]["content"]) >= 0
        assert pair["rejected"] != pair["chosen"]


# The tiny model.
@pytest.mark.parametrize("text", ["27+45=72", "a b\n\tc", "Größe 数 🙂", "the user and the assistant", ""])
def test_tokenizer_gives_back_any_text(folder, text):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_renders_chatml_with_a_token_per_digit(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "27+45="}, {"role": "assistant", "content": "72"}]
    prompt = "<|im_start|>user\n27+45=<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True) == prompt
    assert tokenizer.apply_chat_template(chat, tokenize=False) == prompt + "72<|im_end|>\n"
    frame = ["<|im_start|>", "user", "\n", *"27+45=", "<|im_end|>", "\n", "<|im_start|>", "assistant", "\n"]
    assert [tokenizer.decode([token]) for token in tokenizer(prompt)["input_ids"]] == frame
    assert tokenizer.eos_token == "<|im_end|>"


def test_model_is_the_same_for_the_same_seed(folder, tmp_path):
    tiny_model.save(tmp_path / "again", seed=0)
    tiny_model.save(tmp_path / "other", seed=1)
    weights = [
        (path / "model.safetensors").read_bytes() for path in (folder, tmp_path / "again", tmp_path / "other")
    ]
    assert weights[0] == weights[1] != weights[2]


def test_asking_in_batches_changes_no_answer(folder):
    questions = ["1+2=", "27+45=", "8+90="]
    assert ask(folder, questions) == ask(folder, questions, batch_size=1)


def test_logprobs_are_of_the_answer_and_its_end(folder):
    from transformers import AutoModelForCausalLM

    questions, answers = ["1+2=", "27+45=", "8+90="], ["3", "72", "98"]
    found = answer_logprobs(folder, questions, answers)
    assert found == pytest.approx(answer_logprobs(folder, questions, answers, batch_size=1), rel=1e-5)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    prompt = "<|im_start|>user\n27+45=<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(prompt + "72<|im_end|>", return_tensors="pt")["input_ids"]
    logprobs_LV = model(ids).logits[0].log_softmax(-1)
    by_hand = sum(logprobs_LV[i - 1, ids[0, i]].item() for i in range(ids.shape[1] - 3, ids.shape[1]))
    assert found[1] == pytest.approx(by_hand, rel=1e-5)


# The report.
def make_report(right=98):
    exams = [
        Exam(model="untrained", asked=100, right=0, preferred=51, margin=0.1, examples={"1+2=": "\x13"}),
        Exam(model="sft", asked=100, right=right, preferred=97, margin=6.25, examples={"1+2=": "3"}),
    ]
    stage = Stage(name="sft", losses=(5.5, 2.0, 0.25), tokens_per_second=4321.0, seconds=61.4)
    return Report(exams=exams, stages=[stage], parameters=1000, seconds=75.0)


def test_table_is_plain_text_without_a_terminal():
    out = io.StringIO()
    make_report().show(Console(file=out, width=80))
    text = out.getvalue()
    for words in (
        ("untrained", "0.0%", "51.0%", "0.10"),
        ("sft", "98.0%", "97.0%", "6.25", "5.500", "0.250", "4,321", "61"),
    ):
        assert any(all(word in line for word in words) for line in text.splitlines())
    assert "75 s" in text
    assert all(c.isprintable() or c == "\n" for c in text)
    assert max(map(len, text.splitlines())) <= 80


def test_report_on_disk(tmp_path):
    make_report().write(tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text())
    assert [exam["accuracy"] for exam in content["exams"]] == [0.0, 0.98]
    assert [exam["preference_accuracy"] for exam in content["exams"]] == [0.51, 0.97]
    stage = content["stages"][0]
    assert (stage["steps"], stage["first_loss"], stage["last_loss"]) == (3, 5.5, 0.25)


def test_stage_reads_the_training_rows_only(tmp_path):
    rows = [
        {"step": 1, "loss": 2.0, "tokens": 30, "step_seconds": 1.0},
        {"step": 2, "loss": 1.0, "tokens": 10, "step_seconds": 3.0},
        {"step": 2, "split": "validation", "loss": 9.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = Stage.read("sft", tmp_path / "metrics.jsonl", seconds=5.0)
    assert (stage.losses, stage.tokens_per_second) == ((2.0, 1.0), 10.0)


def test_a_stage_is_compared_with_the_stage_before_it():
    """ "Before" DPO is SFT's model, not the untrained one: law of the picture's titles."""
    report = make_report()
    dpo = Exam(model="dpo", asked=100, right=97, preferred=99, margin=9.0, examples={})
    stages = [*report.stages, Stage(name="dpo", losses=(0.69, 0.65), tokens_per_second=1.0, seconds=9.0)]
    report = Report(exams=[*report.exams, dpo], stages=stages, parameters=1000, seconds=90.0)
    assert report.titles() == [
        "SFT: unseen sums right 0.0% before, 98.0% after",
        "DPO: unseen sums right 98.0% before, 97.0% after",
    ]


def test_picture_is_drawn(tmp_path):
    make_report().draw(tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


# Faults.
def test_a_folder_of_someone_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("precious")
    assert run.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: --out must be a new or empty folder, or an earlier quickstart's; found '{tmp_path}'"
    ]
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_a_model_that_did_not_learn_is_a_failure():
    run.check(make_report(right=50), need=0.5)
    with pytest.raises(run.QuickstartError, match=r"sft must answer 50% of the held-out sums, got 49.0%"):
        run.check(make_report(right=49), need=0.5)


def test_a_failing_stage_ends_it_with_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run.sys, "executable", shutil.which("false"))
    assert run.main(["--out", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: stage sft failed with exit code 1; see its message above"
    )
    assert not (tmp_path / "run" / "report.json").exists()
