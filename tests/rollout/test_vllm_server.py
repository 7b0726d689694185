"""A server that the run starts answers or is one clear line, and never outlives its run. vLLM is a stand-in script."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from megatron_align.errors import InputError
from megatron_align.rollout.types import Prompt, Sampling
from megatron_align.rollout.vllm_engine import VLLMEngine
from megatron_align.rollout.vllm_server import VLLMServer
from megatron_align.tools.main import main
from tests.harness.processes import run_code
from tests.harness.tiny import byte_tokenizer, make_model

ROOT = Path(__file__).resolve().parents[2]
# Stands in for `vllm serve`: it imports nothing heavy, and a child plays the engine's process.
STAND_IN = """
import json, os, signal, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
mode = {mode!r}
found = {{name: os.environ.get(name) for name in ("VLLM_SERVER_DEV_MODE", "RANK", "PYTHONPATH")}}
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open({record!r}, "w") as file:
    json.dump({{"arguments": sys.argv[1:], "environment": found, "pids": [os.getpid(), child.pid]}}, file)
if mode == "dies":
    print("Traceback ...", file=sys.stderr)
    sys.exit("ValueError: head size 16 is not supported")
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if mode == "hangs":
    print("compiling", flush=True)
    time.sleep(600)
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer("" if self.path == "/health" else {{"data": [{{"id": "m", "max_model_len": 64}}]}})
    def do_POST(self):
        if mode == "dies_later":
            print("RuntimeError: out of memory", flush=True)
            os._exit(3)
        choice = {{"text": "yes", "token_ids": [5, 6], "finish_reason": "stop"}}
        self.answer({{"choices": [choice | {{"logprobs": {{"token_logprobs": [-1, -2]}}}}]}})
    def answer(self, value):
        data = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def log_message(self, *_):
        pass
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def environment(tmp_path):
    """Return a function that makes an environment whose vLLM behaves as asked, and one that reads what it saw."""
    folder = tmp_path / "env" / "bin"
    folder.mkdir(parents=True)
    (folder / "python").symlink_to(sys.executable)
    record = tmp_path / "record.json"

    def make(mode="serves"):
        (folder / "vllm").write_text(STAND_IN.format(mode=mode, record=str(record)))
        return folder / "python"

    return make, lambda: json.loads(record.read_text())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), max_position_embeddings=64)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids, seconds=60):
    began = time.monotonic()
    while any(map(is_running, pids)):
        assert time.monotonic() - began < seconds, f"still running: {pids}"
        time.sleep(0.1)


def test_it_answers_and_is_stopped_with_its_children(environment, model, tmp_path, monkeypatch):
    make, seen = environment
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("PYTHONPATH", "/ours")
    with VLLMServer(make(), model, tmp_path / "logs" / "vllm.log", ["--tensor-parallel-size", "2"]) as server:
        engine = VLLMEngine([server.endpoint()], byte_tokenizer())
        [[answer]] = engine.generate([Prompt([1, 2])], Sampling(max_tokens=4))
        assert (answer.text, engine.context) == ("yes", 64)
        found = seen()
        assert all(map(is_running, found["pids"]))
        assert server.death() is None
    wait_until_gone(found["pids"])
    assert found["environment"] == {"VLLM_SERVER_DEV_MODE": "1", "RANK": None, "PYTHONPATH": None}
    assert found["arguments"][:2] == ["serve", str(model)]
    assert found["arguments"][-4:] == ["--logprobs-mode", "processed_logprobs", "--tensor-parallel-size", "2"]
    assert "serve" in (tmp_path / "logs" / "vllm.log").read_text()


@pytest.mark.parametrize(
    ("mode", "seconds", "line"),
    [
        ("dies", 60, "ended with exit code 1: ValueError: head size 16 is not supported .*vllm.log"),
        ("hangs", 1.5, "must answer within 1.5 s, it did not: compiling .*vllm.log"),
    ],
)
def test_one_that_does_not_start_is_one_line_and_leaves_nothing(
    environment, model, tmp_path, mode, seconds, line
):
    make, seen = environment
    with pytest.raises(InputError, match=line):
        VLLMServer(make(mode), model, tmp_path / "vllm.log", start_seconds=seconds)
    wait_until_gone(seen()["pids"])


def test_one_that_dies_during_the_run_is_one_line_at_once(environment, model, tmp_path):
    make, seen = environment
    began = time.monotonic()
    with VLLMServer(make("dies_later"), model, tmp_path / "vllm.log") as server:
        engine = VLLMEngine([server.endpoint()], byte_tokenizer())
        with pytest.raises(InputError, match="ended with exit code 3: RuntimeError: out of memory"):
            engine.generate([Prompt([1, 2])], Sampling(max_tokens=4))
    wait_until_gone(seen()["pids"])
    assert time.monotonic() - began < 60


def test_one_that_ignores_the_request_to_end_is_killed(environment, model, tmp_path, monkeypatch):
    make, seen = environment
    monkeypatch.setattr("megatron_align.rollout.vllm_server.STOP_SECONDS", 0.5)
    with VLLMServer(make("stubborn"), model, tmp_path / "vllm.log"):
        pids = seen()["pids"]
    wait_until_gone(pids)


def test_it_ends_when_its_run_is_killed(environment, model, tmp_path):
    make, seen = environment
    started, log = tmp_path / "up", str(tmp_path / "vllm.log")
    run = run_code(
        "import time; from pathlib import Path; from megatron_align.rollout.vllm_server import VLLMServer\n"
        f"server = VLLMServer({str(make())!r}, {str(model)!r}, {log!r})\n"
        f"Path({str(started)!r}).touch(); time.sleep(600)"
    )
    try:
        while not started.exists():
            assert run.is_alive()
            time.sleep(0.05)
    finally:
        run.kill()
    run.join()
    server, child = seen()["pids"]
    wait_until_gone([server])
    os.kill(child, signal.SIGKILL)  # real servers end their own children


def test_generate_starts_and_stops_it(environment, model, tmp_path, capsys):
    make, seen = environment
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text('{"prompt": "2 + 2 ="}\n')
    command = ["generate", "--model", str(model), "--prompts", str(prompts), "--out", str(out)]
    assert (
        main([*command, "--vllm-python", str(make()), "--vllm-options=--seed 4 --tensor-parallel-size 2"])
        == 0
    )
    [row] = map(json.loads, out.read_text().splitlines())
    assert row["completions"][0]["content"] == "yes"
    found = seen()
    assert found["arguments"][-4:] == ["--seed", "4", "--tensor-parallel-size", "2"]
    wait_until_gone(found["pids"])
    assert (tmp_path / "answers.jsonl.vllm.log").is_file()
    capsys.readouterr()
    out.unlink()
    assert main([*command, "--vllm-options=--seed 4"]) == 2
    assert "vllm_options are those of a server that vllm_python starts" in capsys.readouterr().err


def test_what_cannot_be_started_is_one_line(environment, model, tmp_path):
    make, _ = environment
    python = make()
    with pytest.raises(
        InputError, match="must be the Python interpreter of an environment with vLLM, got .*/none"
    ):
        VLLMServer(tmp_path / "none", model, tmp_path / "log")
    with pytest.raises(InputError, match="found no config.json in .*: export the checkpoint"):
        VLLMServer(python, tmp_path, tmp_path / "log")
    (python.parent / "vllm").unlink()
    with pytest.raises(InputError, match="found no .*env/bin/vllm"):
        VLLMServer(python, model, tmp_path / "log")


def test_evaluate_starts_and_stops_it(environment, model, tmp_path, capsys):
    """Its options are those of the configuration, or of the command line."""
    make, seen = environment
    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"prompt": "Is it?", "answer": "yes"}\n{"prompt": "And this?", "answer": "no"}\n')
    config, out = tmp_path / "eval.yaml", tmp_path / "out"
    config.write_text(
        f"{{model: {model}, out: {out}, tasks: [{{name: asked, kind: generate, data: {asked}, max_tokens: 4}}]}}"
    )
    command = ["evaluate", "--config", str(config), "--rollout.engine", "vllm"]
    assert main([*command, f"--rollout.vllm_python={make()}", "--rollout.vllm_options=--seed 4"]) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["tasks"]["asked"]["exact_match"] == 0.5
    assert results["rollout"]["vllm_options"] == ["--seed", "4"]
    found = seen()
    assert found["arguments"][-4:] == ["--dtype", "bfloat16", "--seed", "4"]
    wait_until_gone(found["pids"])
    assert (out / "vllm.log").is_file()
    for options, line in (
        ([f"--rollout.vllm_python={make('dies')}"], "ended with exit code 1: ValueError: head size 16"),
        (
            ["--rollout.vllm_python=/none/python"],
            "must be the Python interpreter of an environment with vLLM",
        ),
        ([], "rollout.engine vllm needs rollout.url, of servers, or rollout.vllm_python"),
        (
            ["--rollout.url", "http://x", "--rollout.vllm_options=--seed 4"],
            "of a server that vllm_python starts",
        ),
        (
            ["--rollout.engine=transformers", "--rollout.url=http://x"],
            "rollout.url belongs to rollout.engine vllm",
        ),
    ):
        capsys.readouterr()
        assert main([*command, *options]) == 2
        assert line in capsys.readouterr().err
    wait_until_gone(seen()["pids"])


def test_sample_starts_one_for_each_model(environment, model, tmp_path):
    make, seen = environment
    asked, out = tmp_path / "asked.jsonl", tmp_path / "out"
    asked.write_text('{"prompt": "Is it?", "answer": "yes"}\n')
    command = ["sample", "--models", str(model), str(model), "--prompts", str(asked), "--out", str(out)]
    command += ["--check", "exact_match", "--format", "sft", "--completions", "1", "--max-tokens", "4"]
    assert main([*command, "--vllm-python", str(make())]) == 0
    assert json.loads((out / "data.jsonl").read_text()) == {"prompt": "Is it?", "completion": "yes"}
    assert (out / "answers" / "model_1.jsonl.vllm.log").is_file()
    wait_until_gone(seen()["pids"])
