"""Metadata that any supported interpreter wrote is read to the same, and reading it opens no other door.

CPython 3.11.0 to 3.11.4 pickle an enum member as ``getattr(class, name)`` (CPython's GH-26658 of June 2021, taken back
for 3.10 before 3.10.0 by bpo-44559, and for 3.11 and 3.12 by GH-105348 and GH-105519 of 9 June 2023, three days after
3.11.4); all others of 3.10 to 3.13 as ``class(value)``. Looked up in the standard libraries of 3.10.13, 3.11.2, 3.11.3,
3.11.7, 3.12.1 and 3.13.0. Of the systems' own interpreters Debian 12's (3.11.2) is of the first kind, Debian 13's
(3.13.5), Ubuntu 22.04's (3.10.12) and Ubuntu 24.04's (3.12.3) are of the second.
"""

import base64
import builtins
import enum
import io
import pickle

import pytest
import torch
from torch.distributed.checkpoint import metadata as torch_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_align.checkpoint.torch_metadata import read_torch_metadata
from megatron_align.errors import InputError

# What Debian 12's Python 3.11.2 made of written() with torch 2.13.
PYTHON_3_11_2 = base64.b64decode(
    "gASVaAMAAAAAAACMJXRvcmNoLmRpc3RyaWJ1dGVkLmNoZWNrcG9pbnQubWV0YWRhdGGUjAhNZXRhZGF0YZSTlCmBlH2UKIwTc3Rh"
    "dGVfZGljdF9tZXRhZGF0YZR9lCiMBndlaWdodJRoAIwVVGVuc29yU3RvcmFnZU1ldGFkYXRhlJOUKYGUfZQojApwcm9wZXJ0aWVz"
    "lGgAjBBUZW5zb3JQcm9wZXJ0aWVzlJOUKYGUKIwFdG9yY2iUjAhiZmxvYXQxNpSTlIwTdG9yY2guc2VyaWFsaXphdGlvbpSMC19n"
    "ZXRfbGF5b3V0lJOUjA10b3JjaC5zdHJpZGVklIWUUpSJjAhidWlsdGluc5SMB2dldGF0dHKUk5RoAIwUX01FTV9GT1JNQVRfRU5D"
    "T0RJTkeUk5SMF1RPUkNIX0NPTlRJR1VPVVNfRk9STUFUlIaUUpSJdJRijARzaXpllIwFdG9yY2iUjARTaXpllJOUSwRLAoaUhZRS"
    "lIwGY2h1bmtzlF2UaACMFENodW5rU3RvcmFnZU1ldGFkYXRhlJOUKYGUfZQojAdvZmZzZXRzlGglSwBLAIaUhZRSlIwFc2l6ZXOU"
    "aCVLBEsChpSFlFKUdWJhdWKMBW90aGVylGgJKYGUfZQoaAxoDimBlChoEIwHZmxvYXQzMpSTlGgYiWgbaB2ME1RPUkNIX0NIQU5O"
    "RUxTX0xBU1SUhpRSlIl0lGJoImglSwRLAoaUhZRSlGgpXZRoLCmBlH2UKGgvaCVLAEsAhpSFlFKUaDNoJUsESwKGlIWUUpR1YmF1"
    "YowFZXh0cmGUaACMFEJ5dGVzU3RvcmFnZU1ldGFkYXRhlJOUKYGUdYwMcGxhbm5lcl9kYXRhlE6MDHN0b3JhZ2VfZGF0YZR9lGgA"
    "jA1NZXRhZGF0YUluZGV4lJOUKYGUfZQojANmcW6UaAeMBWluZGV4lE6MBm9mZnNldJRoJUsASwCGlIWUUpR1YowndG9yY2guZGlz"
    "dHJpYnV0ZWQuY2hlY2twb2ludC5maWxlc3lzdGVtlIwMX1N0b3JhZ2VJbmZvlJOUKYGUfZQojA1yZWxhdGl2ZV9wYXRolIwMX18w"
    "XzAuZGlzdGNwlGhaSwCMBmxlbmd0aJRLZHVic4wMc3RvcmFnZV9tZXRhlE6MB3ZlcnNpb26UTnViLg=="
)


def written():
    size = torch.Size([4, 2])
    chunk = ChunkStorageMetadata(torch.Size([0, 0]), size)
    kinds = {
        "weight": (torch.bfloat16, torch.contiguous_format),
        "other": (torch.float32, torch.channels_last),
    }
    entries = {
        name: TensorStorageMetadata(TensorProperties(dtype, memory_format=memory_format), size, [chunk])
        for name, (dtype, memory_format) in kinds.items()
    }
    place = {MetadataIndex("weight", torch.Size([0, 0])): _StorageInfo("__0_0.distcp", 0, 100)}
    return Metadata({**entries, "extra": BytesStorageMetadata()}, storage_data=place)


class PicklerOf(pickle.Pickler):
    """Pickles enum members as another interpreter would."""

    def __init__(self, file, protocol, kind):
        super().__init__(file, protocol)
        self.kind = kind

    def reducer_override(self, value):
        if not isinstance(value, enum.Enum):
            return NotImplemented
        by_name = getattr, (type(value), value.name)
        return {"by name": by_name, "by value": (type(value), (value.value,))}[self.kind]


def pickled(kind, protocol=pickle.DEFAULT_PROTOCOL, value=None):
    file = io.BytesIO()
    PicklerOf(file, protocol, kind).dump(written() if value is None else value)
    return file.getvalue()


def read(folder, content):
    (folder / ".metadata").write_bytes(content)
    return read_torch_metadata(folder)


@pytest.mark.parametrize("kind", ["by name", "by value"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_metadata_of_each_way_of_pickling_are_read(tmp_path, kind, protocol):
    content = pickled(kind, protocol)
    assert (b"getattr" in content) == (kind == "by name")
    found = read(tmp_path, content)
    assert found == written()
    assert found.state_dict_metadata["other"].properties.memory_format == torch.channels_last


def test_the_replay_is_what_python_3_11_2_writes(tmp_path):
    assert b"getattr" in PYTHON_3_11_2
    assert read(tmp_path, PYTHON_3_11_2) == written()


class Call:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


ENCODING = torch_metadata._MEM_FORMAT_ENCODING
FORGED = {
    "an attribute of the enum": Call(getattr, ENCODING, "mro"),
    "a method of the enum": Call(getattr, ENCODING, "__init_subclass__"),
    "another class": Call(getattr, Metadata, "__init__"),
    "a member of a member": Call(getattr, Call(getattr, ENCODING, "TORCH_CHANNELS_LAST"), "value"),
    "a dotted name": Call(getattr, ENCODING, "TORCH_CHANNELS_LAST.value"),
    "a default": Call(getattr, ENCODING, "no such member", 1),
    "no name": Call(getattr, ENCODING, ["TORCH_CHANNELS_LAST"]),
    "a module's function": Call(getattr, Call(builtins.__import__, "os"), "system"),
    "getattr itself": getattr,
    "setattr": Call(setattr, ENCODING, "mro", 1),
}


@pytest.mark.parametrize("forged", FORGED.values(), ids=FORGED)
@pytest.mark.parametrize("protocol", [2, 4])
def test_getattr_gives_nothing_else(tmp_path, forged, protocol):
    with pytest.raises(InputError, match="checkpoint is corrupt: "):
        read(tmp_path, pickle.dumps(forged, protocol))
    metadata = written()
    metadata.planner_data = forged
    if forged is not getattr:  # as a value it is only our function, which returns members
        with pytest.raises(InputError, match="checkpoint is corrupt: "):
            read(tmp_path, pickled("by name", protocol, metadata))
