"""Imports go down the floors, never up, never sideways between rooms, never in a circle; every module imports.

The list below is the architecture.
"""

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "megatron_align"
FLOORS = [
    ["kernels"],
    ["errors", "faults", "records", "version"],
    ["config", "storage", "losses"],
    ["data", "model"],
    ["hf", "objectives"],
    ["cost", "checkpoint", "merge", "rollout"],
    ["monitoring"],
    ["convert", "training"],
    ["evaluation", "rehearsal"],
    ["curation"],
    ["augmentation"],
    ["train", "evaluate"],
    ["tools"],
    ["examples"],  # that of the report draws its page with the pieces of the report command
]
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}


def sources():
    """Yield ``(module name, file)`` of all code, the linked rooms under the name they are imported by."""
    for top in (PACKAGE, "kernels", "tools", "examples"):
        for path in sorted((ROOT / top).rglob("*.py")):
            if any((ROOT / part).is_symlink() for part in path.relative_to(ROOT).parents if str(part) != "."):
                continue
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            yield (f"{PACKAGE}.{name}" if top in ("kernels", "tools") else name), path


def room_of(module: str) -> str | None:
    return module.removeprefix(f"{PACKAGE}.").split(".")[0] if module != PACKAGE else None


def imports_of(path: Path) -> set[str]:
    """Return the names of modules, and of what is imported from them, anywhere in a file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imported_modules() -> dict[str, set[str]]:
    """Return which of our modules each of our modules imports."""
    names = {module for module, _ in sources()}

    def module_of(imported: str) -> str | None:
        return next((name for name in (imported, imported.rpartition(".")[0]) if name in names), None)

    return {module: {m for name in imports_of(path) if (m := module_of(name))} for module, path in sources()}


def circles(imports: dict[str, set[str]]) -> set[tuple[str, ...]]:
    """Return the groups of modules that import each other, directly or through others."""

    def reachable(start: str) -> set[str]:
        seen, to_visit = set(), [start]
        while to_visit:
            new = imports[to_visit.pop()] - seen
            seen |= new
            to_visit += new
        return seen

    reach = {module: reachable(module) for module in imports}
    return {
        tuple(sorted(other for other in reach[module] if module in reach[other]))
        for module in reach
        if module in reach[module]
    }


def test_imports_only_go_down():
    wrong, seen = [], set()
    for module, path in sources():
        here = room_of(module)
        seen.add(here)
        for imported in imports_of(path):
            there = room_of(imported) if imported.startswith(f"{PACKAGE}.") else None
            if here is None or there not in FLOOR or there == here:
                continue
            if FLOOR[there] >= FLOOR[here]:
                wrong.append(f"{path.relative_to(ROOT)}: {here} -> {there}")
    assert not wrong, "\n".join(wrong)
    assert seen - {None} == set(
        FLOOR
    )  # a room without a floor, or one that nobody finds, would make this test vain


def test_no_module_imports_itself_through_others():
    found = circles(imported_modules())
    assert not found, "\n".join(" <-> ".join(group) for group in sorted(found))


def test_a_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == {("b", "c")}


OPTIONAL = ("lm_eval", "datasketch")  # packages of extras, whose modules are imported where they are used


def test_kernels_need_torch_and_triton_only():
    outside = {
        f"{path.name}: {name}"
        for module, path in sources()
        if room_of(module) == "kernels"
        for name in imports_of(path)
        if name.split(".")[0] in ("transformers", "megatron", "numpy", "jsonargparse", "rich")
    }
    assert not outside


@pytest.mark.parametrize("module", [m for m, _ in sources() if not m.startswith("examples")])
def test_every_module_imports(module):
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        pytest.skip(f"{error.name} is not installed")
