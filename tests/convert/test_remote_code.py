"""Code in a Hugging Face folder is never run, whatever is answered on the terminal: all calls say so."""

import ast
import json
from pathlib import Path

from tests.harness import cli
from tests.harness.tiny import make_model


def test_the_folders_own_code_is_never_run(pool, tmp_path):
    """transformers asks on the terminal where nothing forbids it; "y" would then run the folder's code."""

    def convert(*arguments):
        [answer] = pool.run(1, cli.call, ["convert", *map(str, arguments)])
        return answer

    hf, checkpoint, canary = make_model(tmp_path / "hf"), tmp_path / "ckpt", tmp_path / "canary"
    assert convert("import", "--hf", hf, "--out", checkpoint).code == 0
    (hf / "code.py").write_text(
        f"open({str(canary)!r}, 'w')\nfrom transformers import Qwen2Config\nclass C(Qwen2Config): model_type = 'x'\n"
    )
    for changes in ({"model_type": "unknown"}, {"model_type": "qwen2"}):
        auto_map = {
            "AutoConfig": "code.C",
            "AutoModelForCausalLM": "code.M",
            "AutoTokenizer": ["code.T", None],
        }
        config = json.loads((hf / "config.json").read_text())
        (hf / "config.json").write_text(json.dumps({**config, "auto_map": auto_map, **changes}))
        answer = convert("verify", "--hf", hf, "--checkpoint", checkpoint)
        assert not canary.exists()
        if changes["model_type"] == "unknown":
            assert answer.code == 2
            assert answer.err.startswith(f"error: transformers cannot read {hf / 'config.json'}")
            assert "it needs the folder's own code, which is never run" in answer.err
            assert answer.err.count("\n") == 1
        else:
            assert answer.code == 0, answer


def test_every_call_of_transformers_forbids_remote_code():
    root = Path(__file__).parents[2]
    calls = []
    for top in ("megatron_align", "tools", "examples", "benchmarks"):
        for file in (root / top).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                called = getattr(node, "func", None)
                of = ast.unparse(getattr(called, "value", called)) if called else ""
                if (
                    getattr(called, "attr", None) in ("from_pretrained", "from_config")
                    and of != "GenerationConfig"
                ):
                    given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                    calls.append((f"{file}:{node.lineno}", given.get("trust_remote_code")))
    assert len(calls) > 5
    assert [place for place, given in calls if given != "False"] == []
