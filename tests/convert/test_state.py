"""A state folder written by hand is what megatron-core would have written, and one that megatron-core wrote on any
layout is read by hand; a forged or damaged one runs nothing and is refused in one line.
"""

import pickle
import shutil
from itertools import repeat

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megatron_align.checkpoint import folder as sharded
from megatron_align.checkpoint.metadata import read_metadata
from megatron_align.checkpoint.saver import Saver
from megatron_align.convert import convert
from megatron_align.convert.convert import import_hf
from megatron_align.convert.state_reader import StateReader
from megatron_align.convert.state_writer import StateWriter
from megatron_align.errors import InputError
from megatron_align.model.families import read_shape
from megatron_align.storage.journal import Journal
from tests.harness.damage import sign

VARIANTS = ["qwen2_tied", "qwen2_untied", "llama3", "qwen3"]


def save_by_megatron_core(rank_info, hf, folder):
    """In a process of the pool."""
    with convert.one_process() as groups:
        shape = read_shape(hf)
        chunks = convert.empty_model(shape, torch.float32, groups)
        from megatron_align.hf.load import load_weights

        load_weights(hf, shape, chunks[0].global_parameters(), 0, 1)
        Saver().save(folder, chunks, None, sharded.make_card(0, shape, torch.float32), hf)


def summary(metadata):
    """What loading asks for: of tensors size, dtype and what the chunks cover; of other entries the name."""
    found = {}
    for key, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata):
            found[key] = None
        else:
            covered = sum(chunk.sizes.numel() for chunk in entry.chunks)
            found[key] = (entry.size, entry.properties, covered)
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_what_megatron_core_writes(tmp_path, pool, tiny_models, monkeypatch, variant):
    monkeypatch.setattr(convert, "CHUNK_BYTES", 10_000)  # several chunks a tensor
    hf = tiny_models(variant)
    pool.run(1, save_by_megatron_core, hf, tmp_path / "theirs")
    import_hf(hf, tmp_path / "ours", file_bytes=100_000)
    assert len(list((tmp_path / "ours" / "state").glob("*.distcp"))) > 3
    ours, theirs = (read_metadata(tmp_path / side / "state") for side in ("ours", "theirs"))
    assert summary(ours) == summary(theirs)
    readers = [StateReader(tmp_path / side / "state", read_shape(hf)) for side in ("ours", "theirs")]
    for row in convert.rows(read_shape(hf)):
        mine, other = (reader.read(row) for reader in readers)
        assert all(torch.equal(mine[name], other[name]) for name in row.hf), row.megatron
        for reader in readers:  # and stretch by stretch
            joined = joined_stretches(reader, row)
            assert all(torch.equal(mine[name].view(-1), joined[name]) for name in row.hf), row.megatron
    assert {reader.streams(row) for row in convert.rows(read_shape(hf))} == {True, False}


def joined_stretches(reader, row):
    """Read a row through one buffer that is smaller than its tensor, where it streams; sources lie in their files."""
    buffer = torch.empty(1_040 if reader.streams(row) else reader.group_bytes(row), dtype=torch.uint8)
    whole = {name: [] for name in row.hf}
    for name, start, part, sources in reader.stretches(row, repeat(buffer)):
        for path, place, numbers in sources:
            size = numbers.nbytes
            assert (
                path.read_bytes()[place : place + size]
                == numbers.reshape(-1).view(torch.uint8).numpy().tobytes()
            )
        assert start == sum(map(len, whole[name]))
        whole[name].append(part.clone())
    return {name: torch.cat(parts) for name, parts in whole.items()}


class Killed(BaseException):
    pass


def test_an_import_that_was_killed_goes_on_where_it_stopped(tmp_path, tiny_models, monkeypatch):
    monkeypatch.setattr(convert, "CHUNK_BYTES", 10_000)
    hf = tiny_models("llama3")
    import_hf(hf, tmp_path / "whole", file_bytes=100_000)
    written = []
    write = StateWriter.write

    def note(self, row, start, chunk, notes=None):
        written.append((row.megatron, start))
        write(self, row, start, chunk, notes)
        if len(written) == 150:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(StateWriter, "write", note)
        patch.setattr(Journal, "leave", lambda self, kind: self._unlock())  # as the end of a process does
        with pytest.raises(Killed):
            import_hf(hf, tmp_path / "out", file_bytes=100_000)
        assert [path.name for path in tmp_path.iterdir() if path.name != "whole"] == [".out.partial"]
        import_hf(hf, tmp_path / "out", file_bytes=100_000)
    assert len(set(written)) <= len(written) < len(set(written)) + 80  # full files are not written twice
    whole, out = (read_metadata(tmp_path / name / "state") for name in ("whole", "out"))
    assert (whole.state_dict_metadata, whole.storage_data) == (out.state_dict_metadata, out.storage_data)
    for path in (tmp_path / "whole" / "state").glob("[!.]*"):
        assert (tmp_path / "out" / "state" / path.name).read_bytes() == path.read_bytes(), path.name
    assert not (tmp_path / ".out.partial").exists()


@pytest.fixture
def checkpoint(tmp_path, tiny_models):
    import_hf(tiny_models("llama3"), tmp_path / "ckpt")
    return tmp_path / "ckpt"


def edit(checkpoint, change):
    path = checkpoint / "state" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))
    sign(checkpoint)


NORM = "decoder.final_layernorm.weight"


def lose_tensors(metadata):
    entries = metadata.state_dict_metadata
    entries["decoder.surplus.weight"] = entries.pop(NORM)
    places = metadata.storage_data
    index = next(index for index in places if index.fqn == NORM)
    places[type(index)("decoder.surplus.weight", index.offset)] = places.pop(index)


def lead_out(metadata):
    for index, info in metadata.storage_data.items():
        metadata.storage_data[index] = _StorageInfo("../" + info.relative_path, info.offset, info.length)


def lose_chunk(metadata):
    metadata.state_dict_metadata["output_layer.weight"].chunks.clear()


def wrong_size(metadata):
    metadata.state_dict_metadata[NORM].size = torch.Size([65])


def swap_places(metadata):
    places = metadata.storage_data
    norm = next(index for index in places if index.fqn == NORM)
    head = next(index for index in places if index.fqn == "output_layer.weight")
    places[norm] = places[head]


EDITS = {
    "names": (lose_tensors, f"missing {NORM}; unexpected decoder.surplus.weight in "),
    "path": (lead_out, "must lie in a file of "),
    "chunk": (lose_chunk, "output_layer.weight must be [384, 64], its chunks are not in "),
    "size": (wrong_size, f"{NORM} must be [64], found [65] in "),
    "another tensor": (swap_places, f"{NORM} is not what .metadata says in "),
}


@pytest.mark.parametrize("change, line", EDITS.values(), ids=EDITS)
def test_metadata_that_does_not_fit_is_refused(tmp_path, checkpoint, change, line):
    edit(checkpoint, change)
    with pytest.raises(InputError) as error:
        convert.export_hf(checkpoint, tmp_path / "out")
    assert line in str(error.value)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


def test_a_file_cut_short_is_seen_before_anything_is_written(tmp_path, checkpoint):
    path = checkpoint / "state" / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:200_000])
    with pytest.raises(InputError, match="was cut short at 200,000 of "):
        convert.export_hf(checkpoint, tmp_path / "out")


class Evil:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return shutil.rmtree, (str(self.folder),)


def test_a_forged_pickle_runs_nothing(tmp_path, checkpoint):
    (victim := tmp_path / "victim").mkdir()
    (checkpoint / "state" / ".metadata").write_bytes(pickle.dumps(Evil(victim)))
    with pytest.raises(InputError, match="it names shutil.rmtree, which is no part of torch's metadata"):
        convert.export_hf(checkpoint, tmp_path / "out")
    assert victim.is_dir()


def test_a_forged_chunk_runs_nothing(tmp_path, checkpoint):
    (victim := tmp_path / "victim").mkdir()
    path = checkpoint / "state" / "__0_0.distcp"
    forged = tmp_path / "forged"
    torch.save(Evil(victim), forged)
    path.write_bytes(forged.read_bytes() + path.read_bytes()[forged.stat().st_size :])
    sign(checkpoint)
    with pytest.raises(InputError, match="a complete checkpoint is needed, .* cannot be read in "):
        convert.export_hf(checkpoint, tmp_path / "out")
    assert victim.is_dir()
