"""``megatron-align merge METHOD --base DIR --models DIR... --out DIR``; also ``python tools/merge.py``.

The models are complete ones, or adapters of one base.

One CPU process, in constant memory.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_align.merge.methods import Method
    from megatron_align.tools.command import Parser

PROGRAM = "megatron-align merge"
ABOUT = (
    "Merge Hugging Face folders of one architecture, or adapters of one base, into a new one, tensor by tensor, on one "
    "CPU process."
)
METHODS = {
    "linear": "weighted mean of the models: sum(w_i x_i) / sum(w_i)",
    "task_arithmetic": "base + scale * sum(w_i (x_i - base))",
    "model_stock": "from the base towards the mean of the models, by the angle between task vectors, by tensor",
    "slerp": "spherical interpolation between two models, or from the base to one",
    "ties": "task vectors trimmed to their largest elements, signs elected, agreeing elements averaged",
    "dare": "task vectors randomly sparsified and rescaled, added to the base",
}
_BASELESS = ("linear", "slerp")
_MORE = """Needs no GPU and no torchrun. All folders must have the same sizes, constants and tokenizer, and finite
weights. The result has the first model's configuration and tokenizer, and a model card (README.md, merge.json)
with the inputs, their hashes, the method and its options. A merge that was killed or interrupted resumes when the
same command is run again. Adapters (PEFT folders) of one base are merged into one adapter, or with --merged into the
complete model. docs/merging.md has formulas and advice."""


def run(arguments: list[str]) -> int:
    """Run with the arguments after ``merge``; return the exit code."""
    from megatron_align.tools.command import Parser, choose

    name, rest = choose(PROGRAM, ABOUT, METHODS, arguments)
    parser = Parser(f"{PROGRAM} {name}", f"{METHODS[name]}.\n\n{_MORE}")
    _add_folders(parser, name)
    _add_options(parser, name)
    options = vars(parser.parse(rest))
    if "torch" not in sys.modules:  # other processes may use the GPUs
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return _merge(name, options)


def _add_folders(parser: Parser, name: str) -> None:
    if name not in _BASELESS:
        about = "Hugging Face folder that the models were trained from"
    elif name == "slerp":
        about = "start of the interpolation if one model is given; otherwise only checked to be compatible"
    else:
        about = "not part of this formula: only checked to be compatible"
    parser.add_argument("--base", required=name not in _BASELESS, metavar="DIR", help=about)
    parser.add_argument(
        "--models",
        required=True,
        nargs="+",
        metavar="DIR",
        help="Hugging Face folders to merge, or PEFT folders of adapters of one base (which --base names; default: the "
        "one that all adapters name)",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write: new or empty")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="dtype of the result (default: as stored, which must be equal in all folders)",
    )
    parser.add_argument(
        "--combination",
        choices=("cat", "svd", "linear"),
        help="of adapters: cat concatenates A and B, which is exact, and its rank is the sum of theirs; svd is the "
        "nearest adapter of --rank; linear sums A and B by themselves, an approximation (default: cat, or svd with "
        "ties and dare)",
    )
    about = "of adapters with --combination svd: rank of the result (default: the largest of theirs)"
    parser.add_argument("--rank", type=int, metavar="R", help=about)
    about = "of adapters: write the complete model, merged into the base, instead of one adapter"
    parser.add_argument("--merged", action="store_true", help=about)


def _add_options(parser: Parser, name: str) -> None:
    """Add the options of the formula, and no others."""
    if name in ("linear", "task_arithmetic", "ties", "dare"):
        about = "one number per model, in order (default: 1 / number of models)"
        parser.add_argument("--weights", nargs="+", type=float, metavar="W", help=about)
    if name in ("task_arithmetic", "ties", "dare"):
        about = "factor of the merged task vector (default: 1)"
        parser.add_argument("--scale", type=float, default=1.0, help=about)
    if name == "ties":
        about = "share of each task vector's elements that are kept, the largest ones (default: 0.2)"
        parser.add_argument("--density", type=float, default=0.2, help=about)
    if name == "dare":
        about = "probability that an element of a task vector is kept (default: 0.1)"
        parser.add_argument("--density", type=float, default=0.1, help=about)
        parser.add_argument("--seed", type=int, default=0, help="seed of the random generator (default: 0)")
    if name == "slerp":
        parser.add_argument(
            "--t", type=float, default=0.5, help="position between start (0) and end (1) (default: 0.5)"
        )


def _merge(name: str, options: dict[str, Any]) -> int:
    from megatron_align.errors import require
    from megatron_align.merge.adapters import are_adapters
    from megatron_align.merge.merge import merge
    from megatron_align.merge.methods import METHODS as METHOD_CLASSES

    of_adapters = {key: options.pop(key) for key in ("combination", "rank", "merged")}
    folders = {key: options.pop(key) for key in ("base", "models", "out", "dtype")}
    if options.get("weights") is not None:
        options["weights"] = tuple(options["weights"])
    method = METHOD_CLASSES[name](**options)
    if are_adapters(folders["models"]):
        return _merge_adapters(method, name, folders, **of_adapters)
    given = [f"--{key}" for key, value in of_adapters.items() if value not in (None, False)]
    require(not given, f"{', '.join(given)}: of adapters (PEFT folders), which --models does not name")
    inputs = merge(method, **folders)
    print(
        f"merged {len(folders['models'])} models by {name}: {len(inputs[0].tensors)} tensors, to {folders['out']}"
    )
    return 0


def _merge_adapters(
    method: Method,
    name: str,
    folders: dict[str, Any],
    combination: str | None,
    rank: int | None,
    merged: bool,
) -> int:
    from megatron_align.errors import require
    from megatron_align.merge.adapters import Combination, merge_adapted_models, merge_adapters

    what, out = f"merged {len(folders['models'])} adapters by {name}", folders["out"]
    if merged:
        given = [
            f"--{key}" for key, value in (("combination", combination), ("rank", rank)) if value is not None
        ]
        require(
            not given, f"{', '.join(given)}: of one adapter as the result, which --merged replaces by a model"
        )
        inputs = merge_adapted_models(method, **folders)
        print(f"{what} into the base: {len(inputs[0].tensors)} tensors, to {out}")
        return 0
    done = merge_adapters(method, **folders, combination=Combination(kind=combination, rank=rank))
    held = {"svd": f", which holds {done.share:.2%} of the squared sum", "linear": ", an approximation"}
    print(f"{what} ({done.combination}): {done.adapter}{held.get(done.combination, '')}, to {out}")
    return 0


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not tools/: its modules would shadow packages
    from megatron_align.tools.main import main

    sys.exit(main(["merge", *sys.argv[1:]]))
