"""A conversion or merge that is killed (SIGKILL, between its files) leaves no output folder; the same command then
resumes, writes no complete file again, and gives the same bytes.
"""

import os
import signal
import subprocess
import sys

import pytest

from megatron_align.convert.export_hf import export_hf
from megatron_align.convert.import_hf import import_hf
from megatron_align.merge.merge import merge
from megatron_align.merge.methods import ModelStock
from megatron_align.storage.journal import JOURNAL

COMMANDS = {
    "import": lambda model, checkpoint, out: import_hf(model, out, file_bytes=100_000),
    "export": lambda model, checkpoint, out: export_hf(checkpoint, out, shard_bytes=60_000),
    "merge": lambda model, checkpoint, out: merge(
        ModelStock(), model, [model, model], out, shard_bytes=60_000
    ),
}
# One process pays for the imports; each command runs in a fork of it, which kills itself as it records its third file.
KILLED = """
import os, signal, sys
from megatron_align.storage.journal import Journal
from tests.convert.test_kill import COMMANDS

def note(self, file, notes=None, add=Journal.add):
    add(self, file, notes)
    if len(self.done) == 3:
        os.kill(os.getpid(), signal.SIGKILL)

Journal.add = note
model, checkpoint, folder = sys.argv[1:]
for name, command in COMMANDS.items():
    if os.fork() == 0:
        command(model, checkpoint, f"{folder}/{name}")
        os._exit(0)
    print(name, os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


@pytest.fixture(scope="module")
def killed(tiny_models, tmp_path_factory):
    """Where each command was killed, and the model and checkpoint that it worked on."""
    folder = tmp_path_factory.mktemp("killed")
    model, checkpoint = tiny_models("llama3"), folder / "checkpoint"
    import_hf(model, checkpoint)
    words = [sys.executable, "-c", KILLED, model, checkpoint, folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, words)), env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split("\n")[:-1] == [f"{name} {-signal.SIGKILL}" for name in COMMANDS], done.stderr
    return folder, model, checkpoint


def files_in(folder):
    return {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", COMMANDS)
def test_resumes_where_it_was_killed(name, killed, tmp_path):
    folder, model, checkpoint = killed
    partial, out = folder / f".{name}.partial", folder / name
    assert not out.exists()
    noted = (partial / JOURNAL).read_text().splitlines()[1:]
    before = {path.stat().st_ino: path.stat().st_mtime_ns for path in files_in(partial).values()}
    COMMANDS[name](model, checkpoint, out)
    assert not partial.exists()
    kept = [p for p in files_in(out).values() if before.get(p.stat().st_ino) == p.stat().st_mtime_ns]
    assert len(kept) >= len(noted) == 3  # as they were, not written again

    COMMANDS[name](model, checkpoint, tmp_path / "complete")
    complete = files_in(tmp_path / "complete")
    assert files_in(out).keys() == complete.keys()
    for file, path in complete.items():
        assert (out / file).read_bytes() == path.read_bytes(), file
