"""A merge never writes numbers that are not finite: options that cannot be computed with are refused, and results that
overflow, with the tensors' names and counts; nothing is left.
"""

import shutil

import pytest
import torch

from megatron_align.errors import InputError
from megatron_align.merge.merge import merge
from megatron_align.merge.methods import Dare, Linear, TaskArithmetic, Ties
from megatron_align.tools.main import main
from tests.harness.tiny import change_tensors, make_model

NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """Two models in fp16; one number of the second is near the largest of fp16."""
    folder = tmp_path_factory.mktemp("halves")
    one = make_model(folder / "one", dtype=torch.float16)
    two = shutil.copytree(one, folder / "two")

    def change(tensors):
        tensors[NORM][3] = 60000
        tensors["model.layers.0.input_layernorm.weight"] += 0.5

    change_tensors(two, change)
    return one, two


def refusal(capsys, out, *words):
    assert main(["merge", *map(str, words), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert not out.exists()
    assert list(out.parent.iterdir()) == []
    return said


def test_fp16_results(halves, tmp_path, capsys):
    one, two = halves
    said = refusal(capsys, tmp_path / "out", "linear", "--models", two, one, "--weights", 2, -1)
    assert (
        f"the merged weights are not finite in float16: {NORM} holds 1 infinite; choose other weights" in said
    )
    merge(Linear(weights=(2.0, -1.0)), None, [two, one], tmp_path / "wide", dtype="float32")


def test_fp32_results(halves, tmp_path, capsys):
    one, two = halves
    words = ("--base", one, "--models", two, "--dtype", "float32")
    for method in ("task_arithmetic", "ties"):
        said = refusal(capsys, tmp_path / "out", method, *words, "--scale", "3e38")
        assert f"{NORM} holds 1 infinite" in said
    merge(TaskArithmetic(scale=1e30), one, [two], tmp_path / "large", dtype="float32")


OPTIONS = {
    "scale": (["--scale", "1e39"], "--scale must be at most 3.4e+38 in magnitude"),
    "negative": (["--scale=-1e39"], "--scale must be at most 3.4e+38 in magnitude"),
    "weight": (["--weights", "1e300"], "--weights must be at most 3.4e+38 in magnitude"),
    "infinite": (["--scale", "inf"], "--scale must be a finite number"),
    "NaN": (["--weights", "nan"], "--weights must be finite numbers"),
}


@pytest.mark.parametrize("options, line", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare"])
def test_options_that_fp32_cannot_hold(halves, tmp_path, capsys, method, options, line):
    one, two = halves
    said = refusal(capsys, tmp_path / "out", method, "--base", one, "--models", two, *options)
    assert line in said


def test_sums_and_quotients_that_fp32_cannot_hold(halves, tmp_path):
    one, two = halves
    for method, line in (
        (Linear(weights=(3e38, 3e38)), "--weights must be at most 3.4e\\+38 in magnitude, in all"),
        (Ties(weights=(3e38, 3e38)), "--weights must be at most"),
        (Dare(scale=3e38, density=0.1), "--scale divided by --density must be at most"),
    ):
        with pytest.raises(InputError, match=line):
            merge(method, one, [two, two], tmp_path / "out")
