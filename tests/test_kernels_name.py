"""The folder ``kernels/`` never stands in for Hugging Face's package of that name."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def python(code, path):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_real_package_wins_from_the_repository_root(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("hub = 'the real one'\n")
    assert python("import kernels; print(kernels.hub)", str(tmp_path)) == "the real one"


def test_without_one_the_name_is_empty_and_light():
    code = "import kernels, sys; print(hasattr(kernels, 'packed_attention'), 'torch' in sys.modules)"
    assert python(code, "") == "False False"


def test_ours_is_found_under_its_own_name():
    code = "from megatron_align.kernels import packed_attention; print(packed_attention.__module__)"
    assert python(code, "") == "megatron_align.kernels.packed_attention.public"
