"""GPU benchmarks: what can be wrong in them without a GPU is not; without one they say so in one line."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_attention import CASES, Case, flash, inputs, useful_pairs
from benchmarks.tune_attention import FILE, render
from megatron_align.kernels import PackedLayout, packed_attention
from megatron_align.kernels.packed_attention.tuned_tiles import TABLE
from tests.harness.fake_packages import installed

ROOT = Path(__file__).parents[2]
SCRIPTS = [*sorted(path.stem for path in (ROOT / "benchmarks").glob("gpu_*.py")), "tune_attention"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="they would run")
@pytest.mark.parametrize("script", SCRIPTS)
def test_without_a_gpu_one_line_says_so(script, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script])
    monkeypatch.delitem(sys.modules, f"benchmarks.{script}", raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"benchmarks.{script}", run_name="__main__")
    done = capsys.readouterr()
    assert ended.value.code == 2
    assert done.err.startswith(f"{script}: needs a CUDA GPU; torch ")
    assert done.err.count("\n") == 1
    assert not done.out


def test_useful_pairs_are_those_of_the_mask():
    layout = PackedLayout.from_groups([(7, [5, 0, 12]), (0, [9]), (4, [])], total=50)
    assert useful_pairs(layout) == layout.mask_QT().sum()
    assert {case.layout.tokens for case in CASES.values()} == {16384, 15360}


def test_flash_attn_is_a_contestant_where_it_is_installed_and_prompts_are_not_shared(capsys):
    case = Case(layout=PackedLayout.from_lengths([5, 9], total=16), heads=4, groups=2, head_dim=16)
    tensors = inputs(case)
    with installed("flash2"):
        out = flash(case)(*tensors)
        assert flash(Case(layout=PackedLayout.from_groups([(4, [3, 2])]))) is None
    want = packed_attention(*tensors, case.layout.to(tensors[0].device))
    torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2)
    with installed():
        assert flash(case) is None
    assert "flash-attn is left out: model.attention: flash needs flash-attn" in capsys.readouterr().out


def test_the_table_is_what_the_tuning_script_writes():
    source = FILE.read_text(encoding="utf-8")
    note = source.split("tune_attention.py. ")[1].split("\n")[0]
    assert render(TABLE, note) == source
