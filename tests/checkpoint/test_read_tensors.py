"""Any range of any box of a stored tensor is read as slicing the entire tensor gives it, however it is cut on disk."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_align.checkpoint.read_tensors import ReadRequest, read_tensors
from megatron_align.errors import InputError


def write_state(folder, tensor, cuts):
    """Save ``tensor`` as "weight", cut along each dimension at ``cuts``; two files take turns."""
    folder.mkdir(exist_ok=True)
    boxes = [((), ())]
    for size, inner in zip(tensor.shape, cuts, strict=True):
        edges = [0, *sorted(inner), size]
        spans = [(a, b - a) for a, b in zip(edges, edges[1:], strict=False) if b > a]
        boxes = [((*o, at), (*s, long)) for o, s in boxes for at, long in spans]
    chunks, places = [], {}
    for number, (offsets, sizes) in enumerate(boxes):
        name = f"__{number % 2}_0.distcp"
        part = tensor
        for dim, (at, long) in enumerate(zip(offsets, sizes, strict=True)):
            part = part.narrow(dim, at, long)
        with (folder / name).open("ab") as file:
            start = file.tell()
            torch.save(part.clone(memory_format=torch.contiguous_format), file)
            places[MetadataIndex("weight", torch.Size(offsets))] = _StorageInfo(
                name, start, file.tell() - start
            )
        chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
    entry = TensorStorageMetadata(TensorProperties(tensor.dtype), tensor.shape, chunks)
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata({"weight": entry}, storage_data=places)))
    return folder


def request(shape, offsets, sizes, start, target, layer_dims=0, allow_padding=False):
    return ReadRequest(
        key="weight",
        global_shape=shape,
        offsets=offsets,
        sizes=sizes,
        layer_dims=layer_dims,
        allow_padding=allow_padding,
        start=start,
        target=target,
    )


@st.composite
def cases(draw):
    """A shape, where it is cut, a box of one layer if layers are stacked, and a range of the flattened box."""
    stacked = draw(st.integers(0, 1))
    shape = draw(st.lists(st.integers(1, 7), min_size=stacked + 1, max_size=stacked + 2))
    cuts = [draw(st.sets(st.integers(1, size))) for size in shape]
    cuts[:stacked] = [set(range(size)) for size in shape[:stacked]]
    offsets, sizes = [], []
    for dim, size in enumerate(shape):
        at = draw(st.integers(0, size - 1))
        offsets.append(at)
        sizes.append(1 if dim < stacked else draw(st.integers(1, size - at)))
    elements = torch.Size(sizes).numel()
    start = draw(st.integers(0, elements - 1))
    count = draw(st.integers(1, elements - start))
    dtypes = draw(st.sampled_from([(torch.float32, torch.float32), (torch.bfloat16, torch.float32)]))
    return stacked, tuple(shape), cuts, tuple(offsets), tuple(sizes), start, count, dtypes


@settings(max_examples=150, deadline=None)
@given(cases())
def test_a_range_of_a_box_is_what_slicing_gives(tmp_path_factory, case):
    stacked, shape, cuts, offsets, sizes, start, count, (stored, wanted) = case
    tensor = torch.arange(torch.Size(shape).numel()).view(shape).to(stored)
    state = write_state(tmp_path_factory.mktemp("state"), tensor, cuts)
    box = tensor
    for dim, (at, long) in enumerate(zip(offsets, sizes, strict=True)):
        box = box.narrow(dim, at, long)
    target = torch.full((count,), torch.nan, dtype=wanted)
    read_tensors(state, [request(shape, offsets, sizes, start, target, stacked)])
    assert torch.equal(target, box.reshape(-1)[start : start + count].to(wanted))


def test_rows_past_the_end_of_a_padded_tensor_become_zero(tmp_path):
    """A vocabulary that was filled up to 6 rows, read where 8 are laid out on two ranks, and where 4 are."""
    tensor = torch.arange(1.0, 13.0).view(6, 2)
    state = write_state(tmp_path / "state", tensor, [{4}, set()])
    for first, rows in ((0, 4), (4, 4), (0, 3), (6, 2)):
        target = torch.full((rows * 2,), torch.nan)
        read_tensors(state, [request((8, 2), (first, 0), (rows, 2), 0, target, allow_padding=True)])
        want = torch.cat([tensor, torch.zeros(2, 2)])[first : first + rows]
        assert torch.equal(target.view(rows, 2), want)


def test_what_is_not_there_is_named(tmp_path):
    state = write_state(tmp_path / "state", torch.ones(4, 2), [{2}, set()])
    target = torch.empty(8)
    with pytest.raises(InputError, match=r"weight must have shape \[6, 2\], found \[4, 2\]"):
        read_tensors(state, [request((6, 2), (0, 0), (4, 2), 0, target)])
    with pytest.raises(InputError, match="missing bias"):
        read_tensors(state, [ReadRequest("bias", (2,), (0,), (2,), 0, False, 0, target[:2])])
    metadata = pickle.loads((state / ".metadata").read_bytes())
    metadata.state_dict_metadata["weight"].chunks.pop()
    (state / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(InputError, match="4 elements of weight are in no shard"):
        read_tensors(state, [request((4, 2), (0, 0), (4, 2), 0, target)])


@pytest.mark.parametrize(
    "content",
    [torch.ones(4, 2).T, torch.ones(2, 4, dtype=torch.float64), torch.ones(3, 4)[1:], torch.ones(9), [1]],
    ids=["transposed", "dtype", "slice", "size", "no tensor"],
)
def test_a_shard_that_does_not_match_the_metadata_is_refused(tmp_path, content):
    state = write_state(tmp_path / "state", torch.ones(2, 4), [set(), set()])
    torch.save(content, state / "__0_0.distcp")
    metadata = pickle.loads((state / ".metadata").read_bytes())
    [info] = metadata.storage_data.values()
    info.length = (state / "__0_0.distcp").stat().st_size
    (state / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(InputError, match=r"weight (does not match \.metadata|cannot be read)"):
        read_tensors(state, [request((2, 4), (0, 0), (2, 4), 0, torch.empty(8))])


def test_a_truncated_file_is_named(tmp_path):
    state = write_state(tmp_path / "state", torch.ones(200, 4), [set(), set()])
    file = state / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match=f"weight cannot be read in {file}"):
        read_tensors(state, [request((200, 4), (0, 0), (200, 4), 0, torch.empty(800))])
