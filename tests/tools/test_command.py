"""Whole numbers of a command line are read as those of a configuration; options of another program are a value."""

import pytest

from megatron_align.errors import InputError
from megatron_align.tools.command import Parser, positive_count


@pytest.fixture
def parser():
    parser = Parser("program", "about")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--count", type=positive_count)
    return parser


@pytest.mark.parametrize(
    "text, number", [("7", 7), ("1e3", 1000), ("3.0", 3), ("-2", -2), ("9" * 30, int("9" * 30))]
)
def test_whole_numbers(parser, text, number):
    assert parser.parse([f"--seed={text}"]).seed == number
    if number > 0:
        assert parser.parse([f"--count={text}"]).count == number


@pytest.mark.parametrize("text", ["1.5", "many", "inf", "nan", "", "9" * 5000])
def test_other_numbers_are_one_line(parser, text):
    for option in ("--seed", "--count"):
        with pytest.raises(InputError, match=f"{option}: must be a whole number, got '.{{0,80}}'"):
            parser.parse([f"{option}={text}"])


def test_a_count_is_positive(parser):
    for text in ("0", "-1"):
        with pytest.raises(InputError, match=f"--count: must be a positive whole number, got {text}"):
            parser.parse([f"--count={text}"])


def test_options_of_another_program_are_a_value():
    """As `docs/evaluation.md` writes them; a value that begins with dashes used to be taken for an option."""
    parser = Parser("program", "about")
    parser.add_argument("--vllm-options", metavar="OPTIONS")
    parser.add_argument("--seed", type=int)
    for value in ("--tensor-parallel-size 2", "--enforce-eager"):
        for given in (["--vllm-options", value], [f"--vllm-options={value}"]):
            options = parser.parse([*given, "--seed", "3"])
            assert (options.vllm_options, options.seed) == (value, 3)
    with pytest.raises(InputError, match="no option --enforce-eager"):
        parser.parse(["--seed", "--enforce-eager"])
