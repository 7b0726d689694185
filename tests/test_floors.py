"""Imports go down the floors, never up or sideways; every module imports. The list below is the architecture."""

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = [
    ["megatron_align.kernels"],
    [
        "megatron_align.errors",
        "megatron_align.faults",
        "megatron_align.objectives",
        "megatron_align.sections",
        "megatron_align.config",
        "megatron_align.records",
    ],
    ["megatron_align.data", "megatron_align.model", "megatron_align.losses"],
    ["megatron_align.checkpoint", "megatron_align.cost"],
    ["megatron_align.training"],
    ["megatron_align.train"],
    ["megatron_align.tools", "examples"],
]
# Within floor 1 the errors are a leaf that the others may use, and a run's options are its sections' and objective's.
SIDEWAYS = {
    ("megatron_align.config", "megatron_align.errors"),
    ("megatron_align.config", "megatron_align.objectives"),
    ("megatron_align.config", "megatron_align.sections"),
    ("megatron_align.sections", "megatron_align.errors"),
    ("megatron_align.objectives", "megatron_align.errors"),
}
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}


def sources():
    """Yield ``(module name, file)`` of all code, the linked rooms under the name they are imported by."""
    for top in ("megatron_align", "kernels", "tools", "examples"):
        for path in sorted((ROOT / top).rglob("*.py")):
            if any((ROOT / part).is_symlink() for part in path.relative_to(ROOT).parents if str(part) != "."):
                continue
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            yield (f"megatron_align.{name}" if top in ("kernels", "tools") else name), path


def room_of(module: str) -> str | None:
    return next((room for room in FLOOR if f"{module}.".startswith(f"{room}.")), None)


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_imports_only_go_down():
    wrong, seen = [], set()
    for module, path in sources():
        here = room_of(module)
        seen.add(here)
        for imported in imports_of(path):
            there = room_of(imported)
            if here is None or there is None or there == here or (here, there) in SIDEWAYS:
                continue
            if FLOOR[there] >= FLOOR[here]:
                wrong.append(f"{path.relative_to(ROOT)}: {here} -> {there}")
    assert not wrong, "\n".join(wrong)
    assert seen >= set(FLOOR) - {"examples"}  # a room that nobody finds would make this test vain


def test_kernels_need_torch_and_triton_only():
    outside = {
        f"{path.name}: {name}"
        for module, path in sources()
        if room_of(module) == "megatron_align.kernels"
        for name in imports_of(path)
        if name.split(".")[0] in ("transformers", "megatron", "numpy", "jsonargparse", "rich")
    }
    assert not outside


@pytest.mark.parametrize("module", [m for m, _ in sources() if not m.startswith("examples")])
def test_every_module_imports(module):
    importlib.import_module(module)
