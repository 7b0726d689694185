"""Run the laws in their quick form on every CPython that is found, with both ends of megatron-core.

``make test-matrix`` looks for CPython 3.10 to 3.13 on PATH and under ``~/.pyenv/versions``. Each gets an environment
in ``.matrix/`` with its constraints (``tests/constraints/``), several GB where torch has CUDA; megatron-core's releases
are in folders next to it. What is not found is named and left out. One table is printed at the end: that of
``docs/compatibility.md``.

    python tests/matrix.py --environment .venv     # only the laws, in an environment that exists, as it is
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
LOWEST, NEWEST = "0.16.1", "0.19.2"  # megatron-core; the newest needs Python 3.12
LAYOUT, PREFERENCE = (
    "tests/training/test_layout.py::test_layouts_agree",
    "tests/training/test_preference_layout.py",
)
ATTENTION, COMPILED = "tests/ops/test_attention_kernels.py", "tests/ops/test_attention_compiled.py"
LAWS = {
    "1 layout": [
        *(
            f"{LAYOUT}[{layout}]"
            for layout in ("tp2_pp2", "vpp2", "dp2", "recompute", "recompute_ulysses2_pp2")
        ),
        *(f"{PREFERENCE}::test_layouts_agree[dpo-{layout}]" for layout in ("tp2_pp2", "allgather2")),
        "tests/training/test_recompute.py::test_gradients_are_the_same[layers_3_of_4-alone]",
        "tests/training/test_recompute.py::test_gradients_are_the_same[all_parts-tp2_pp2]",
    ],
    "2 HF": [
        f"tests/model/test_hf_logits.py::test_logits_equal_transformers[{variant}-tp2_sp]"
        for variant in ("qwen2_tied", "llama3", "qwen3", "mistral")
    ],
    "3 TRL": [
        "tests/training/test_trl_sft.py::test_losses_equal_trl[tp2_pp2_against_accumulation]",
        "tests/training/test_trl_preference.py::test_dpo[robust]",
        "tests/training/test_trl_preference.py::test_kto[kto]",
    ],
    "4 resume": [
        "tests/training/test_resume.py::test_checkpoints_do_not_care_for_transformer_engine",
        "tests/training/test_resume.py::test_a_kill_between_validation_and_save_loses_no_row",
        "tests/checkpoint/test_torch_metadata.py",
    ],
    "5 isolation": ["tests/training/test_isolation.py::test_other_samples_do_not_move[tp1]"],
    "6 round trip": [
        f"tests/convert/test_import_export.py::test_round_trip_is_byte_identical[{case}]"
        for case in ("one file-qwen2_untied-bfloat16", "shards-qwen3-bfloat16")
    ],
    "7 kernels": [
        f"{ATTENTION}::test_matches_float64[groups H2:2 D64-torch.float16]",
        f"{COMPILED}::test_rows_of_16_bit[('sm_80', 64, 'bfloat16')-whole]",
        f"{COMPILED}::test_rows_of_16_bit[('sm_90', 128, 'bfloat16')-whole]",
        *(
            f"tests/ops/test_slab_kernels.py::test_compiles_without_spills[dtype0-plain-{chip}]"
            for chip in ("sm_80", "sm_90")
        ),
        "tests/ops/test_slab_kernels.py::test_token_scores_runs_on_them",
    ],
    "8 sanity": [f"{PREFERENCE}::test_the_first_step_knows_no_difference[cached]"],
    "names": ["tests/model/test_megatron_versions.py"],
}
PACKAGES = ("megatron-core", "torch", "triton", "transformers", "trl")


@dataclass(frozen=True)
class Environment:
    """An interpreter with packages; ``overlay`` is a folder whose packages come before them."""

    python: Path
    overlay: Path | None = None

    def variables(self) -> dict[str, str]:
        """Return the environment's variables: this source first, no GPU."""
        paths = [str(self.overlay)] if self.overlay else []
        chosen = {"PYTHONPATH": os.pathsep.join([*paths, str(ROOT)]), "OMP_NUM_THREADS": "1"}
        return {**os.environ, **chosen, "CUDA_VISIBLE_DEVICES": ""}

    def versions(self) -> dict[str, str]:
        """Return the version of Python and of each package that is there."""
        code = (
            "import json, platform, importlib.metadata as m\n"
            f"found = {{d.metadata['Name'].lower(): d.version for d in m.distributions()}}\n"
            f"first = {{n: m.version(n) for n in {PACKAGES!r} if n in found}}\n"
            "print(json.dumps({'Python': platform.python_version(), **first}))"
        )
        done = subprocess.run(
            [self.python, "-c", code], env=self.variables(), check=True, capture_output=True, text=True
        )
        return json.loads(done.stdout)


def interpreters() -> dict[str, Path]:
    """Return a CPython of each supported minor version that is found, pyenv's first."""
    found: dict[str, Path] = {}
    pyenv = sorted(Path.home().glob(".pyenv/versions/*/bin/python"), key=lambda path: path.parts[-3])
    for minor in PYTHONS:
        candidates = [path for path in pyenv if re.fullmatch(rf"{re.escape(minor)}\.\d+", path.parts[-3])]
        on_path = shutil.which(f"python{minor}")
        for path in [*candidates[::-1], *([Path(on_path)] if on_path else [])]:
            # A shim of pyenv's is on PATH for each version, and fails for those that are not chosen.
            done = subprocess.run([path, "-c", "import venv, ensurepip"], capture_output=True)
            if done.returncode == 0:
                found[minor] = path
                break
    return found


def build(minor: str, interpreter: Path, folder: Path) -> list[Environment]:
    """Install the environment of this Python and megatron-core's ends next to it, where they are missing."""
    home = folder / f"python{minor}"
    python = home / "bin" / "python"
    constraints = ROOT / "tests" / "constraints" / f"python{minor}.txt"
    stamp = home / ".installed"
    if not stamp.exists():
        subprocess.run([interpreter, "-m", "venv", home], check=True)
        pip = [python, "-m", "pip", "install", "-q"]
        subprocess.run([*pip, "torch", "numpy<2.4", "-c", constraints], check=True, cwd=ROOT)
        has_triton = subprocess.run([python, "-c", "import triton"], capture_output=True).returncode == 0
        if not has_triton:
            subprocess.run([*pip, "triton==3.6.0"], check=True)
        subprocess.run([*pip, "-e", ".[test]", "-c", constraints], check=True, cwd=ROOT)
        stamp.touch()
    environments = []
    for release in (LOWEST, NEWEST) if minor in ("3.12", "3.13") else (LOWEST,):
        overlay = folder / f"megatron-core-{release}-python{minor}"
        if not overlay.exists():
            pip = [python, "-m", "pip", "install", "-q", "--no-deps", "--target"]
            subprocess.run([*pip, overlay, f"megatron-core=={release}"], check=True)
        environments.append(Environment(python, overlay))
    return environments


def run(environment: Environment, versions: dict[str, str]) -> dict[str, str]:
    """Run the laws in one process; return ``passed/all`` by law, ``-`` for what the environment cannot run."""
    chosen = {law: tests for law, tests in LAWS.items() if law != "3 TRL" or "trl" in versions}
    with tempfile.NamedTemporaryFile(suffix=".xml") as report:
        names = [name for tests in chosen.values() for name in tests]
        command = [
            environment.python,
            "-W",
            "ignore",
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "--junitxml",
            report.name,
        ]
        done = subprocess.run([*command, *names], cwd=ROOT, env=environment.variables())  # fmt: skip
        if done.returncode > 1:
            return dict.fromkeys(LAWS, "not run")
        cases = ElementTree.parse(report.name).iter("testcase")
        passed, total = Counter[str](), Counter[str]()
        for case in cases:
            file = case.get("classname", "").replace(".", "/") + ".py"
            name = f"{file}::{case.get('name')}"
            [law] = [law for law, tests in chosen.items() if name in tests or file in tests]
            total[law] += 1
            passed[law] += not any(child.tag in ("failure", "error", "skipped") for child in case)
    return {law: f"{passed[law]}/{total[law]}" if law in chosen else "-" for law in LAWS}


def main() -> None:
    """Run everything that can be run here and print the table; exit with 1 if a law fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=ROOT / ".matrix", help="where the environments are")
    parser.add_argument("--environment", type=Path, nargs="+", help="use these, built by others, as they are")
    parser.add_argument(
        "--overlay", type=Path, help="folder whose packages come before those of --environment"
    )
    arguments = parser.parse_args()
    notes: list[str] = []
    environments: list[Environment] = []
    if arguments.environment:
        environments = [
            Environment(path.absolute() / "bin" / "python", arguments.overlay)
            for path in arguments.environment
        ]
    else:
        found = interpreters()
        notes = [f"CPython {minor} was not found: not run" for minor in PYTHONS if minor not in found]
        for minor, interpreter in found.items():
            environments += build(minor, interpreter, arguments.folder)
    columns = ["Python", *PACKAGES, *LAWS]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    failed = False
    for environment in environments:
        versions = environment.versions()
        results = run(environment, versions)
        failed |= any(
            value != "-" and len(set(value.split("/"))) > 1 or value == "not run"
            for value in results.values()
        )
        row = {**versions, **results}
        lines.append(f"| {' | '.join(row.get(column, '-') for column in columns)} |")
        print("\n".join([lines[0], lines[1], lines[-1]]), flush=True)
    print("\n".join(["", *lines, *notes]), flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
