"""Requests to ``python -m megatron_align.rehearsal``: models of usual widths and few layers, as sizes cost nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_align.rehearsal.stub import compiler

WIDTHS = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
}


def model_folder(folder: Path, **changes) -> str:
    """Write config.json of a model without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**WIDTHS, **changes}))
    return str(folder)


def request(model: str, world_size: int, stage: int, options: dict, config: str | None = None, most=None):
    """Return a request; ``options`` are ``section.key: value`` of the run."""
    given = {"model.path": model, "data.train": "none.jsonl", **options}
    if config is None:
        usual = {"data.sequence_length": 1024, "train.global_batch_size": 64, "train.steps": 1}
        given = {"objective.name": "sft", "checkpoint.dir": "none", **usual, **given}
    arguments = ["--config", config] if config else []
    for name, value in given.items():
        arguments += [f"--{name}", "null" if value is None else str(value)]
    return {
        "arguments": arguments,
        "world_size": world_size,
        "stage": stage,
        "most_micro_batches": most,
    }


def rehearsed(requests: list[dict]) -> list[dict]:
    """Return the reports, one of each request, made in one process."""
    if compiler() is None:
        pytest.skip("a rehearsal compiles a C++ file, and no compiler is here")
    done = subprocess.run(
        [sys.executable, "-m", "megatron_align.rehearsal"],
        input=json.dumps(requests),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(reports) == len(requests)
    return reports


def require_laws(report: dict) -> None:
    """Check what every rehearsal must fulfil."""
    assert "error" not in report, report
    assert not report["faults"]
    share = report["peak"] / report["planned"]
    assert 0.97 <= share <= 1.0, (share, report["peaks"], report["holders"])
    waits = sum(count for _, _, count in report["waits"])
    assert waits <= 2, report["waits"]
    assert report["micro_batches"] >= 3
    assert report["launches"]["forward_kernel"] > 0
