"""``megatron-align convert import | export | verify``; also ``python tools/convert.py``.

One CPU process, no torchrun, in constant memory (verify: with --deep). Exit code of verify: 0 the same model, 1 a
difference or a non-finite number, 2 bad input.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_align.tools.command import Parser

PROGRAM = "megatron-align convert"
ABOUT = "Convert between Hugging Face folders and checkpoints, tensor by tensor, on one CPU process."
COMMANDS = {
    "import": "Hugging Face folder -> checkpoint (weights only, no optimizer state)",
    "export": "checkpoint -> Hugging Face folder (config, tokenizer, safetensors); of an adapter also a PEFT folder",
    "verify": "check that a checkpoint and a Hugging Face folder hold the same model",
}
_MEMORY = "Needs no GPU and no torchrun. Memory: about 0.5 GB, plus {memory}."
_VERIFY = """Three checks: the sizes and constants of config.json are equal; every tensor is equal byte for byte;
and the logits of our model on packed texts equal those of transformers on each text alone (both in fp32, on
random tokens and on real text). Exit code 0: everything is equal; 1: something differs or is not finite; 2: bad
input. If logits differ, the first module that differs is named. A trained checkpoint differs from the model it
started from: compare it with its own export. A checkpoint that holds an adapter is compared with its PEFT folder, or
with the merged model, whose adapted tensors may differ by the rounding of one sum."""


def run(arguments: list[str]) -> int:
    """Run with the arguments after ``convert``; return the exit code."""
    from megatron_align.tools.command import Parser, choose

    name, rest = choose(PROGRAM, ABOUT, COMMANDS, arguments)
    add_arguments, act, memory = {
        "import": (_import_arguments, _import, "three blocks of 64 MB, whatever the model's size"),
        "export": (
            _export_arguments,
            _export,
            "twice the largest tensor, or group of tensors that form one of ours (query, key and value)",
        ),
        "verify": (
            _verify_arguments,
            _verify,
            "8 bytes per parameter (both models in fp32); with --deep, those of one layer",
        ),
    }[name]
    about = _VERIFY if name == "verify" else f"{COMMANDS[name]}."
    parser = Parser(f"{PROGRAM} {name}", f"{about}\n\n{_MEMORY.format(memory=memory)}")
    add_arguments(parser)
    options = parser.parse(rest)
    _stay_on_cpu()
    return act(options)


def _stay_on_cpu() -> None:
    """Hide the GPUs, which other processes may use; it has no effect once torch is loaded."""
    if "torch" not in sys.modules:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _import_arguments(parser: Parser) -> None:
    parser.add_argument("--hf", required=True, metavar="DIR", help="Hugging Face folder to read")
    parser.add_argument(
        "--out", required=True, metavar="CKPT", help="checkpoint to write: a new or empty folder"
    )
    _add_dtype(parser)


def _import(options: argparse.Namespace) -> int:
    from megatron_align.convert.import_hf import import_hf

    done = import_hf(options.hf, options.out, options.dtype)
    print(f"imported {done}, to {options.out}")
    return 0


def _add_dtype(parser: Parser) -> None:
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="dtype to cast the weights to (default: as stored, so that no byte changes)",
    )


def _export_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="CKPT",
        help="a checkpoint, or a run's folder, meaning its newest checkpoint",
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="Hugging Face folder to write: new or empty; of an adapter DIR/adapter, and with its base DIR/hf merged",
    )
    parser.add_argument(
        "--critic",
        action="store_true",
        help="export the critic of a checkpoint of objective ppo, as a reward model, in place of the policy",
    )
    _add_dtype(parser)
    _add_base(parser)


def _add_base(parser: Parser) -> None:
    parser.add_argument(
        "--base",
        metavar="DIR",
        help="of a checkpoint that holds an adapter: the model that it was trained on, a Hugging Face folder or a "
        "checkpoint (default: the one that the checkpoint names)",
    )


def _adapter_checkpoint(options: argparse.Namespace) -> Path | None:
    """Return the checkpoint if it holds an adapter; None: it holds a complete model, or is none."""
    from megatron_align.checkpoint.folder import find_checkpoint
    from megatron_align.convert.open_adapter import holds_adapter
    from megatron_align.errors import require

    folder = find_checkpoint(options.checkpoint)
    if folder is not None and holds_adapter(folder):
        return folder
    require(
        options.base is None,
        f"--base belongs to checkpoints that hold an adapter, which {options.checkpoint} does not",
    )
    return None


def _export_adapter(checkpoint: Path, options: argparse.Namespace) -> int:
    from megatron_align.checkpoint.folder import ADAPTER, HF
    from megatron_align.convert.export_adapter import export_adapter
    from megatron_align.hf.assets import describe_assets

    done = export_adapter(checkpoint, options.out, options.base, options.dtype)
    out = Path(options.out)
    print(f"exported the adapter, {done.stored.adapter}, from {checkpoint} to {out / ADAPTER}")
    if done.base is None:
        print(f"the merged model was not written: {done.missing}; give the base as --base")
    else:
        print(f"exported it merged into {done.base}, to {out / HF}: {describe_assets(out / HF)}")
    return 0


def _export(options: argparse.Namespace) -> int:
    from megatron_align.checkpoint.card import is_of_training
    from megatron_align.convert.export_hf import export_hf
    from megatron_align.errors import require
    from megatron_align.hf.assets import describe_assets

    require(
        not options.critic or options.base is None,
        f"--base does not apply to --critic, which is a complete model in its checkpoint; got {options.base}",
    )
    if not options.critic and (checkpoint := _adapter_checkpoint(options)) is not None:
        return _export_adapter(checkpoint, options)

    done = export_hf(options.checkpoint, options.out, options.dtype, critic=options.critic)
    print(f"exported {'the critic, ' * options.critic}{done}, from {done.folder} to {options.out}")
    if is_of_training(done.folder):
        print(describe_assets(Path(options.out)))
    return 0


def _verify_arguments(parser: Parser) -> None:
    parser.add_argument("--hf", required=True, metavar="DIR", help="Hugging Face folder")
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="CKPT",
        help="a checkpoint, or a run's folder, meaning its newest checkpoint",
    )
    parser.add_argument(
        "--data",
        metavar="FILE.jsonl",
        help="real text in the formats of training data; the first 16 records are used (default: built-in sentences)",
    )
    parser.add_argument(
        "--tolerance",
        type=_tolerance,
        default=1e-4,
        help="largest absolute difference of a logit (default: 1e-4)",
    )
    parser.add_argument(
        "--deep",
        action="store_true",
        help="compare layer by layer, with one layer of each model in memory: for models that do not fit twice",
    )
    _add_base(parser)
    parser.add_argument("--json", metavar="REPORT", help="also write the report to this file, as JSON")


def _tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"must be a non-negative number, got {text}")
    return value


def _verify(options: argparse.Namespace) -> int:
    _quiet_transformers()
    from megatron_align.convert.verify import verify
    from megatron_align.convert.verify_adapter import verify_adapter
    from megatron_align.storage.atomic_write import require_writable

    if options.json:
        require_writable(Path(options.json))
    how = (options.data, options.tolerance, options.deep)
    if (checkpoint := _adapter_checkpoint(options)) is not None:
        findings = verify_adapter(options.hf, checkpoint, options.base, *how)
    else:
        findings = verify(options.hf, options.checkpoint, *how)
    if options.json:
        text = json.dumps(findings.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
        Path(options.json).write_text(text + "\n", encoding="utf-8")
    print("\n".join(findings.lines()))
    return 0 if findings.equal else 1


def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not tools/: its modules would shadow packages
    from megatron_align.tools.main import main

    sys.exit(main(["convert", *sys.argv[1:]]))
