"""Command lines of the tools: sub-commands, and options whose errors are one line."""

from __future__ import annotations

import argparse
import math
import sys
from typing import Any, NoReturn

from megatron_align.config.familiar_names import answer, plain
from megatron_align.errors import InputError, nearest

# metavars of options that are paths
PATHS = (
    *("DIR", "CKPT", "PATH", "FILE", "FILE.jsonl", "REPORT", "RUN.yaml", "MODEL", "FIRST", "SECOND"),
    *("WRITER", "CRITIC", "SCORER", "LABELLER", "EMBEDDER"),  # or a URL, a column: these begin with no ~
)
OPTIONS = (
    "OPTIONS"  # metavar of an option whose one value is another program's options: it begins with dashes
)
# A tool's option -> names of it in other programs; those of training are in config/familiar_names.py.
_SAME = {
    "out": "output output_dir output_path save save_dir save_path out_path out_dir export_dir save_folder hf_save_path "
    "megatron_save_path outdir dst target target_dir",
    "hf": "model model_name_or_path model_path model_id hf_path hf_model hf_dir base_model "
    "hf_model_path load_dir",
    "checkpoint": "checkpoint_dir checkpoint_path ckpt ckpt_dir megatron_path mcore_model load load_dir adapter",
    "models": "model model_name_or_path model_path checkpoints sources",
    "base": "base_model base_model_name_or_path ref_model pretrained",
    "dtype": "torch_dtype out_dtype save_dtype precision",
    "t": "alpha interpolation",
    "scale": "lambda lam scaling_factor normalize_scale",
    "density": "k top_k drop_rate keep",
    "tokenizer": "model model_name_or_path model_path tokenizer_path tokenizer_name tokenizer_name_or_path model_id",
    "data": "dataset datasets train_file data_path data_files input train_data train_dataset dataset_path dataset_name",
    "sequence_length": "cutoff_len max_length max_seq_length max_len seq_length sequence_len "
    "model_max_length max_seq_len",
    "cache": "cache_dir dataset_prepared_path out output output_dir output_path tokenized_path save_path",
    "processes": "num_proc num_workers workers preprocessing_num_workers dataset_num_proc dataset_processes jobs",
    "chat_template": "template prompt_template chat_template_path",
    "shape": "format dataset_format dataset_type data_format",
    "too_long": "truncation_strategy truncation truncation_mode",
    "on_bad_record": "strict",
    "config": "config_file yaml run cfg config_path",
    "gpus": "num_gpus n_gpus ngpus world_size ranks gpu nproc_per_node n_gpu num_processes",
    "gpu_memory": "memory gpu_mem vram mem gpu_memory_gb",
    "chip": "gpu_type gpu_name device accelerator hardware",
    "efficiency": "mfu",
    "count": "top top_k n limit",
    "write": "out output output_file save",
    "ranks": "world_size data_parallel_size dp num_gpus",
    "global_batch_size": "batch_size gbs train_batch_size",
    "pack_length": "packing_length",
    "title": "name run_name",
}


class Parser(argparse.ArgumentParser):
    """argparse whose errors are :class:`InputError`; an unknown option names the nearest valid one."""

    def __init__(self, program: str, about: str):
        self._names: list[str] = []
        self._verbatim: set[str] = set()  # options with OPTIONS
        super().__init__(
            prog=program,
            description=about,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.register("type", int, whole_number)

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """Add an argument as argparse does; in one whose ``metavar`` is of :data:`PATHS`, ``~`` is expanded."""
        self._names += names
        if options.get("metavar") == OPTIONS:
            self._verbatim.update(names)
        if options.get("metavar") in PATHS:
            options["type"] = _path
        return super().add_argument(*names, **options)

    def parse(self, arguments: list[str]) -> argparse.Namespace:
        """Parse the arguments.

        Raises:
            InputError: for an unknown, missing or malformed one.
        """
        arguments = self._with_their_values(arguments)
        # Checked first: argparse would only report that the correctly spelt option is missing.
        for name in (argument.partition("=")[0] for argument in arguments if argument.startswith("--")):
            is_value = " " in name  # as '--tensor-parallel-size 2'
            if not is_value and name not in self._names:
                raise InputError(f"{self.prog} has no option {name[:80]}{self._meant(name)}")
        return self.parse_args(arguments)

    def _with_their_values(self, arguments: list[str]) -> list[str]:
        """Join options whose value may begin with dashes to it, by which argparse takes it for a value."""
        joined: list[str] = []
        for argument in arguments:
            if joined and joined[-1] in self._verbatim:
                joined[-1] += f"={argument}"
            else:
                joined.append(argument)
        return joined

    def _meant(self, name: str) -> str:
        """Return this tool's option that a name is a misspelling or another program's name of, or else a run's."""
        word = plain(name)
        own = {plain(option): option for option in self._names if option.startswith("--")}
        same = [own[ours] for ours, names in _SAME.items() if ours in own and word in names.split()]
        if match := own.get(word) or next(iter(same), None):
            return f"; did you mean '{match}'?"
        if misspelt := nearest(name, self._names):
            return misspelt
        known = answer(word)
        return (
            f": for a training run, {known}, in its configuration" if known else f" (see {self.prog} --help)"
        )

    def error(self, message: str) -> NoReturn:
        """Raise argparse's error as :class:`InputError`."""
        raise InputError(f"{self.prog}: {message} (see {self.prog} --help)")


def whole_number(text: str) -> int:
    """Read a whole number as configurations do: ``1e6`` and ``3.0`` are some."""
    try:
        return int(text)
    except ValueError:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not number.is_integer():
            raise argparse.ArgumentTypeError(f"must be a whole number, got '{text[:80]}'") from None
        return int(number)


def positive_count(text: str) -> int:
    """Read a whole number of at least 1."""
    number = whole_number(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text[:80]}")
    return number


def _path(text: str) -> str:
    from megatron_align.config.paths import expand_home

    try:
        return expand_home(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def choose(program: str, about: str, commands: dict[str, str], arguments: list[str]) -> tuple[str, list[str]]:
    """Split ``arguments`` into the name of a command and its arguments; print all commands for ``--help``.

    Args:
        program: the command line up to here.
        about: one line about the program.
        commands: names and one line about each.
        arguments: the rest of the command line.

    Raises:
        InputError: no command was named, or an unknown one.
    """
    names = list(commands)
    if not arguments:
        raise InputError(f"{program} needs a command, one of {', '.join(names)} (see {program} --help)")
    name, *rest = arguments
    if name in ("-h", "--help"):
        width = max(map(len, names))
        lines = "\n".join(f"  {command:{width}}  {summary}" for command, summary in commands.items())
        print(f"usage: {program} COMMAND ... (--version prints versions)\n\n{about}\n\ncommands:\n{lines}\n")
        print(f"{program} COMMAND --help describes a command.")
        sys.exit(0)
    if name not in commands:
        hint = "; to train: python -m megatron_align.train --config run.yaml" if name == "train" else ""
        raise InputError(
            f"{program} has no command '{name[:80]}', it has {', '.join(names)}{hint or nearest(name, names)}"
        )
    return name, rest
