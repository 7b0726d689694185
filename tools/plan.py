"""``megatron-align plan``: estimate memory, operations and time of a run and search layouts, without a GPU.

Also ``python tools/plan.py``. Exit code: 0 a layout fits (``--rehearse``: the configured one); 1 none; 2 bad input.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_align.config import RunConfig
    from megatron_align.cost.search import Candidate
    from megatron_align.cost.work import WorkOf
    from megatron_align.data.sample_table import SampleTable
    from megatron_align.model.families import ModelShape
    from megatron_align.tools.command import Parser

PROGRAM = "megatron-align plan"
ABOUT = """Estimate the memory of each pipeline stage, the operations and the time of a step and the bytes of each
collective, and list the parallel layouts that fit. Only config.json of model.path is read; sample lengths are used
where the data are tokenised already or small, else every pack is assumed full. Needs no GPU and no torchrun.

Options of the run (--section.key value) can be given too, as for train.

Bytes and operations are counted, and the counts are tested; times are estimates for comparing layouts."""
_WITHOUT_DOT = ("--rewards", "--rewards+")  # the run's options are named section.key, but for this list
SMALL_BYTES = 16_000_000  # data up to this size are tokenised for the plan, into a temporary folder


def run(arguments: list[str]) -> int:
    """Run with the arguments after ``plan``; return the exit code."""
    from megatron_align.tools.command import Parser

    parser = Parser(PROGRAM, ABOUT)
    _arguments(parser)
    own, changes = _split(arguments)
    options = parser.parse(own)
    if "torch" not in sys.modules:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # other processes may be training on the GPUs
    from megatron_align.cost.chips import chip
    from megatron_align.cost.memory import GIB
    from megatron_align.cost.search import PlanRequest, best
    from megatron_align.errors import InputError
    from megatron_align.objectives.configuration import parse
    from megatron_align.tools.plan_rehearsal import rehearsal
    from megatron_align.tools.plan_text import configured_layout, head, nothing_fits, table
    from megatron_align.training.online_costs import online_costs, second_shapes

    config = parse(["--config", options.config, *changes])
    if options.write and Path(options.write).exists():
        raise InputError(f"--write needs a new file, '{options.write}' exists")
    shape = _shape(config)
    with tempfile.TemporaryDirectory() as folder:
        work, source, known = _work(config, folder)
        steps, epochs = known or (config.train.steps, None)
        ptx = _ptx(config, folder)
        request = PlanRequest(
            config=config,
            shape=shape,
            gpus=options.gpus,
            bytes=round(options.gpu_memory * GIB),
            chip=chip(options.chip),
            work=work,
            efficiency=options.efficiency,
            steps=steps,
            epochs=epochs,
            online=online_costs(config, ptx),
            second=second_shapes(config, shape),
        )
        print(head(request, options.chip, source))
        print(configured_layout(request))
        fitting = best(request, options.count)
        print(table(request, fitting) if fitting else nothing_fits(request))
    if fitting and options.write:
        _write(options.write, config, fitting[0])
        print(f"wrote the first layout to {options.write}")
    fits = bool(fitting)
    if options.rehearse:
        config.parallel.data_parallel(options.gpus)
        arguments = ["--config", options.config, *changes]
        text, fits = rehearsal(arguments, config.parallel.pipeline, options.gpus, request.bytes)
        print(text)
    return 0 if fits else 1


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Split into plan's own arguments and those of the run: ``--section.key value`` or ``--section.key=value``."""
    own: list[str] = []
    changes: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, has_value, _ = argument.partition("=")
        if not (name.startswith("--") and ("." in name or name in _WITHOUT_DOT)):
            own.append(argument)
            continue
        value = None if has_value else next(rest, None)
        changes += [argument] if value is None else [argument, value]
    return own, changes


def _arguments(parser: Parser) -> None:
    from megatron_align.cost.chips import CHIPS
    from megatron_align.cost.time import EFFICIENCY
    from megatron_align.tools.command import positive_count

    add = parser.add_argument
    add("--config", required=True, metavar="RUN.yaml", help="configuration of a run")
    add("--gpus", required=True, type=positive_count, metavar="N", help="number of GPUs")
    add("--gpu-memory", required=True, type=_positive, metavar="GIB", help="memory of each GPU, in GiB")
    add("--chip", default="h100", help=f"type of GPU: {', '.join(CHIPS)} (default: h100)")
    add(
        "--efficiency",
        type=_share,
        default=EFFICIENCY,
        metavar="X",
        help=f"assumed share of the chip's peak FLOP/s (default: {EFFICIENCY})",
    )
    add("--count", type=positive_count, default=5, metavar="N", help="number of layouts to show (default: 5)")
    add(
        "--rehearse",
        action="store_true",
        help="also rehearse a step of the configuration's layout on this CPU, with tensors that have no values: peak "
        "memory, host waits, what would fail on a GPU; minutes for a large model, needs a C++ compiler and a CPU build "
        "of torch",
    )
    add("--write", metavar="FILE", help="write the configuration with the first layout to a new file")


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
    return value


def _share(text: str) -> float:
    value = _positive(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"must be in (0, 1], got {text}")
    return value


def _shape(config: RunConfig) -> ModelShape:
    from megatron_align.model.families import read_shape
    from megatron_align.training.setup import locate, trained_shape

    _, assets = locate(config.model.path, weights=False)
    return trained_shape(read_shape(assets), config, assets)


def _work(config: RunConfig, folder: str) -> tuple[WorkOf, str, tuple[int, float] | None]:
    """Return the work of a step, a description of the lengths it is based on, and, with data, steps and epochs."""
    from megatron_align.cost.work import full_packs, of_store, steps_and_epochs

    table, about = _table(config, "train", folder)
    if table is None:
        full = (
            f"every pack is assumed to be one document of {config.data.sequence_length:,} tokens, all scored"
        )
        return full_packs(config), f"{about}: {full}", None
    return of_store(table, config), about, steps_and_epochs(table, config)


def _ptx(config: RunConfig, folder: str) -> WorkOf | None:
    """Return the work of the supervised samples of a step; None: the run has none, or their lengths are not known."""
    from megatron_align.cost.work import of_ptx

    table, about = _table(config, "ptx", folder)
    if table is None:
        if about:
            print(f"warning: {about}: the samples of objective.ptx are not counted")
        return None
    return of_ptx(table, config)


def _table(config: RunConfig, split: str, folder: str) -> tuple[SampleTable | None, str]:
    """Return tokenised data, and what they are; None: there are none, or why they are not read."""
    from megatron_align.data.formats.files import expand
    from megatron_align.data.store import TokenStore
    from megatron_align.data.tokenize.cache_key import StoreSpec
    from megatron_align.data.tokenize.prepare import prepare
    from megatron_align.errors import InputError
    from megatron_align.rollout.prompt_table import open_prompts
    from megatron_align.training.setup import generates, locate

    name = "objective.ptx.data" if split == "ptx" else f"data.{split}"
    _, assets = locate(config.model.path, weights=False)
    spec = StoreSpec.of_run(config, split, str(assets))
    if spec is None:
        return None, ""
    try:
        size = sum(os.path.getsize(file) for source in spec.sources for file in expand(source))
    except InputError:
        return None, f"{name} does not exist"
    if not list(Path(assets).glob("tokenizer*")):
        return None, "model.path has no tokenizer"
    if split == "train" and generates(config):
        prompts, tokens = open_prompts(config.data, config.rollout, str(assets)), config.rollout.max_tokens
        about = f"{len(prompts):,} prompts, each with {prompts.completions} completions of {tokens:,} tokens"
        return prompts, about
    if Path(spec.cache).is_dir() and (path := spec.path(spec.inputs())).exists():
        return TokenStore(path), f"lengths of the tokenised data in {path}"
    if size > SMALL_BYTES:
        return None, f"{name} is large and not tokenised yet (megatron-align prepare)"
    store = TokenStore(prepare(dataclasses.replace(spec, cache=folder)))
    return store, f"lengths of {name}, {len(store):,} samples"


def _write(file: str, config: RunConfig, chosen: Candidate) -> None:
    import yaml

    from megatron_align.config import to_dict

    placement = chosen.placement
    train = dataclasses.replace(
        config.train, recompute_layers=placement.recompute_layers, recompute_modules=[]
    )
    planned = dataclasses.replace(config, parallel=placement.parallel, train=train)
    text = yaml.safe_dump(to_dict(planned), sort_keys=False, allow_unicode=True)
    Path(file).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not tools/: its modules would shadow packages
    from megatron_align.tools.main import main

    sys.exit(main(["plan", *sys.argv[1:]]))
