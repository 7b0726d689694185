"""A store is written once for the same inputs, with the same bytes for any number of processes; a kill costs no
finished part; and what is incomplete is never read.
"""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_align.data.store import MANIFEST, TokenStore
from megatron_align.data.tokenize import cache_key as spec_module
from megatron_align.data.tokenize import prepare as prepare_module
from megatron_align.data.tokenize import record_blocks as blocks_module
from megatron_align.data.tokenize import store_writer as store_writer_module
from megatron_align.data.tokenize import work_dir as work_module
from megatron_align.data.tokenize import workers as workers_module
from megatron_align.data.tokenize.local_ranks import prepare_or_wait
from megatron_align.data.tokenize.prepare import prepare
from megatron_align.data.tokenize.work_dir import WorkDir
from megatron_align.errors import InputError
from tests.harness.processes import run_code

RECORDS = [{"prompt": f"hello {i} " * (1 + i % 7), "completion": "world"} for i in range(40)]
PAIRS = [{"prompt": f"hello {i}", "chosen": "the cat", "rejected": "the mat", "margin": i} for i in range(20)]
BLOCK = 4  # records, so that little data makes many parts


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(blocks_module, "BLOCK_RECORDS", BLOCK)


def content(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def stores_in(spec):
    return [child.name for child in Path(spec.cache).iterdir() if child.name != spec_module.HASHES]


def elsewhere(spec, tmp_path, name="elsewhere", **options):
    return dataclasses.replace(spec, cache=str(tmp_path / name), **options)


@pytest.fixture
def written(monkeypatch):
    """Return the indices of the blocks that this process tokenises."""
    numbers, write = [], workers_module.BlockTokenizer.write

    def noted(self, block):
        numbers.append(block.index)
        return write(self, block)

    monkeypatch.setattr(workers_module.BlockTokenizer, "write", noted)
    return numbers


def code_of(spec, change):
    """Return code that prepares, after ``change`` was made there."""
    return (
        "import os, signal, time; from megatron_align.data.tokenize import cache_key, prepare\n"
        "from megatron_align.data.tokenize import record_blocks, workers\n"
        "if __name__ == '__main__':\n"
        f"    record_blocks.BLOCK_RECORDS = {BLOCK}\n"
        f"    {change or 'pass'}\n"
        f"    prepare.prepare(cache_key.StoreSpec(**{dataclasses.asdict(spec)!r}))\n"
    )


def killed(spec, change):
    """Prepare in another process, after ``change`` was made there; return whether it was killed."""
    process = run_code(code_of(spec, change))
    process.join(60)
    return process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("records", [RECORDS, PAIRS], ids=["chat", "pair"])
def test_bytes_and_order_do_not_depend_on_processes(make, tmp_path, records):
    spec = make(records)
    stores = [prepare(elsewhere(spec, tmp_path, str(n), processes=n)) for n in (1, 2, 3)]
    assert content(stores[0]) == content(stores[1]) == content(stores[2])
    assert len(TokenStore(stores[0], verify=True)) == len(records)


def test_the_size_of_blocks_does_not_matter(make, tmp_path, monkeypatch):
    spec = make(PAIRS)
    one = prepare(spec)
    monkeypatch.setattr(blocks_module, "BLOCK_CHARACTERS", 30)
    assert content(prepare(elsewhere(spec, tmp_path))) == content(one)


def test_a_killed_run_is_continued(make, tmp_path, written):
    spec = make(RECORDS)
    change = (
        "write = workers.BlockTokenizer.write; workers.BlockTokenizer.write = lambda self, block: "
        "write(self, block) if block.index < 6 else os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert killed(spec, change)
    assert not spec.path(spec.inputs()).exists()
    path = prepare(spec)
    assert written == [6, 7, 8, 9]
    assert stores_in(spec) == [path.name]
    assert content(path) == content(prepare(elsewhere(spec, tmp_path)))


def test_a_killed_run_of_several_processes_is_continued(make, tmp_path, written):
    spec = make(RECORDS, processes=2)
    change = "prepare._publish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)"  # at the last moment
    assert killed(spec, change)
    assert not spec.path(spec.inputs()).exists()
    path = prepare(dataclasses.replace(spec, processes=1))
    assert written == []
    assert content(path) == content(prepare(elsewhere(spec, tmp_path, processes=1)))


def test_memory_does_not_grow_with_the_data(make, jsonl):
    """The same run holding all records and samples at once grows by some 30 MB, block by block by 2."""
    record = {"prompt": "hello world " * 40, "completion": "the cat " * 400}
    large = jsonl([record] * 2200, "large.jsonl")  # 8 MB, 2 million tokens
    spec = make([record] * 100)
    say = "print([int(l.split()[1]) // 1024 for l in open('/proc/self/status') if l[:6] in ('VmRSS:', 'VmHWM:')])"
    change = (
        f"record_blocks.BLOCK_RECORDS = 50; prepare.prepare(cache_key.StoreSpec(**{dataclasses.asdict(spec)!r})); "
        f"open('/proc/self/clear_refs', 'w').write('5'); {say}; "  # the peak starts anew
        f"import atexit; atexit.register(lambda: exec({say!r}))"
    )
    code = code_of(dataclasses.replace(spec, sources=(large,)), change)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, timeout=100)
    (_, before), (peak, _) = map(json.loads, ran.stdout.splitlines())
    assert peak - before < 12


@pytest.mark.parametrize("harm", ["cut", "flip", "missing", "other"])
def test_a_harmed_part_is_made_anew(make, tmp_path, monkeypatch, written, harm):
    spec = make(RECORDS)
    with monkeypatch.context() as stopped:
        stopped.setattr(prepare_module, "join_parts", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(spec)
    (part,) = Path(spec.cache).glob(".*.tmp/parts/00000003.part")
    if harm == "cut":
        os.truncate(part, part.stat().st_size - 1)
    elif harm == "flip":
        data = bytearray(part.read_bytes())
        data[-20] ^= 1
        part.write_bytes(data)
    elif harm == "missing":
        part.unlink()
    else:
        shutil.copy(part.with_name("00000004.part"), part)
    written.clear()
    path = prepare(spec)
    assert written == [3]
    assert content(path) == content(prepare(elsewhere(spec, tmp_path)))


def _interrupt(*_):
    raise KeyboardInterrupt


def test_what_dead_processes_left_of_other_stores_is_removed(make):
    spec = make(RECORDS)
    left, living = (WorkDir(Path(spec.cache) / name) for name in ("other", "third"))
    left.leave()  # what the system does when a process dies
    path = prepare(spec)
    assert sorted(stores_in(spec)) == sorted([path.name, living.folder.name])


def test_the_work_of_the_living_is_left_alone(tmp_path, monkeypatch):
    store = tmp_path / "store"
    mine = WorkDir(store)
    other = WorkDir(store)  # the same process holds the lock: alive
    assert mine.folder != other.folder
    assert mine.folder.is_dir()
    other.remove()
    mine.leave()
    monkeypatch.setattr(work_module.socket, "gethostname", lambda: "another machine")
    third = WorkDir(store)  # its lock might not reach this machine, and it wrote a moment ago
    assert third.folder != mine.folder
    third.remove()
    monkeypatch.setattr(work_module, "STALE_SECONDS", 0.0)
    assert WorkDir(store).folder == mine.folder


def test_a_second_run_does_nothing(make, monkeypatch):
    path = prepare(make(RECORDS))
    monkeypatch.setattr(prepare_module, "_make", lambda *_: pytest.fail("tokenised again"))
    assert prepare(make(RECORDS)) == path
    assert prepare(make(RECORDS, processes=3)) == path


def test_every_input_has_its_own_store(make, tokenizer_folder, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages }}")
    other = shutil.copytree(tokenizer_folder, tmp_path / "other")
    (other / "chat_template.jinja").write_text("{{ messages }}")
    specs = [
        make(RECORDS),
        make(RECORDS, sequence_length=2048),
        make(RECORDS, too_long="drop"),
        make(RECORDS, on_bad_record="skip"),
        make(RECORDS, shape="prompt_completion"),
        make(RECORDS, chat_template=str(template)),
        make(RECORDS, tokenizer=str(other)),
        make(RECORDS, sources=make(RECORDS).sources * 2),
    ]
    paths = {prepare(spec) for spec in specs}
    paths.add(prepare(make(RECORDS[:2])))
    template.write_text("{{ messages }} ")
    paths.add(prepare(make(RECORDS, chat_template=str(template))))
    assert len(paths) == len(specs) + 2


def test_hashes_are_remembered_and_never_stale(make, monkeypatch):
    spec = make(RECORDS)
    monkeypatch.setattr(spec_module, "SETTLED_SECONDS", 0.0)
    time.sleep(0.02)
    path, hashed = prepare(spec), []
    sha256 = spec_module.sha256
    monkeypatch.setattr(spec_module, "sha256", lambda file: hashed.append(file) or sha256(file))
    assert prepare(spec) == path
    assert spec.sources[0] not in hashed
    file = Path(spec.sources[0])
    before = file.stat()
    file.write_text(file.read_text().replace("hello 7", "hello 8"))  # as long as before
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert prepare(spec) != path


def test_a_file_that_just_changed_is_hashed_again(make):
    spec = make(RECORDS)
    prepare(spec)
    assert not (Path(spec.cache) / spec_module.HASHES).exists()


def test_a_file_that_changes_meanwhile_is_refused(make, monkeypatch, jsonl):
    spec, write = make(RECORDS), workers_module.BlockTokenizer.write

    def changing(self, block):
        jsonl(RECORDS[:5])
        return write(self, block)

    monkeypatch.setattr(workers_module.BlockTokenizer, "write", changing)
    with pytest.raises(InputError, match="must stay as they are while being tokenised"):
        prepare(spec)
    assert list(Path(spec.cache).iterdir()) == []


def test_a_moved_file_keeps_its_store(make, tmp_path):
    spec = make(RECORDS)
    path = prepare(spec)
    (tmp_path / "moved").mkdir()
    moved = Path(spec.sources[0]).rename(tmp_path / "moved" / "data.jsonl")
    assert prepare(dataclasses.replace(spec, sources=(str(moved),))) == path


@pytest.mark.parametrize("processes", [1, 2])
def test_the_first_error_is_told_and_nothing_left(make, processes):
    lines = [*map(json.dumps, RECORDS), '{"prompt": "a", "completion": ""}', "{"]
    with pytest.raises(InputError, match="data.jsonl:41: "):
        prepare(make(lines, processes=processes))
    lines[9] = json.dumps({"prompt": "hello " * 300, "completion": "world"})  # found while tokenising
    spec = make(lines, processes=processes, sequence_length=200)
    with pytest.raises(InputError, match="data.jsonl:10: a sample must fit"):
        prepare(spec)
    assert list(Path(spec.cache).iterdir()) == []


def test_bad_records_are_skipped_and_counted(make):
    lines = [*map(json.dumps, RECORDS), *["{"] * 30]
    manifest = TokenStore(prepare(make(lines, on_bad_record="skip"))).manifest
    assert (manifest["samples"], manifest["skipped"]) == (len(RECORDS), 30)
    assert len(manifest["examples"]["skipped"]) == 20
    assert "data.jsonl:41: " in manifest["examples"]["skipped"][0]
    assert manifest["sources"][0]["skipped"] == 30


def test_training_tells_what_was_skipped(make, caplog):
    spec = make([*map(json.dumps, RECORDS), *["{"] * 30], on_bad_record="skip")
    prepare_or_wait(spec, 0)
    told = [line for line in caplog.messages if line.startswith("skipped: ")]
    assert len(told) == 21
    assert "data.jsonl:41: " in told[0]
    assert told[-1] == "skipped: 10 more records"


def test_a_full_disk_is_one_line_and_leaves_nothing(make, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    spec = make(RECORDS)
    for where in ("_Column.add", "_publish"):
        holder, name = (store_writer_module._Column, "add") if "." in where else (prepare_module, where)
        with monkeypatch.context() as harmed:
            harmed.setattr(holder, name, full)
            with pytest.raises(InputError, match="could not be written: No space left on device"):
                prepare(spec)
        assert list(Path(spec.cache).iterdir()) == []
    assert len(TokenStore(prepare(spec), verify=True)) == len(RECORDS)


def test_a_worker_that_is_killed_is_one_line(make, monkeypatch):
    class Killed(workers_module.ProcessPoolExecutor):
        def submit(self, *work):
            future = super().submit(*work)
            for process in list(self._processes.values()):
                process.kill()
            return future

    monkeypatch.setattr(workers_module, "ProcessPoolExecutor", Killed)
    with pytest.raises(InputError, match="data.jsonl: a tokenising process was killed"):
        prepare(make(RECORDS, processes=2))


def test_processes_forked_after_tokenising_receive_ctrl_c(make, tmp_path):
    """The fork server starts under a mask and stays for whatever else the program forks."""
    spec, said = make(RECORDS, processes=2), tmp_path / "said"
    process = run_code(
        "import multiprocessing, os, signal, sys\n"
        f"os.dup2(os.open({str(said)!r}, os.O_WRONLY | os.O_CREAT), 2)\n"
        "from megatron_align.data.tokenize import cache_key, prepare\n"
        f"prepare.prepare(cache_key.StoreSpec(**{dataclasses.asdict(spec)!r}))\n"
        "child = multiprocessing.get_context('forkserver').Process(target=signal.raise_signal, args=(signal.SIGINT,))\n"
        "child.start(); child.join(); sys.exit(10 + child.exitcode)\n"
    )
    process.join(120)
    assert process.exitcode == 11, said.read_text()  # 10: the signal waits behind the mask
    assert "KeyboardInterrupt" in said.read_text()


def test_two_nodes_may_prepare_at_once(make, monkeypatch):
    spec, publish = make(RECORDS), prepare_module._publish

    def late(unfinished, path):
        monkeypatch.setattr(prepare_module, "_publish", publish)
        prepare(spec)  # somebody else is done first
        publish(unfinished, path)

    monkeypatch.setattr(prepare_module, "_publish", late)
    path = prepare(spec)
    assert len(TokenStore(path, verify=True)) == len(RECORDS)
    assert list(path.parent.iterdir()) == [path]
    assert (path / MANIFEST).is_file()


def test_kinds_do_not_mix(make, jsonl):
    spec = make(RECORDS)
    with pytest.raises(
        InputError, match=r"pairs.jsonl: must hold chat data like .*data.jsonl, got pair data"
    ):
        prepare(dataclasses.replace(spec, sources=(*spec.sources, jsonl(PAIRS, "pairs.jsonl"))))


def test_comparisons_are_not_truncated(make):
    with pytest.raises(InputError, match="truncate is for chat data, got pair data"):
        prepare(make(PAIRS, too_long="truncate"))


def test_nothing_left_is_refused(make):
    with pytest.raises(
        InputError, match="data.jsonl: must leave a sample within .* = 2 tokens, got none: all 40"
    ):
        prepare(make(RECORDS, sequence_length=2, too_long="drop"))


def test_missing_inputs_are_named(make, tmp_path):
    spec = make(RECORDS)
    with pytest.raises(InputError, match="no.jsonl: must be "):
        prepare(dataclasses.replace(spec, sources=(str(tmp_path / "no.jsonl"),)))
    with pytest.raises(InputError, match="no: must be a Hugging Face folder"):
        prepare(dataclasses.replace(spec, tokenizer=str(tmp_path / "no")))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file: tokenised data could not be written"):
        prepare(dataclasses.replace(spec, cache=str(tmp_path / "file")))
