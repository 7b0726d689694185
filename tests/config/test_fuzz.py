"""Whatever a configuration or a command line holds, it is read or refused in one line: nothing else is ever raised."""

from contextlib import suppress

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_align.config.run import SECTIONS
from megatron_align.config.values import option_types
from megatron_align.config.yaml_text import parse_yaml
from megatron_align.errors import InputError
from megatron_align.objectives.configuration import load_config, parse
from megatron_align.objectives.registry import OBJECTIVES

OPTIONS = {**SECTIONS, "objective": OBJECTIVES["dpo"].Options}
KEYS = [f"{section}.{option}" for section, kind in OPTIONS.items() for option in option_types(kind)]
RUN = {"model": {"path": "m"}, "data": {"train": "d"}, "train": {"steps": 3}, "checkpoint": {"dir": "c"}}
TEXTS = st.text(max_size=12) | st.sampled_from(
    [
        "null",
        "~",
        "true",
        "1e6",
        "3.0",
        "-1",
        "1e400",
        "[1, 2]",
        "{a: 1}",
        "[",
        "*x",
        "&x",
        "!!int",
        "a: b: c",
        "\0",
    ]
    + [
        *OBJECTIVES,
        "bf16",
        "live",
        "cosine",
        "sigmoid",
        "ppo",
        "x.py:Y",
        "9" * 5000,
        "[" * 2000,
        "a\nb",
        "<<",
    ]
)
SCALARS = (
    TEXTS | st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from([0, 1, 2, 16, 10**400])
)
NAMES = (
    st.sampled_from([*OPTIONS, *KEYS, *(key.partition(".")[2] for key in KEYS), "lr", "output_dir"]) | TEXTS
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)
SETTINGS = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)


def read_or_refused(read):
    try:
        read()
    except InputError as error:
        line = str(error)
        assert "\n" not in line
        assert 0 < len(line) < 2500, line
        assert "Traceback" not in line


@SETTINGS
@given(st.dictionaries(NAMES, VALUES, max_size=4), st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4))
def test_mappings(content, overrides):
    read_or_refused(lambda: load_config({**RUN, **content}, overrides))


@SETTINGS
@given(st.sampled_from(KEYS), VALUES)
def test_one_option(key, value):
    run = {**RUN, "objective": {"name": "dpo"}}
    read_or_refused(lambda: load_config(run, {key: value}))


@SETTINGS
@given(st.dictionaries(NAMES, VALUES, max_size=4), st.data())
def test_texts(content, data):
    """A YAML text with a piece of it cut out or repeated."""
    with suppress(ValueError, yaml.YAMLError):  # what YAML cannot hold: numbers of 5,000 digits
        text = yaml.safe_dump({**RUN, **content}, allow_unicode=True)
        begin, end = sorted(data.draw(st.tuples(*[st.integers(0, len(text))] * 2)))
        text = (
            text[:begin]
            + data.draw(st.sampled_from(["", text[begin:end] * 2, "[" * 40, "\t", "&a *a"]))
            + text[end:]
        )
        read_or_refused(lambda: parse_yaml(text, "run.yaml"))


@SETTINGS
@given(
    st.lists(
        TEXTS | NAMES.map("--{}".format) | st.tuples(NAMES, TEXTS).map("--{0[0]}={0[1]}".format), max_size=6
    )
)
def test_command_lines(arguments):
    printing = ("--help", "-h", "--print_config", "--version")
    arguments = [argument for argument in arguments if argument.partition("=")[0] not in printing]
    read_or_refused(lambda: parse(["--model.path=m", "--data.train=d", *arguments]))
