"""Memory that is used again holds the same tensors, each valid until the next row is taken."""

import pytest
import torch
from safetensors.torch import load_file

from megatron_align.config import ParallelConfig
from megatron_align.hf.gather import _Memory, gathered_rows
from megatron_align.hf.writer import save_tensors
from megatron_align.model import parallel
from megatron_align.model.families import read_shape
from megatron_align.model.policy import build_policy, transformer_config
from tests.harness.marks import mark_slow

LAYOUTS = {"one": (1, {}), "tp2": (2, {"tensor": 2}), "pp2": (2, {"pipeline": 2})}


def compare(rank_info, folder, layout):
    """Return differences of both ways, and the share of a single rank's bytes that are the policy's own."""
    config = ParallelConfig(**layout)
    parallel.join(rank_info, config)
    shape = read_shape(folder)
    chunks = build_policy(transformer_config(shape, config, torch.float32), shape, parallel.groups())
    for parameter in (p for chunk in chunks for p in chunk.parameters()):
        parameter.data.normal_()
    held = [range(p.data_ptr(), p.data_ptr() + p.nbytes) for c in chunks for p in c.parameters()]
    different, total, own = [], 0, 0
    for kept, read in zip(
        gathered_rows(chunks, everywhere=True),
        gathered_rows(chunks, everywhere=True, reuse=True),
        strict=True,
    ):
        different += [name for name in kept.keys() | read.keys() if not kept[name].equal(read[name])]
        total += sum(tensor.nbytes for tensor in read.values())
        own += sum(t.nbytes for t in read.values() if any(t.data_ptr() in at for at in held))
    parallel.leave()
    return different, own / total


@pytest.mark.parametrize("layout", mark_slow(LAYOUTS, ["pp2"]))
@pytest.mark.parametrize("variant", mark_slow(["qwen2_untied", "llama3"], ["llama3"]))
def test_memory_is_used_again_with_the_same_tensors(layout, variant, pool, tiny_models):
    world, options = LAYOUTS[layout]
    for different, own in pool.run(world, compare, tiny_models(variant), options):
        assert different == []
        assert (own > 0.7) if layout == "one" else (own < 0.7)


def test_a_block_is_valid_until_it_is_cleared():
    memory = _Memory()
    like = {"dtype": torch.float32, "device": torch.device("cpu")}
    first, second = memory.empty((3, 5), **like).fill_(1), memory.empty((100,), **like).fill_(2)
    assert first.eq(1).all()
    assert second.eq(2).all()
    memory.clear()
    block = memory.empty((3, 5), **like).fill_(3)
    third = memory.empty((100,), **like).fill_(4)
    assert third.data_ptr() - block.data_ptr() == 256  # one block now, of the first row's size
    memory.clear()
    assert memory.empty((7,), **like).data_ptr() == block.data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_file_of_one_tensor_is_read_by_safetensors(dtype, tmp_path):
    tensor = torch.randn(5, 3).to(dtype)
    save_tensors({"model.norm.weight": tensor.T}, tmp_path / "one.safetensors")
    [(name, read)] = load_file(tmp_path / "one.safetensors").items()
    assert (name, read.dtype) == ("model.norm.weight", dtype)
    assert read.equal(tensor.T)
