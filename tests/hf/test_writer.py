"""An exported folder is complete or absent: nothing half-written can be seen, and what it replaces stays until the
new one is complete.
"""

import stat

import pytest
import torch
from safetensors.torch import load_file

from megatron_align.errors import InputError
from megatron_align.hf import writer as writer_module
from megatron_align.hf.safetensors import HFWeights
from megatron_align.hf.writer import ShardWriter, TensorSpec
from megatron_align.storage import direct_io


def names_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


FOUR = TensorSpec(torch.float32, (4,))


def specs(names="w"):
    return dict.fromkeys(names, FOUR)


def write(folder, value=1.0, **options):
    with ShardWriter(folder, specs(), **options) as writer:
        writer.write("w", torch.full((4,), value))


def test_the_folder_appears_only_when_it_is_complete(tmp_path):
    out = tmp_path / "deep" / "out"
    writer = ShardWriter(out, specs("abc"), max_bytes=16)
    for name in "bac":  # any order
        writer.write(name, torch.ones(4))
        assert not out.exists()
    (writer.partial / "config.json").write_text("{}")
    writer.close()
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert names_in(out) == ["config.json", *shards, "model.safetensors.index.json"]
    assert names_in(tmp_path / "deep") == ["out", *(f"out/{name}" for name in names_in(out))]


def out_of_luck(*args):
    raise RuntimeError("out of luck")


@pytest.mark.parametrize("step", ["write_flat", "finish", "_write_index", "commit_folder"])
def test_a_failure_leaves_no_trace(tmp_path, monkeypatch, step):
    monkeypatch.setattr(writer_module if step == "commit_folder" else ShardWriter, step, out_of_luck)
    with pytest.raises(RuntimeError, match="out of luck"):
        write(tmp_path / "out")
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("step", ["_write_index", "commit_folder"])
def test_the_old_folder_stays_until_the_new_one_is_complete(tmp_path, monkeypatch, step):
    out = tmp_path / "out"
    write(out, 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(writer_module if step == "commit_folder" else ShardWriter, step, out_of_luck)
        with pytest.raises(RuntimeError):
            write(out, 2.0, overwrite=True)
    assert load_file(out / "model.safetensors")["w"][0] == 1
    (out / "stale.txt").write_text("")
    write(out, 2.0, overwrite=True)
    assert load_file(out / "model.safetensors")["w"][0] == 2
    assert names_in(tmp_path) == ["out", "out/model.safetensors"]


def test_killed_between_the_two_renames_the_old_folder_survives_aside(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write(out, 1.0)
    rename = writer_module.Path.rename

    def die_at_the_second(self, target):
        if self.name == ".out.partial":
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(writer_module.Path, "rename", die_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            write(out, 2.0, overwrite=True)
    aside = tmp_path / ".out.replaced"
    assert load_file(aside / "model.safetensors")["w"][0] == 1
    writer = ShardWriter(out, specs())
    assert aside.exists()
    writer.write("w", torch.full((4,), 3.0))
    writer.close()
    assert names_in(tmp_path) == ["out", "out/model.safetensors"]


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    ShardWriter(tmp_path / "out", specs("xy"), max_bytes=1).write("x", torch.ones(4))  # never closed
    write(tmp_path / "out")
    assert names_in(tmp_path) == ["out", "out/model.safetensors"]


def test_what_is_in_the_way_is_not_overwritten(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    write(out)  # an empty folder loses nothing
    with pytest.raises(InputError) as error:
        ShardWriter(out, specs())
    assert str(error.value) == f"cannot export the model: {out} is not empty"
    with pytest.raises(InputError) as error:
        ShardWriter(out / "model.safetensors", specs(), overwrite=True)
    line = f"cannot export the model: {out / 'model.safetensors'} is a file"
    assert str(error.value) == line


def test_a_folder_that_others_filled_meanwhile_is_not_overwritten(tmp_path):
    writer = ShardWriter(tmp_path / "out", specs())
    writer.write("w", torch.ones(4))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("")
    with pytest.raises(InputError, match="cannot export the model: .*out is not empty"):
        writer.close()
    assert names_in(tmp_path / "out") == ["precious"]


def test_a_link_to_an_older_model_is_replaced_and_the_model_stays(tmp_path):
    archive, link = tmp_path / "archive", tmp_path / "out"
    archive.mkdir()
    link.symlink_to(archive)
    with ShardWriter(link, specs(), overwrite=True) as writer:  # an empty place is written to
        writer.write("w", torch.ones(4))
    assert link.is_symlink()
    assert load_file(archive / "model.safetensors")["w"].tolist() == [1, 1, 1, 1]
    with ShardWriter(link, specs(), overwrite=True) as writer:
        writer.write("w", torch.zeros(4))
    assert not link.is_symlink()
    assert load_file(link / "model.safetensors")["w"].tolist() == [0, 0, 0, 0]
    assert load_file(archive / "model.safetensors")["w"].tolist() == [1, 1, 1, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archive", "out"]


def test_files_are_as_readable_as_their_folder(tmp_path):
    write(tmp_path / "out")
    folder, file = (p.stat().st_mode for p in (tmp_path / "out", tmp_path / "out" / "model.safetensors"))
    assert stat.S_IMODE(file) == stat.S_IMODE(folder) & 0o666


def test_blocks_in_any_order_strided_tensors_and_mixed_dtypes(tmp_path):
    """Wide elements lie first in a file, so that all are aligned; transformers reads the same as we do."""
    declared = {
        "odd": TensorSpec(torch.bfloat16, (3,)),
        "a": TensorSpec(torch.float32, (3, 2)),
        "b": TensorSpec(torch.float64, (5,)),
    }
    matrix, numbers = torch.randn(2, 3), torch.randn(5, dtype=torch.float64)
    with ShardWriter(tmp_path / "out", declared) as writer:
        writer.write_flat("b", 2, numbers[2:])
        writer.write("a", matrix.T)
        writer.write("odd", torch.arange(3).bfloat16())
        writer.write_flat("b", 0, numbers[:2])
        writer.finish("b")
    got = load_file(tmp_path / "out" / "model.safetensors")
    want = {"a": matrix.T, "b": numbers, "odd": torch.arange(3).bfloat16()}
    assert all(torch.equal(got[name], want[name]) for name in declared)
    ours = HFWeights(tmp_path / "out")
    assert all(torch.equal(next(ours.blocks(name)), want[name].reshape(-1)) for name in declared)


MISUSED = {
    "twice": (lambda w: [w.write("w", torch.ones(4)), w.write("w", torch.ones(4))], "written once"),
    "dtype": (lambda w: w.write("w", torch.ones(4).bfloat16()), "got 4 of torch.bfloat16"),
    "shape": (lambda w: w.write("w", torch.ones(2, 2)), r"w must be \[4\], is \[2, 2\]"),
    "half": (lambda w: [w.write_flat("w", 0, torch.ones(2)), w.finish("w")], "16 bytes, 8 were written"),
    "never": (lambda w: w.close(), "declared and not written: w"),
}


@pytest.mark.parametrize("misuse, line", MISUSED.values(), ids=MISUSED)
def test_what_is_written_must_be_what_was_declared(tmp_path, misuse, line):
    with pytest.raises(ValueError, match=line):
        misuse(ShardWriter(tmp_path / "out", specs()))


def killed_after(tmp_path, names, key):
    writer = ShardWriter(tmp_path / "out", specs("abc"), max_bytes=16, key=key)
    for name in names:
        writer.write(name, torch.ones(4), notes=f"notes of {name}")


def test_a_restart_resumes_after_the_last_complete_shard(tmp_path):
    killed_after(tmp_path, "ab", {"of": "x"})
    with ShardWriter(tmp_path / "out", specs("abc"), max_bytes=16, key={"of": "x"}) as writer:
        assert [writer.has(name) for name in "abc"] == [True, True, False]
        assert writer.notes("b") == "notes of b"
        writer.write("c", torch.full((4,), 2.0))
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [load_file(file)[name][0].item() for name, file in zip("abc", files, strict=True)] == [1, 1, 2]
    assert not (tmp_path / "out" / "journal.jsonl").exists()


def test_an_incomplete_line_of_the_journal_is_ignored(tmp_path):
    killed_after(tmp_path, "ab", {"of": "x"})
    journal = tmp_path / ".out.partial" / "journal.jsonl"
    journal.write_text(journal.read_text()[:-5])
    writer = ShardWriter(tmp_path / "out", specs("abc"), max_bytes=16, key={"of": "x"})
    assert [writer.has(name) for name in "abc"] == [True, False, False]


def test_an_incomplete_line_is_gone_when_the_next_is_written(tmp_path):
    killed_after(tmp_path, "ab", {"of": "x"})
    journal = tmp_path / ".out.partial" / "journal.jsonl"
    journal.write_text(journal.read_text()[:-5])
    killed_after(tmp_path, "b", {"of": "x"})
    writer = ShardWriter(tmp_path / "out", specs("abc"), max_bytes=16, key={"of": "x"})
    assert [writer.has(name) for name in "abc"] == [True, True, False]


def test_two_processes_do_not_write_one_folder(tmp_path):
    first = ShardWriter(tmp_path / "out", specs(), key={"of": "x"})
    first.write("w", torch.ones(4))
    for key in ({"of": "x"}, {"of": "y"}):
        with pytest.raises(InputError, match=f"another process is already writing {tmp_path / 'out'}"):
            ShardWriter(tmp_path / "out", specs(), key=key)
    first.close()
    assert load_file(tmp_path / "out" / "model.safetensors")["w"].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("key", [None, {"of": "y"}], ids=["no key", "another key"])
def test_what_was_left_of_something_else_is_not_taken_over(tmp_path, key):
    killed_after(tmp_path, "ab", {"of": "x"})
    writer = ShardWriter(tmp_path / "out", specs("abc"), max_bytes=16, key=key)
    assert not any(writer.has(name) for name in "abc")
    assert not list(writer.partial.glob("*.safetensors"))


@pytest.mark.parametrize("fault, kept", [(KeyboardInterrupt, True), (RuntimeError, False)])
def test_an_interrupt_keeps_what_a_restart_can_use(tmp_path, fault, kept):
    with pytest.raises(fault), ShardWriter(tmp_path / "out", specs(), key={"of": "x"}):
        raise fault
    assert names_in(tmp_path) == ([".out.partial", ".out.partial/journal.jsonl"] if kept else [])


@pytest.mark.parametrize("tensors", ["w", "vw"])  # the last write fails, or an earlier one
def test_a_write_that_fails_in_the_background_is_reported(tmp_path, monkeypatch, tensors):
    def full(*arguments):
        raise OSError(28, "No space left")

    monkeypatch.setattr(direct_io, "BUFFER_BYTES", 16)
    monkeypatch.setattr(direct_io.DirectFile, "_write_buffer", full)

    def write_all():
        with ShardWriter(tmp_path / "out", specs(tensors)) as writer:
            for name in tensors:
                writer.write(name, torch.ones(4))

    with pytest.raises(OSError, match=r"writing the model failed .*\.out\.partial.*No space left"):
        write_all()
    assert names_in(tmp_path) == []
