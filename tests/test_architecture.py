"""A room imports from lower floors alone, as CONTRIBUTING.md says, and each thing has its room."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "hosm_losses"
ROW = re.compile(r"^\| (\d) \| ([^|]+) \|", re.MULTILINE)
# Room by room, the floor that the one table gives it.
FLOORS = {
    room: int(floor)
    for floor, rooms in ROW.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    for room in re.findall(r"`(\w+)`", rooms)
}
# Who may import what only some may import.
RESERVED = {"losses": set(), "likelihood": {"diagnostics"}}
# Where PyTorch's differentiation is called.
DIFFERENTIATES = {"_torch_internals", "schedules/base", "losses/recompute"}
LONGEST = 320
FILES = {
    path.relative_to(SOURCE).with_suffix("").as_posix(): path
    for path in sorted(SOURCE.rglob("*.py"))
    if path.parent != SOURCE or path.name != "__init__.py"
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def _room(name):
    return name.partition("/")[0]


def _imported(tree):
    """Dotted names of everything the file imports, with what it takes from each module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write imports in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _own_imports(name):
    """The files of this package that a file imports from."""
    for dotted in _imported(TREES[name]):
        package, *parts = dotted.split(".")
        if package != "hosm_losses":
            continue
        while "/".join(parts) not in FILES and "/".join([*parts, "__init__"]) not in FILES:
            parts.pop()
        path = "/".join(parts)
        yield path if path in FILES else f"{path}/__init__"


def _differentiates(tree):
    """Whether torch.func, torch.autograd or .backward() occurs outside strings."""
    dotted = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    dotted |= set(_imported(tree))
    return any(
        f"{text}.".startswith(("torch.func.", "torch.autograd.")) for text in dotted
    ) or any(text.endswith(".backward") for text in dotted)


def test_every_room_has_a_floor():
    assert {_room(name) for name in FILES} == set(FLOORS)


@pytest.mark.parametrize("name", FILES)
def test_a_room_imports_from_lower_floors_and_through_the_front_door(name):
    room = _room(name)
    for imported in _own_imports(name):
        other = _room(imported)
        if other != room:
            assert FLOORS[other] < FLOORS[room] or not FLOORS[room], f"{imported} is not below"
            assert room in RESERVED.get(other, {room}), f"{other} is not for {room}"
            assert imported in {other, f"{other}/__init__"}, f"import from hosm_losses.{other}"


def test_no_two_files_import_each_other():
    graph = {name: set(_own_imports(name)) - {name} for name in FILES}
    graphlib.TopologicalSorter(graph).prepare()


def test_differentiation_has_its_rooms():
    found = {name for name, tree in TREES.items() if _differentiates(tree)}
    assert {name for name in found if _room(name) != "derivatives"} == DIFFERENTIATES


@pytest.mark.parametrize("name", FILES)
def test_files_are_short(name):
    assert len(FILES[name].read_text(encoding="utf-8").splitlines()) <= LONGEST


@pytest.mark.parametrize("name", FILES)
def test_files_say_what_they_are(name):
    assert ast.get_docstring(TREES[name])
