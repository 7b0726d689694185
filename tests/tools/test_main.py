"""The command line: exit codes 0 and 2 mean what they say, a mistake is one line on stderr that names the
nearest word and leaves nothing on the disk, and help does not wait for torch.
"""

import importlib
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from megatron_align.tools.main import TOOLS, main
from tests.harness import cli
from tests.harness.processes import run_ranks

ROOT = Path(__file__).resolve().parents[2]
MODULE = ("-m", "megatron_align.tools.main")


def run(*arguments, timeout=100, cwd=ROOT, **environment):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def assert_one_line(answer, line):
    code, out, err = answer
    assert (code, out) == (2, "")
    assert err.startswith("error: "), err
    assert err.count("\n") == 1, err
    assert line in err


@pytest.fixture(scope="module")
def call(pool):
    return lambda *arguments: pool.run(1, cli.call, list(map(str, arguments)))[0]


def test_commands_and_a_script_from_folder_to_folder_and_the_verdict(tmp_path, tiny_models, call):
    hf, checkpoint, out = tiny_models("llama3"), tmp_path / "ckpt", tmp_path / "out"
    done = call("convert", "import", "--hf", hf, "--out", checkpoint)
    assert (done.code, done.err) == (0, ""), done
    assert done.out == f"imported 148,416 parameters, float32, to {checkpoint}\n"
    script = ROOT / "tools" / "main.py"  # from another folder: nothing may depend on where one stands
    done = run(script, "convert", "export", "--checkpoint", checkpoint, "--out", out, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, ""), done
    assert done.stdout == f"exported 148,416 parameters, float32, from {checkpoint} to {out}\n"
    verdict = call("convert", "verify", "--hf", out, "--checkpoint", checkpoint)
    assert (verdict.code, verdict.err) == (0, ""), verdict
    assert verdict.out.endswith(f"the same model: {checkpoint} and {out}\n")


@pytest.mark.parametrize(
    "start, shown",
    [
        ((*MODULE, "--help"), "  convert   convert between Hugging Face folders and checkpoints"),
        (("tools/main.py", "-h"), "usage: megatron-align COMMAND ..."),
        ((*MODULE, "convert", "--help"), "  verify  check that a checkpoint"),
        (("tools/convert.py", "import", "--help"), "--dtype {bfloat16,float32}"),
        (("tools/convert.py", "verify", "--help"), "Exit code 0: everything is equal; 1: something differs"),
    ],
)
def test_help_does_not_load_torch(tmp_path, start, shown):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    done = run(*start, PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert shown in done.stdout


def test_version(capsys):
    from megatron_align.tools.main import main
    from megatron_align.train import main as train

    for command in (main, train):
        assert command(["--version"]) == 0
        out, err = capsys.readouterr()
        assert re.fullmatch(
            r"megatron_align \d+\.\d+\.\d+ \(Python [\d.]+, torch \S+, megatron-core \S+, .*\)\n", out
        )
        assert err == ""


HELP = "(see megatron-align"
MISTAKES = {
    "nothing": ((), f"megatron-align needs a command, one of {', '.join(TOOLS)} {HELP} --help)"),
    "tool": (("convrt",), f"megatron-align has no command 'convrt', it has {', '.join(TOOLS)}; did you mean"),
    "no command": (("convert",), "megatron-align convert needs a command, one of import, export, verify"),
    "command": (("convert", "imprt"), "it has import, export, verify; did you mean 'import'?"),
    "option": (
        ("convert", "export", "--chekpoint", "x", "--out", "y"),
        "megatron-align convert export has no option --chekpoint; did you mean '--checkpoint'?",
    ),
    "option=": (("convert", "export", "--ot=y"), "has no option --ot; did you mean '--out'?"),
    "abbreviated": (("convert", "export", "--check", "x", "--out", "y"), "has no option --check"),
    "missing": (("convert", "import", "--hf", "x"), "the following arguments are required: --out"),
    "familiar": (
        ("prepare", "--cutoff_len", "9"),
        "has no option --cutoff_len; did you mean '--sequence-length'?",
    ),
    "familiar output": (("convert", "import", "--hf", "x", "--output_dir=y"), "did you mean '--out'?"),
    "familiar folder": (("convert", "import", "--model_name_or_path", "x"), "did you mean '--hf'?"),
    "of training": (
        ("prepare", "--learning-rate", "1"),
        "has no option --learning-rate: for a training run, here it is optimizer.lr, in its configuration",
    ),
    "underscores": (("prepare", "--sequence_length", "9"), "did you mean '--sequence-length'?"),
    "stray": (("convert", "import", "--hf", "x", "--out", "y", "z"), "unrecognized arguments: z"),
    "dtype": (("convert", "import", "--hf", "x", "--out", "y", "--dtype", "int8"), "invalid choice: 'int8'"),
    "tolerance": (
        ("convert", "verify", "--hf", "x", "--checkpoint", "y", "--tolerance", "nan"),
        "argument --tolerance: must be a non-negative number, got nan",
    ),
    "not a number": (
        ("convert", "verify", "--hf", "x", "--checkpoint", "y", "--tolerance", "few"),
        "argument --tolerance: must be a non-negative number, got few",
    ),
}


@pytest.mark.parametrize("arguments, line", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(arguments, line, capsys):
    from megatron_align.tools.main import main

    code = main(list(arguments))
    assert_one_line((code, *capsys.readouterr()), line)


def test_a_mistake_is_one_line_from_outside():
    done = run("tools/convert.py", "verfy")
    assert_one_line((done.returncode, done.stdout, done.stderr), "did you mean 'verify'?")


@pytest.fixture
def sample(tmp_path, tiny_models, call):
    """An HF folder, its checkpoint, a file, a folder with a file in it."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    assert call("convert", "import", "--hf", tiny_models(), "--out", tmp_path / "ckpt").code == 0
    return {"hf": tiny_models(), "dir": tmp_path}


BAD = {
    "no HF folder": (
        "import --hf {dir}/none --out {dir}/new",
        "no Hugging Face folder at",
    ),
    "HF is a file": (
        "import --hf {dir}/file --out {dir}/new",
        "no Hugging Face folder at",
    ),
    "HF is no model": (
        "import --hf {dir}/full --out {dir}/new",
        "a Hugging Face folder needs a file config.json",
    ),
    "HF is a checkpoint": (
        "import --hf {dir}/ckpt --out {dir}/new",
        "needs a file config.json, found none at",
    ),
    "import onto files": (
        "import --hf {hf} --out {dir}/full",
        "output must be a new or empty folder, found files in",
    ),
    "import onto itself": (
        "import --hf {hf} --out {hf}",
        "output must be a new or empty folder, found files in",
    ),
    "import onto a file": (
        "import --hf {hf} --out {dir}/file",
        "output must be a new or empty folder, found a file at",
    ),
    "import below a file": ("import --hf {hf} --out {dir}/file/a/b", "{dir}/file is not a folder"),
    "import where none may write": ("import --hf {hf} --out /proc/new", "/proc"),
    "no checkpoint": (
        "export --checkpoint {dir}/none --out {dir}/new",
        "nor a run's folder with one: {dir}/none",
    ),
    "not a checkpoint": ("export --checkpoint {hf} --out {dir}/new", "nor a run's folder with one: {hf}"),
    "checkpoint is a file": (
        "export --checkpoint {dir}/file --out {dir}/new",
        "nor a run's folder with one: {dir}/file",
    ),
    "export onto files": ("export --checkpoint {dir}/ckpt --out {dir}/full", "found files in {dir}/full"),
    "export onto a file": ("export --checkpoint {dir}/ckpt --out {dir}/file", "found a file at {dir}/file"),
    "export where none may write": ("export --checkpoint {dir}/ckpt --out /proc/new", "/proc"),
    "verify no checkpoint": (
        "verify --hf {hf} --checkpoint {dir}/full",
        "nor a run's folder with one: {dir}/full",
    ),
    "verify no data": ("verify --hf {hf} --checkpoint {dir}/ckpt --data {dir}/no.jsonl", "{dir}/no.jsonl"),
    "verify report below a file": (
        "verify --hf {hf} --checkpoint {dir}/ckpt --json {dir}/file/report",
        "{dir}/file is not a folder",
    ),
    "verify report onto a folder": (
        "verify --hf {hf} --checkpoint {dir}/ckpt --json {dir}/full",
        "{dir}/full",
    ),
}


def everything_in(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("words, line", BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_leaves_no_trace(sample, call, words, line):
    before = everything_in(sample["dir"]), everything_in(sample["hf"])
    assert_one_line(call("convert", *words.format(**sample).split()), line.format(**sample))
    assert (everything_in(sample["dir"]), everything_in(sample["hf"])) == before


def test_an_empty_folder_may_be_filled_also_through_a_link(tmp_path, sample, call):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    assert call("convert", "import", "--hf", sample["hf"], "--out", tmp_path / "link").code == 0
    assert (tmp_path / "empty" / "card.json").is_file()
    (tmp_path / "other").mkdir()
    done = call(
        "convert", "export", "--checkpoint", tmp_path / "link", "--out", f"{tmp_path}/other/../other/."
    )
    assert done.code == 0
    assert (tmp_path / "other" / "config.json").is_file()


def convert(words, largest, rank_info):
    """In a process of its own: run the convert tool, which may write files of ``largest`` bytes at most."""
    import resource

    from megatron_align.tools.main import main

    if largest is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    sys.exit(main(["convert", *words]))


@pytest.mark.parametrize(
    "words", ["import --hf {hf} --out {dir}/new", "export --checkpoint {dir}/ckpt --out {dir}/new"]
)
def test_a_write_that_fails_is_one_line_and_leaves_no_trace(sample, words, tmp_path_factory):
    before = everything_in(sample["dir"])
    said = tmp_path_factory.mktemp("said")
    [done] = run_ranks(partial(convert, words.format(**sample).split(), 100_000), [0], 1, said)
    assert_one_line((done.code, done.out, done.err), "failed at ")
    assert everything_in(sample["dir"]) == before


def test_torchrun_is_refused(tmp_path, tiny_models):
    words = ["import", "--hf", str(tiny_models()), "--out", str(tmp_path / "new")]
    [done] = run_ranks(partial(convert, words, None), [1], 2, tmp_path)
    assert_one_line(
        (done.code, done.out, done.err),
        "run this as one process, without torchrun; got WORLD_SIZE=2",
    )
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "arguments, then",
    [
        (["convert", "import"], "resumes after what is complete"),
        (["convert", "verify"], "starts again"),
        (["merge", "linear"], "resumes after what is complete"),
        (["prepare"], "resumes after what is complete"),
        (["plan"], "starts again"),
        (["adapter", "merge"], "resumes after what is complete"),
        (["adapter", "extract"], "starts again"),
    ],
    ids=str,
)
def test_ctrl_c_is_one_line(arguments, then, monkeypatch, capsys):
    def interrupted(arguments):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    monkeypatch.setattr(importlib.import_module(f"megatron_align.tools.{arguments[0]}"), "run", interrupted)
    assert main(arguments) == 130
    assert capsys.readouterr().err == f"interrupted: the output is not written; the same command {then}\n"
