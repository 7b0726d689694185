"""Tokenising: ours against ``datasets.map(batched=True)`` with the same fast tokenizer, in one run; and memory.

``python -m benchmarks.tokenise`` generates a corpus and trains a tokenizer on it, measures every case in a
separate process, the two contestants in turn, prints a table and appends it to ``benchmarks/results/tokenise.csv``.

- text: plain prompt + completion. The peer tokenises the full text only and does not mark the completion.
- marked: two-turn chats, a template with generation marks. The peer requests the assistant mask, as TRL does.
- chat: two-turn chats, a template without marks. The peer tokenises the full text only, without a mask.

Ours reads, checks, hashes, tokenises, masks and stores. Both use one core: rates are text bytes of the file over
CPU seconds of the process, imports and the loading of the tokenizer left out. ``map``: the peer's map alone;
``all``: with its reading of the file. ``--processes`` adds the wall time of several processes. Memory is the peak
resident size (VmHWM) while ``--processes`` processes prepare a file of ``--memory`` megabytes: of the process that
reads and joins, of the largest tokeniser process; and of a process that prepares one record.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.rows import append, stamp

CASES = ("text", "marked", "chat")
TURN = "<|im_start|>' + m.role + '\\n' }}"
TEMPLATES = {
    "marked": "{% for m in messages %}{{ '" + TURN + "{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "chat": "{% for m in messages %}{{ '" + TURN + "{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
}


class Corpus:
    """Text with a Zipf-like vocabulary and lognormal lengths."""

    def __init__(self) -> None:
        self._random = random.Random(0)
        letters = "eeeeeetttttaaaaooooiiiinnnnsssshhhrrrddlllcummwfgypbvk"
        self._words = [
            "".join(self._random.choices(letters, k=self._random.randint(1, 9))) for _ in range(20000)
        ]
        self._weights = [1 / (rank + 5) for rank in range(len(self._words))]

    def text(self, scale: float) -> str:
        words = self._random.choices(
            self._words, self._weights, k=max(3, int(scale * self._random.lognormvariate(0, 0.8)))
        )
        return " ".join(w + "." if self._random.random() < 0.08 else w for w in words)

    def record(self, case: str) -> dict:
        question, answer = self.text(60), self.text(300)
        if case == "text":
            return {"prompt": question, "completion": " " + answer}
        turns = [question, answer, self.text(20), self.text(150)]
        roles = ("user", "assistant") * 2
        return {"messages": [{"role": r, "content": t} for r, t in zip(roles, turns, strict=True)]}

    def write(self, file: Path, case: str, megabytes: float) -> None:
        """Write a file of this size; at most 20 MB are generated and repeated."""
        with open(file, "w", encoding="utf-8") as out:
            stretch: list[str] = []
            size = 0
            while size < min(megabytes, 20) * 1e6:
                stretch.append(json.dumps(self.record(case)) + "\n")
                size += len(stretch[-1])
            text = "".join(stretch)
            for _ in range(max(1, round(megabytes * 1e6 / size))):
                out.write(text)


def make_tokenizer(folder: Path, case: str, texts: list[str]) -> None:
    """Train a byte-level BPE of 8,192 tokens and save it as a Hugging Face folder."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    split = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    core = Tokenizer(BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=8192, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(texts, trainer)
    core.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", chat_template=TEMPLATES.get(case)
    ).save_pretrained(folder)


# One measurement each, in a separate process that prints one line of JSON.
def ours(folder: Path, case: str, file: str, processes: int) -> dict[str, float]:
    """Prepare a store, after a warm-up with a single record."""
    from megatron_align.data.store import TokenStore
    from megatron_align.data.tokenize.cache_key import StoreSpec
    from megatron_align.data.tokenize.prepare import prepare

    def spec(name: str, used: int) -> StoreSpec:
        return StoreSpec(
            sources=(str(folder / name),),
            tokenizer=str(folder / "tokenizer"),
            sequence_length=1 << 20,
            too_long="error",
            cache=tempfile.mkdtemp(dir=folder),
            processes=used,
        )

    prepare(spec("one.jsonl", 1))
    before = _peak()
    clock = _clock()
    with _children_watched() as children:
        store = TokenStore(prepare(spec(file, processes)))
    peaks = {"peak": _peak(), "peak_before": before, "peak_child": max(children.values(), default=0)}
    return {**_elapsed(clock), "tokens": int(store.lengths.sum()), **peaks}


def peer(folder: Path, case: str, file: str, processes: int) -> dict[str, float]:
    """Read with ``datasets`` and map, after a warm-up with a single record."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", trust_remote_code=False)

    def tokenise(batch: dict) -> dict:
        if case == "text":
            return tokenizer([p + c for p, c in zip(batch["prompt"], batch["completion"], strict=True)])
        if case == "marked":
            return dict(
                tokenizer.apply_chat_template(
                    batch["messages"], return_dict=True, return_assistant_tokens_mask=True
                )
            )
        return tokenizer(
            tokenizer.apply_chat_template(batch["messages"], tokenize=False), add_special_tokens=False
        )

    def read(name: str):
        cache = tempfile.mkdtemp(dir=folder)
        return datasets.load_dataset("json", data_files=str(folder / name), split="train", cache_dir=cache)

    def run(data, used: int):
        return data.map(
            tokenise, batched=True, num_proc=used if used > 1 else None, remove_columns=data.column_names
        )

    run(read("one.jsonl"), 1)
    clock = _clock()
    data = read(file)
    mapping = _clock()
    done = run(data, processes)
    found = {**_elapsed(clock), **{f"map_{k}": v for k, v in _elapsed(mapping).items()}}
    tokens = (
        sum(len(row) for row in done.with_format("arrow")["input_ids"][:].to_pylist())
        if processes == 1
        else 0
    )
    return {**found, "tokens": tokens}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


@contextmanager
def _children_watched() -> Iterator[dict[str, float]]:
    """Yield the last seen peak resident size (MB) of every descendant process."""
    peaks: dict[str, float] = {}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            for process in _below(str(os.getpid())):
                with suppress(OSError):  # it has just ended
                    status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
                    for kilobytes in re.findall(r"^VmHWM:\s*(\d+)", status, re.M):
                        peaks[process] = int(kilobytes) * 1024 / 1e6

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peaks
    finally:
        done.set()
        watcher.join()


def _below(process: str) -> list[str]:
    found = []
    for file in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):
            found += file.read_text(encoding="utf-8").split()
    return found + [below for child in found for below in _below(child)]


def _clock() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _elapsed(since: tuple[float, float]) -> dict[str, float]:
    return {"wall": time.perf_counter() - since[0], "cpu": time.process_time() - since[1]}


def in_child(what: str, folder: Path, case: str, file: str, processes: int) -> dict[str, float]:
    """Measure in a new process with one thread for tokenising."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "RAYON_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "datasets"),
    }
    command = [
        sys.executable,
        "-m",
        "benchmarks.tokenise",
        "--measure",
        what,
        str(folder),
        case,
        file,
        str(processes),
    ]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(folder: Path, case: str, options: argparse.Namespace) -> dict[str, object]:
    """Measure one case; the contestants alternate, and the median of each is taken."""
    corpus = Corpus()
    corpus.write(folder / "one.jsonl", case, 1e-6)
    corpus.write(folder / "data.jsonl", case, options.megabytes)
    texts = [corpus.text(300) for _ in range(2000)]
    make_tokenizer(folder / "tokenizer", case, texts)
    size = (folder / "data.jsonl").stat().st_size / 1e6
    turns = [
        (in_child("ours", folder, case, "data.jsonl", 1), in_child("peer", folder, case, "data.jsonl", 1))
        for _ in range(options.repeats)
    ]
    mine, theirs = (sorted(turn[i]["cpu"] for turn in turns)[len(turns) // 2] for i in (0, 1))
    mapped = sorted(turn[1]["map_cpu"] for turn in turns)[len(turns) // 2]
    same = turns[0][0]["tokens"] == turns[0][1]["tokens"] + (_records(folder) if case == "text" else 0)
    row = {
        "case": case,
        "megabytes": round(size, 1),
        "repeats": options.repeats,
        "tokens": turns[0][0]["tokens"],
        "same_tokens": same,  # text: ours ends each sample with EOS
        "ours_mb_per_cpu_s": round(size / mine, 3),
        "peer_all_mb_per_cpu_s": round(size / theirs, 3),
        "peer_map_mb_per_cpu_s": round(size / mapped, 3),
        "ratio_all": round(theirs / mine, 3),
        "ratio_map": round(mapped / mine, 3),
        "processes": options.processes,
        "ours_wall_s": "",
        "peer_wall_s": "",
        "memory_megabytes": "",
        "peak_mb": "",
        "peak_one_record_mb": "",
        "peak_child_mb": "",
    }
    if options.processes > 1:
        for what in ("ours", "peer"):
            found = in_child(what, folder, case, "data.jsonl", options.processes)
            row[f"{what}_wall_s"] = round(found["wall"], 2)
    if options.memory:
        corpus.write(folder / "data.jsonl", case, options.memory)
        found = in_child("ours", folder, case, "data.jsonl", options.processes)
        row |= {
            "memory_megabytes": round((folder / "data.jsonl").stat().st_size / 1e6),
            "peak_mb": round(found["peak"]),
            "peak_one_record_mb": round(found["peak_before"]),
            "peak_child_mb": round(found["peak_child"]),
        }
    return row


def _records(folder: Path) -> int:
    with open(folder / "data.jsonl", encoding="utf-8") as lines:
        return sum(1 for _ in lines)


def main() -> None:
    """Measure, print and append to the results."""
    if sys.argv[1:2] == ["--measure"]:
        what, folder, case, file, processes = sys.argv[2:]
        print(json.dumps({"ours": ours, "peer": peer}[what](Path(folder), case, file, int(processes))))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--processes", type=int, default=2, help="processes of the wall-time measurement; 1: none"
    )
    parser.add_argument(
        "--memory", type=float, default=0, help="size in MB of the file of the memory measurement; 0: none"
    )
    options = parser.parse_args()
    import datasets
    import tokenizers
    import transformers

    for case in options.cases:
        load = os.getloadavg()[0]
        with tempfile.TemporaryDirectory() as folder:
            row = {
                **stamp(),
                "cores": os.cpu_count(),
                "load": round(load, 1),
                "python": platform.python_version(),
                "transformers": transformers.__version__,
                "tokenizers": tokenizers.__version__,
                "datasets": datasets.__version__,
                **compare(Path(folder), case, options),
            }
        print("\n".join(f"{name:24} {value}" for name, value in row.items()), end="\n\n", flush=True)
        append("tokenise", [row])


if __name__ == "__main__":
    main()
