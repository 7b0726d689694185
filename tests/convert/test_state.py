"""A state folder written without megatron-core is what megatron-core would have written, and one that megatron-core
wrote on any layout is read without it; a forged or corrupt one runs nothing and is refused in one line.
"""

import pickle
import shutil
from itertools import repeat

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megatron_align.checkpoint.card import make_checkpoint_metadata
from megatron_align.checkpoint.saver import CheckpointContent, Saver
from megatron_align.checkpoint.torch_metadata import read_torch_metadata
from megatron_align.convert.export_hf import export_hf
from megatron_align.convert.import_hf import import_hf
from megatron_align.convert.our_model import empty_model, one_process
from megatron_align.convert.state_reader import StateReader
from megatron_align.convert.state_writer import StateWriter
from megatron_align.errors import InputError
from megatron_align.model.families import read_shape, rows
from megatron_align.model.families.adapter import Adapter, all_adapter_rows
from megatron_align.storage.journal import Journal
from tests.harness.corruption import rewrite_checksums
from tests.harness.marks import mark_slow

VARIANTS = ["qwen2_tied", "qwen2_untied", "llama3", "qwen3"]


def save_by_megatron_core(rank_info, hf, folder):
    """In a process of the pool."""
    with one_process() as groups:
        shape = read_shape(hf)
        chunks = empty_model(shape, torch.float32, groups)
        from megatron_align.hf.load import load_weights

        load_weights(hf, shape, chunks[0].global_parameters(), 0, 1)
        metadata = make_checkpoint_metadata(0, shape, torch.float32)
        Saver().save(folder, CheckpointContent(model=chunks, optimizer=None, metadata=metadata, assets=hf))


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


@pytest.mark.parametrize("variant", mark_slow(VARIANTS, ["qwen2_untied", "llama3"]))
def test_it_is_what_megatron_core_writes(tmp_path, pool, tiny_models, variant):
    hf = tiny_models(variant)
    pool.run(1, save_by_megatron_core, hf, tmp_path / "theirs")
    import_hf(hf, tmp_path / "ours", file_bytes=100_000, block_bytes=10_000)  # several blocks a tensor
    assert len(list((tmp_path / "ours" / "state").glob("*.distcp"))) > 3
    ours, theirs = (read_torch_metadata(tmp_path / side / "state") for side in ("ours", "theirs"))
    assert summary(ours) == summary(theirs)
    readers = [StateReader(tmp_path / side / "state", read_shape(hf)) for side in ("ours", "theirs")]
    for row in rows(read_shape(hf)):
        mine, other = (reader.read(row) for reader in readers)
        assert all(torch.equal(mine[name], other[name]) for name in row.hf), row.megatron
        for reader in readers:  # and block by block
            joined = joined_blocks(reader, row)
            assert all(torch.equal(mine[name].view(-1), joined[name]) for name in row.hf), row.megatron
    assert {reader.can_stream(row) for row in rows(read_shape(hf))} == {True, False}


def joined_blocks(reader, row):
    """Read a row through one buffer, smaller than its tensor if it can stream; check the file ranges of each block."""
    buffer = torch.empty(1_040 if reader.can_stream(row) else reader.group_bytes(row), dtype=torch.uint8)
    blocks = {name: [] for name in row.hf}
    for name, start, block, ranges in reader.blocks(row, repeat(buffer)):
        for path, offset, elements in ranges:
            size = elements.nbytes
            assert (
                path.read_bytes()[offset : offset + size]
                == elements.reshape(-1).view(torch.uint8).numpy().tobytes()
            )
        assert start == sum(map(len, blocks[name]))
        blocks[name].append(block.clone())
    return {name: torch.cat(parts) for name, parts in blocks.items()}


class Killed(BaseException):
    pass


def test_an_import_that_was_killed_resumes_where_it_stopped(tmp_path, tiny_models, monkeypatch):
    sizes = {"file_bytes": 100_000, "block_bytes": 10_000}
    hf = tiny_models("llama3")
    import_hf(hf, tmp_path / "complete", **sizes)
    written = []
    write = StateWriter.write

    def note(self, row, start, chunk, notes=None):
        written.append((row.megatron, start))
        write(self, row, start, chunk, notes)
        if len(written) == 150:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(StateWriter, "write", note)
        patch.setattr(Journal, "abandon", lambda self, kind: self._unlock())  # as the end of a process does
        with pytest.raises(Killed):
            import_hf(hf, tmp_path / "out", **sizes)
        assert [path.name for path in tmp_path.iterdir() if path.name != "complete"] == [".out.partial"]
        import_hf(hf, tmp_path / "out", **sizes)
    assert len(set(written)) <= len(written) < len(set(written)) + 80  # full files are not written twice
    complete, out = (read_torch_metadata(tmp_path / name / "state") for name in ("complete", "out"))
    assert (complete.state_dict_metadata, complete.storage_data) == (
        out.state_dict_metadata,
        out.storage_data,
    )
    for path in (tmp_path / "complete" / "state").glob("[!.]*"):
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
    rewrite_checksums(checkpoint)


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
    "path": (lead_out, "not in a file of "),
    "chunk": (lose_chunk, "output_layer.weight must be [384, 64], its shards do not cover it in "),
    "size": (wrong_size, f"{NORM} must be [64], found [65] in "),
    "another tensor": (swap_places, f"{NORM} does not match .metadata in "),
}


@pytest.mark.parametrize("change, line", EDITS.values(), ids=EDITS)
def test_metadata_that_does_not_fit_is_refused(tmp_path, checkpoint, change, line):
    edit(checkpoint, change)
    with pytest.raises(InputError) as error:
        export_hf(checkpoint, tmp_path / "out")
    assert line in str(error.value)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


def test_a_truncated_file_is_refused_before_anything_is_written(tmp_path, checkpoint):
    path = checkpoint / "state" / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:200_000])
    with pytest.raises(InputError, match="was truncated to 200,000 of "):
        export_hf(checkpoint, tmp_path / "out")


class Evil:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return shutil.rmtree, (str(self.folder),)


def test_a_forged_pickle_runs_nothing(tmp_path, checkpoint):
    (victim := tmp_path / "victim").mkdir()
    (checkpoint / "state" / ".metadata").write_bytes(pickle.dumps(Evil(victim)))
    with pytest.raises(InputError, match="it names shutil.rmtree, which is not part of torch's metadata"):
        export_hf(checkpoint, tmp_path / "out")
    assert victim.is_dir()


def test_a_forged_chunk_runs_nothing(tmp_path, checkpoint):
    (victim := tmp_path / "victim").mkdir()
    path = checkpoint / "state" / "__0_0.distcp"
    forged = tmp_path / "forged"
    torch.save(Evil(victim), forged)
    path.write_bytes(forged.read_bytes() + path.read_bytes()[forged.stat().st_size :])
    rewrite_checksums(checkpoint)
    with pytest.raises(InputError, match="checkpoint is corrupt: .* cannot be read in "):
        export_hf(checkpoint, tmp_path / "out")
    assert victim.is_dir()


def save_plainly(tensors, state):
    """Save tensors by torch, without the note of the save that megatron-core does not write."""
    torch.distributed.checkpoint.save(tensors, checkpoint_id=state, no_dist=True)
    metadata = pickle.loads((state / ".metadata").read_bytes())
    metadata.storage_meta = None
    (state / ".metadata").write_bytes(pickle.dumps(metadata))


def test_the_vocabulary_of_an_adapter_may_be_padded_for_any_layout(tmp_path, tiny_models):
    """An embedding's A is ``[rank, vocabulary]``; three tensor-parallel ranks pad it to a multiple of 384."""
    shape = read_shape(tiny_models("llama3"))
    modules = frozenset({"model.embed_tokens"})
    table = list(all_adapter_rows(shape, Adapter(rank=2, alpha=4.0, rslora=False, modules=modules), 1))
    padded = torch.zeros(2, 768)
    padded[:, : shape.vocab_size] = torch.randn(2, shape.vocab_size)
    stored = {table[0].megatron: padded, table[1].megatron: torch.randn(shape.hidden_size, 2)}
    save_plainly(stored, tmp_path / "state")
    reader = StateReader(tmp_path / "state", shape, table)
    assert torch.equal(reader.read(table[0])[table[0].hf[0]], padded[:, : shape.vocab_size])
    assert torch.equal(
        joined_blocks(reader, table[0])[table[0].hf[0]], padded[:, : shape.vocab_size].flatten()
    )
    stored[table[0].megatron] = padded[:, : shape.vocab_size - 1].clone()
    save_plainly(stored, tmp_path / "short")
    with pytest.raises(InputError, match=f"must be .* found .*{shape.vocab_size - 1}"):
        StateReader(tmp_path / "short", shape, table)
