"""A run is finished if its marker and everything that it exports are there: what is missing is written again."""

from types import SimpleNamespace

import pytest

from megatron_align.training.finished import is_finished, write_finished_marker


@pytest.mark.parametrize("adapter", [None, object()], ids=["weights", "adapter"])
@pytest.mark.parametrize("export_hf", [False, True])
@pytest.mark.parametrize("exists", [(), ("hf",), ("adapter",), ("hf", "adapter")], ids="+".join)
def test_a_missing_export_is_not_finished(tmp_path, adapter, export_hf, exists):
    config = SimpleNamespace(checkpoint=SimpleNamespace(export_hf=export_hf))
    resume = SimpleNamespace(step=3)
    setup = SimpleNamespace(
        folder=tmp_path, steps=3, resume=resume, adapter=adapter, config=config, critic=None
    )
    assert not is_finished(setup)
    write_finished_marker(tmp_path, 3)
    for name in exists:
        (tmp_path / name).mkdir()
    needed = {name for name, wanted in (("hf", export_hf), ("adapter", adapter)) if wanted}
    assert is_finished(setup) == (needed <= set(exists))
