"""``megatron-align adapter merge|extract ...``; also ``python tools/adapter.py``.

One CPU process, tensor by tensor.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

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
        add("--rank", required=True, type=int, metavar="R", help="rank of the adapter")
        about = (
            "module names or patterns that get an adapter (default: every linear layer of the transformer)"
        )
        add("--targets", nargs="+", metavar="NAME", help=about)
    add("--out", required=True, metavar="DIR", help="folder to write: new or empty")
    options = parser.parse(rest)
    if "torch" not in sys.modules:  # other processes may use the GPUs
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if name == "merge":
        from megatron_align.merge.adapter import merge_adapter

        count = merge_adapter(options.base, options.adapter, options.out, options.dtype)
        print(f"merged {count} adapted tensors into {options.base}, to {options.out}")
        return 0
    from megatron_align.merge.adapter import extract_adapter

    result = extract_adapter(options.base, options.model, options.out, options.rank, options.targets)
    print(
        f"extracted an adapter of rank {options.rank} from {result.modules} linear layers, to {options.out}: it "
        f"holds {result.share:.2%} of the squared difference ({result.worst:.2%} in {result.worst_module})"
    )
    for name, difference in result.left_out.items():
        print(f"not in the adapter: {name} differs by up to {difference:.3g}")
    return 0


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not tools/: its modules would shadow packages
    from megatron_align.tools.main import main

    sys.exit(main(["adapter", *sys.argv[1:]]))
