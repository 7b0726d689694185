"""Conversion and merging against the disk's own speed and against loading and saving with transformers, in one run.

``python -m benchmarks.convert --folder /big/disk`` builds a model with Llama-3-8B's tensor names and shapes, fewer
layers (``--layers 5``: 4.3 GB in bf16), and three more of its size, runs every case in a separate process, the
contestants in turn for ``--rounds``, prints a table and appends it to ``benchmarks/results/convert.csv``.

- copy: ``cp`` of the model and ``fsync``: the speed of the disk. copy of 4 reads all four inputs of the merge and
  writes one.
- import, export, merge: ours. adapter merge: of a LoRA of ``--rank`` on all linear layers.
- transformers: ``from_pretrained`` and ``save_pretrained`` in bf16.

The page cache drops the inputs before each measurement, and half the memory is written once: a virtual machine fetches
idle memory from its host, and the first case would pay for that. Every contestant's output is on the disk when its
clock stops. GB/s count bytes read and bytes written. User seconds include imports; the rest of the time is the
kernel's and the disk's. Peak memory is the resident size of the process; its bound is twice the largest tensor group
and 512 MB.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.rows import append, stamp
from megatron_align.hf.load import weights_hash
from tests.harness.tiny import make_adapter

VOCAB, HIDDEN, FFN, HEADS, GROUPS = 128256, 4096, 14336, 32, 8
GROUP_BYTES = VOCAB * HIDDEN * 2  # the embedding
ADAPTER = "adapter merge"
BOUND = 2 * GROUP_BYTES + 512 * 2**20


def make_model(folder: Path, layers: int, seed: int) -> None:
    """Write a model of random numbers; each tensor repeats one block of them."""
    import torch

    from megatron_align.hf.writer import ShardWriter, hf_specs
    from megatron_align.model.families import read_shape

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    source = folder.with_name(f"{folder.name}.config")
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    draw = torch.Generator().manual_seed(0)
    common = 0.02 * torch.randn(1 << 22, generator=draw)
    own = common + 0.002 * (torch.randn(1 << 22, generator=draw.manual_seed(seed)) if seed else 0)
    stretch = own.bfloat16()
    specs = hf_specs(read_shape(source), torch.bfloat16)
    with ShardWriter(folder, specs) as writer:
        for name, (_, size) in specs.items():
            total = torch.Size(size).numel()
            for start in range(0, total, len(stretch)):
                writer.write_flat(name, start, stretch[: min(len(stretch), total - start)])
            writer.finish(name)
        shutil.copy(source / "config.json", writer.partial)
    shutil.rmtree(source)


def forget(*folders: Path) -> None:
    """Drop a folder's files from the page cache."""
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def sync(folder: Path) -> None:
    for path in (path for path in folder.rglob("*") if path.is_file()):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


# One measurement each, in a separate process.
def by_copy(hf: Path, out: Path, *others: Path) -> None:
    for folder in others:
        subprocess.run(f"cat {folder}/*.safetensors > /dev/null", shell=True, check=True)
    subprocess.run(["cp", "-r", hf, out], check=True)
    sync(out)


def by_transformers(hf: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(hf, dtype=torch.bfloat16, trust_remote_code=False).save_pretrained(
        out
    )
    sync(out)


def by_import(hf: Path, out: Path) -> None:
    from megatron_align.convert.import_hf import import_hf

    import_hf(hf, out)


def by_export(checkpoint: Path, out: Path) -> None:
    from megatron_align.convert.export_hf import export_hf

    export_hf(checkpoint, out)


def by_merge(base: Path, out: Path, *models: Path) -> None:
    from megatron_align.merge.merge import merge
    from megatron_align.merge.methods import TaskArithmetic

    merge(TaskArithmetic(scale=0.5), base, list(models), out)


def by_stock(base: Path, out: Path, *models: Path) -> None:
    from megatron_align.merge.merge import merge
    from megatron_align.merge.methods import ModelStock

    merge(ModelStock(), base, list(models), out)


def by_adapter(base: Path, out: Path, adapter: Path) -> None:
    from megatron_align.merge.adapter import merge_adapter

    merge_adapter(base, adapter, out)


CASES = {
    "copy": by_copy,
    "import": by_import,
    "export": by_export,
    "transformers": by_transformers,
    "copy of 4": by_copy,
    "merge task_arithmetic": by_merge,
    "merge model_stock": by_stock,
    ADAPTER: by_adapter,
}


def measure(case: str, source: Path, out: Path, others: list[Path]) -> dict[str, float]:
    """Return seconds and peak resident bytes of one case."""
    forget(source, *others)
    touch = "import os; b'1' * (os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') // 2)"
    subprocess.run([sys.executable, "-c", touch], check=True)
    words = [sys.executable, "-m", "benchmarks.convert", "--case", case, source, out, *others]
    answer = subprocess.run(list(map(str, words)), check=True, capture_output=True, text=True)
    return json.loads(answer.stdout.splitlines()[-1])


def run_case(case: str, folders: list[Path]) -> None:
    if case not in ("copy", "copy of 4"):
        import torch  # noqa: F401
        import transformers  # noqa: F401

        import megatron_align.convert.export_hf
        import megatron_align.convert.import_hf
        import megatron_align.merge.adapter
        import megatron_align.merge.merge  # noqa: F401
    start = time.perf_counter()
    CASES[case](*folders)
    seconds = time.perf_counter() - start
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak": peak, "user": sum(each.ru_utime for each in used)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure"
    )
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rank", type=int, default=16, help="of the adapter")
    parser.add_argument("--conversion", action="store_true", help="leave merging out")
    parser.add_argument("--adapter", action="store_true", help="measure the adapter's merge alone")
    parser.add_argument("--case", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        return run_case(options.case[0], [Path(word) for word in options.case[1:]])
    work = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        report(work, options)
    finally:
        shutil.rmtree(work)
    return None


def report(work: Path, options: argparse.Namespace) -> None:
    alone = options.conversion or options.adapter
    models = [work / f"model{number}" for number in range(1 if alone else 4)]
    cases = ["copy", ADAPTER] if options.adapter else [c for c in CASES if not (alone and _merges(c))]
    for number, folder in enumerate(models):
        make_model(folder, options.layers, number)
    # Its base is checked, as that of an adapter of ours always is.
    checked = {"alpha": 2.0 * options.rank, "weights_hash": weights_hash(models[0])}
    make_adapter(work / "adapter", models[0], rank=options.rank, **checked)
    size = sum(path.stat().st_size for path in models[0].glob("*.safetensors"))
    measurements: dict[str, list[dict[str, float]]] = {case: [] for case in cases}
    for _ in range(options.rounds):
        for case in cases:
            source = work / "checkpoint" if case == "export" else models[0]
            out = work / "checkpoint" if case == "import" else work / "out"
            shutil.rmtree(out, ignore_errors=True)
            others = models[1:] if _merges(case) else [work / "adapter"] if case == ADAPTER else []
            measurements[case].append(measure(case, source, out, others))
            if out.name == "out":
                shutil.rmtree(out)
            print(case, measurements[case][-1], flush=True)
    rows = [row_of(case, runs, measurements, size) for case, runs in measurements.items()]
    write(rows, options)


def _merges(case: str) -> bool:
    """Return whether a case has four inputs."""
    return case.startswith(("merge", "copy of"))


def row_of(case: str, runs: list[dict], measurements: dict[str, list[dict]], size: int) -> dict[str, object]:
    seconds = sorted(run["seconds"] for run in runs)
    middle = statistics.median(seconds)
    judge = "copy of 4" if _merges(case) else "copy"
    moved = size * (5 if judge == "copy of 4" else 2)
    theirs = statistics.median(run["seconds"] for run in measurements[judge])
    return {
        "case": case,
        "gigabytes": round(size / 1e9, 2),
        "seconds_p20": round(seconds[len(seconds) // 5], 2),
        "seconds_p50": round(middle, 2),
        "seconds_p80": round(seconds[len(seconds) * 4 // 5], 2),
        "gigabytes_per_second": round(moved / middle / 1e9, 2),
        "of_copy": round(theirs / middle, 2),
        "user_seconds": round(statistics.median(run["user"] for run in runs), 2),
        "peak_megabytes": round(max(run["peak"] for run in runs) / 2**20),
        "bound_megabytes": round(BOUND / 2**20),
    }


def write(rows: list[dict[str, object]], options: argparse.Namespace) -> None:
    import torch

    environment = {
        **stamp(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "layers": options.layers,
        "rounds": options.rounds,
        "load": round(os.getloadavg()[0], 1),
    }
    append("convert", [{**environment, **row} for row in rows])
    widths = {key: max(len(key), *(len(str(row[key])) for row in rows)) for key in rows[0]}
    print("  ".join(f"{key:>{width}}" for key, width in widths.items()))
    for row in rows:
        print("  ".join(f"{row[key]!s:>{width}}" for key, width in widths.items()))


if __name__ == "__main__":
    main()
