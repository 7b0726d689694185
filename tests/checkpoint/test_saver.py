"""A checkpoint saved in the background is the one that a synchronous save would have written, file by file: whatever
training changes once it is copied, and however late it is copied and gathered.
"""

import errno
import os
import time
from itertools import product
from pathlib import Path
from unittest import mock

import pytest
import torch

from megatron_align.checkpoint.card import make_checkpoint_metadata
from megatron_align.checkpoint.integrity import find_corrupt_files
from megatron_align.checkpoint.saver import CheckpointContent, SaveFailed, Saver
from megatron_align.config import OptimizerConfig, ParallelConfig
from megatron_align.faults import VARIABLE
from megatron_align.hf.load import load_weights
from megatron_align.model import parallel
from megatron_align.model.families import read_shape
from megatron_align.model.policy import build_policy, transformer_config
from megatron_align.training.optimizer import build_optimizer, wrap_data_parallel
from tests.harness.marks import mark_slow


def build(rank_info, model, config, dtype):
    shape = read_shape(model)
    parallel.join(rank_info, config)
    groups = parallel.groups()
    chunks = build_policy(transformer_config(shape, config, dtype), shape, groups)
    local = {name: p for chunk in chunks for name, p in chunk.global_parameters().items()}
    load_weights(model, shape, local, groups.tp.rank(), groups.tp.size())
    ddp = wrap_data_parallel(chunks, ParallelConfig())
    optimizer, metadata = (
        build_optimizer(ddp, OptimizerConfig(), groups),
        make_checkpoint_metadata(1, shape, dtype),
    )
    return CheckpointContent(model=ddp, optimizer=optimizer, metadata=metadata, assets=model)


def change(ddp, optimizer):
    """What a step does: weights, masters and moments move, in place; so do step and learning rate."""
    with torch.no_grad():
        for chunk in ddp:
            for parameter in chunk.parameters():
                parameter.add_(1)
        for group in optimizer.param_groups:
            for shard in group["params"]:
                shard.add_(1)
                optimizer.optimizer.state[shard]["exp_avg"].add_(1)
                optimizer.optimizer.state[shard]["step"].add_(1)
            group["lr"] /= 2


def late(call):
    """Return the call, delayed."""
    return lambda: (time.sleep(0.1), call())


def save_both_ways(rank_info, model, folder, config, dtype):
    """In a process of the pool: two checkpoints, each written both ways; once by a saver that has no plan yet."""
    content = build(rank_info, model, config, dtype)
    state = content.optimizer.host_state
    state.copy, state.gather = late(state.copy), late(state.gather)
    background = Saver(background=True)
    for number in range(2):
        Saver().save(folder / f"synchronous_{number}", content)
        background.begin(folder / f"background_{number}", content)
        background.wait_until_copied()
        change(content.model, content.optimizer)
        background.finish()
    parallel.leave()


LAYOUTS = {
    "one": (1, ParallelConfig()),
    "dp2": (2, ParallelConfig()),
    "tp2": (2, ParallelConfig(tensor=2)),
    "vpp2": (2, ParallelConfig(pipeline=2, virtual_pipeline=2)),
}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
SAVED = list(product(LAYOUTS, PRECISIONS))


@pytest.mark.parametrize(
    "layout, precision", mark_slow(SAVED, slow=set(SAVED) - {("dp2", "fp32"), ("tp2", "bf16")})
)
def test_both_ways_write_the_same_files(pool, tiny_models, tmp_path, layout, precision):
    (world, config), dtype = LAYOUTS[layout], PRECISIONS[precision]
    pool.run(world, save_both_ways, tiny_models(), tmp_path, config, dtype)
    seen = set()
    for number in range(2):
        lists = [
            (tmp_path / f"{way}_{number}" / "SHA256SUMS").read_text() for way in ("synchronous", "background")
        ]
        assert lists[0] == lists[1]
        assert find_corrupt_files(tmp_path / f"background_{number}") == []
        seen.add(lists[0])
    assert len(seen) == 2  # the changes are in them


def fail_to_save(rank_info, model, folder, rank):
    """In a process of the pool; return this rank's error, and the files that are left of the attempt."""
    content = build(rank_info, model, ParallelConfig(), torch.float32)
    saver = Saver(background=True)
    os.environ[VARIABLE] = f"full@save.written::{rank}"
    try:
        saver.begin(folder / "step_000001", content)
        saver.finish()
        message = "no error"
    except SaveFailed as error:
        message = str(error)
    finally:
        del os.environ[VARIABLE]
    left = sorted(path.name for path in folder.iterdir())
    torch.distributed.barrier()
    saver.save(folder / "step_000002", content)  # the saver still works
    parallel.leave()
    return message, left


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_cannot_write_is_reported_by_all(pool, tiny_models, tmp_path, rank):
    for message, left in pool.run(2, fail_to_save, tiny_models(), tmp_path, rank):
        assert message.endswith(f".step_000001.partial: rank {rank}: No space left on device")
        assert left == []
    assert find_corrupt_files(tmp_path / "step_000002") == []


def fail_to_rename(rank_info, model, folder):
    """In a process of the pool: the folder of the checkpoint is a mount point by the time it is complete."""
    content = build(rank_info, model, ParallelConfig(), torch.float32)
    rename = Path.rename

    def refuse(self, target):
        if self.name.endswith(".partial"):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return rename(self, target)

    with mock.patch.object(Path, "rename", refuse), pytest.raises(SaveFailed) as failure:
        Saver().save(folder / "step_000001", content)
    parallel.leave()
    return str(failure.value)


def test_a_complete_checkpoint_that_cannot_be_renamed_is_kept(pool, tiny_models, tmp_path):
    partial = tmp_path / ".step_000001.partial"
    for message in pool.run(2, fail_to_rename, tiny_models(), tmp_path):
        assert f"stays at {partial}: Device or resource busy; rename it before the next start" in message
    assert find_corrupt_files(partial) == []
