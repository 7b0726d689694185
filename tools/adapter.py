"""``megatron-align adapter merge|extract ...``; also ``python tools/adapter.py``.

One CPU process, tensor by tensor.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from megatron_align.errors import listed

PROGRAM = "megatron-align adapter"
ABOUT = "Merge a low-rank adapter into its base model, or extract an adapter from a base and a trained model."
COMMANDS = {
    "merge": "write base + scale x B A as a Hugging Face folder",
    "extract": "write the adapter that comes nearest to a trained model minus its base, by singular values",
}
_MORE = """Needs no GPU and no torchrun. Adapters are PEFT folders (adapter_config.json, adapter_model.safetensors).
docs/adapters.md has the details."""


def run(arguments: list[str]) -> int:
    """Run with the arguments after ``adapter``; return the exit code."""
    from megatron_align.tools.command import Parser, choose

    name, rest = choose(PROGRAM, ABOUT, COMMANDS, arguments)
    parser = Parser(f"{PROGRAM} {name}", f"{COMMANDS[name]}.\n\n{_MORE}")
    add = parser.add_argument
    add("--base", required=True, metavar="DIR", help="Hugging Face folder of the base model")
    if name == "merge":
        add("--adapter", required=True, metavar="DIR", help="PEFT folder of an adapter of the base")
        about = "dtype of the result; the sum is always taken in fp32 (default: that of each base tensor)"
        add("--dtype", choices=("bfloat16", "float32"), help=about)
    else:
        add("--model", required=True, metavar="DIR", help="Hugging Face folder of the trained model")
        about = "rank of the adapter; full: the one at which nothing is lost"
        add("--rank", required=True, type=_rank, metavar="R", help=about)
        about = (
            "module names or patterns that get an adapter (default: every linear layer of the transformer)"
        )
        add("--targets", nargs="+", metavar="NAME", help=about)
        about = (
            "modules of which a complete copy is written, as PEFT's modules_to_save, besides A and B of the others: "
            "names or patterns, or all: those with tensors outside of A and B that differ, as norms, embedding and "
            "head; a linear layer whose bias differs is copied too (default: none)"
        )
        add("--modules-to-save", nargs="+", default=[], metavar="NAME", help=about)
    add("--out", required=True, metavar="DIR", help="folder to write: new or empty")
    options = parser.parse(rest)
    if "torch" not in sys.modules:  # other processes may use the GPUs
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if name == "merge":
        from megatron_align.merge.adapter import merge_adapter

        count = merge_adapter(options.base, options.adapter, options.out, options.dtype)
        print(f"merged {count} adapted tensors into {options.base}, to {options.out}")
        return 0
    return _extract(options)


def _rank(text: str) -> int | None:
    if text == "full":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number or full, got {text}") from None


def _extract(options: argparse.Namespace) -> int:
    from megatron_align.merge.adapter import extract_adapter

    done = extract_adapter(
        options.base, options.model, options.out, options.rank, options.targets, options.modules_to_save
    )
    worst = f" ({done.worst:.2%} in {done.worst_module})" if done.worst_module else ""
    print(
        f"extracted an adapter of rank {done.adapter.rank} from {done.modules} linear layers, to {options.out}: it "
        f"holds {done.share:.2%} of the squared difference{worst}"
    )
    if saved := sorted(done.adapter.saved):
        print(f"complete copies of {len(saved)} modules, {_size(done.copied_bytes)}: {listed(saved)}")
    for name, spec in done.left_out_specs.items():
        print(
            f"not in the adapter: {name} {list(spec.shape)}, {_size(spec.nbytes)}, differs by up to "
            f"{done.left_out[name]:.3g}"
        )
    if done.left_out:
        size = _size(sum(spec.nbytes for spec in done.left_out_specs.values()))
        remedy = "--modules-to-save all writes complete copies of their modules"
        if options.modules_to_save == ["all"]:
            remedy = "a head whose rows the model normalises cannot be copied"
        print(f"{len(done.left_out)} tensors that differ, {size}, are not in the adapter: {remedy}")
    return 0


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count:,} bytes"


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not tools/: its modules would shadow packages
    from megatron_align.tools.main import main

    sys.exit(main(["adapter", *sys.argv[1:]]))
