"""``prepare`` makes the store that training then finds, and its report can be looked at without anything else."""

import json
import re

import pytest
import yaml

from megatron_align.data.store import TokenStore
from megatron_align.data.tokenize.cache_key import StoreSpec
from megatron_align.objectives.configuration import parse
from megatron_align.tools.main import main
from tests.harness import cli
from tests.harness.tiny import byte_tokenizer

CHAT = [
    {
        "messages": [
            {"role": "user", "content": f"<b>{i}</b>"},
            {"role": "assistant", "content": "yes & no \x1b[1m"},
        ]
    }
    for i in range(6)
]
PAIRS = [{"prompt": "which?", "chosen": "this", "rejected": "that"}] * 3


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    def write(records, name="data.jsonl"):
        file = tmp_path / name
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        return file

    return write


@pytest.fixture
def call(capsys, tokenizer, tmp_path):
    """Run ``prepare`` on data; return (exit code, what it printed, its errors)."""

    def run(file, *more, length=512):
        fixed = ("--tokenizer", tokenizer, "--data", file, "--cache", tmp_path / "cache")
        code = main(["prepare", *map(str, (*fixed, "--sequence-length", length, *more))])
        return code, *capsys.readouterr()

    return run


def store_of(out):
    return re.search(r"^train: (.+)$", out, re.MULTILINE)[1]


def test_it_says_where_the_store_is_and_what_it_holds(call, data):
    code, out, err = call(data(CHAT), "--check")
    store = TokenStore(store_of(out))
    assert (code, err) == (0, "")
    assert f"chat data, shape messages: 6 samples, {store.lengths.sum()} tokens" in out
    assert "every file matches the SHA-256" in out
    assert store_of(call(data(CHAT))[1]) == store_of(out)


def test_a_flipped_byte_is_found_by_check(call, data):
    file = data(CHAT)
    path = store_of(call(file)[1])
    with open(f"{path}/tokens.bin", "r+b") as column:
        column.write(b"\xfe")
    assert call(file)[0] == 0
    code, _, err = call(file, "--check")
    assert (code, err.count("\n")) == (2, 1)
    assert f"{path}/tokens.bin: must have sha256" in err


def test_skipped_and_dropped_records_are_listed(call, data):
    long = {"messages": [{"role": "user", "content": "a" * 600}, {"role": "assistant", "content": "b"}]}
    file = data([*CHAT, {"messages": 3}, long])
    code, out, _ = call(file, "--on-bad-record", "skip", "--too-long", "drop")
    assert code == 0
    assert "1 dropped as too long, 0 truncated, 1 skipped as malformed" in out
    assert f"skipped: {file}:7: " in out
    assert f"dropped: {file}:8: " in out


def test_the_report_stands_alone(call, data, tmp_path):
    folder = tmp_path / "report"
    code, out, err = call(data(CHAT), "--report", folder, "--ranks", 2, "--pack-length", 600, "--sample", 3)
    assert (code, err) == (0, "")
    numbers = json.loads((folder / "report.json").read_text())
    assert (numbers["samples"], numbers["packing"]["ranks"], numbers["packing"]["pack_length"]) == (6, 2, 600)
    assert (folder / "lengths.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "report.html").read_text()
    assert "&lt;b&gt;3&lt;/b&gt;" in page
    assert "<mark>yes &amp; no" in page
    assert "<b>" not in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert r"⟦yes & no \x1b[1m<|im_end|>" in out  # no control character reaches the terminal
    assert "\x1b" not in out


def test_the_report_of_pairs_shows_both(call, data, tmp_path):
    code, out, _ = call(data(PAIRS), "--report", tmp_path / "report")
    assert code == 0
    assert (
        "--- prompt ---\nwhich?\n--- chosen ---\n⟦this<|im_end|>⟧\n--- rejected ---\n⟦that<|im_end|>⟧" in out
    )
    assert "prompts shared" in out


def test_training_finds_what_a_configuration_prepared(pool, tokenizer, data, tmp_path):
    config = {
        "model": {"path": str(tokenizer)},
        "data": {
            "train": [{"path": str(data(CHAT)), "weight": 2.0}, str(data(CHAT, "more.jsonl"))],
            "validation": str(data(CHAT[:2], "validation.jsonl")),
            "sequence_length": 512,
        },
        "checkpoint": {"dir": str(tmp_path / "run")},
        "train": {"steps": 1},
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    report = ("--report", str(tmp_path / "report"))
    (answer,) = pool.run(1, cli.call, ["prepare", "--config", str(file), *report])
    assert (answer.code, answer.err) == (0, ""), answer
    for split in ("train", "validation"):
        spec = StoreSpec.of_run(parse(["--config", str(file)]), split, str(tokenizer))
        assert f"{split}: {spec.path(spec.inputs())}\n" in answer.out
        assert spec.path(spec.inputs()).is_dir()
    assert (tmp_path / "report" / "validation" / "report.html").is_file()


@pytest.mark.parametrize(
    "arguments, line",
    [
        ((), "needs --config, or --tokenizer, --data, --sequence-length, --cache; got no --tokenizer"),
        (("--config", "run.yaml", "--cache", "c"), "--config already names the data, got --cache as well"),
        (("--chache", "c"), "has no option --chache; did you mean '--cache'?"),
        (("--sequence-length", "0"), "must be a positive whole number, got 0"),
    ],
)
def test_a_mistake_is_one_line(capsys, arguments, line):
    assert main(["prepare", *arguments]) == 2
    err = capsys.readouterr().err
    assert line in err
    assert err.count("\n") == 1


def test_a_sample_that_is_not_there(call, data, tmp_path):
    code, _, err = call(data(CHAT), "--report", tmp_path / "report", "--sample", 6)
    assert (code, "--sample must be within 0..5, got 6" in err) == (2, True)
