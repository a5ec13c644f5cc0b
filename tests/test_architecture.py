"""The rooms of the house and the direction of their imports, read from the source without running it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]

PACKAGES = ("configs", "lora", "pipelines", "deployments")

FLOORS = (
    ("configs",),
    ("lora",),
    ("pipelines.job", "pipelines.reasons"),
    ("pipelines.media", "pipelines.parallel"),
    ("pipelines.model",),
    ("pipelines.generation", "pipelines.bundled"),
    ("deployments",),  # what its rooms share: interfaces, clients, errors, losses, names, log
    ("deployments.api", "deployments.state"),
    ("deployments.engine",),
    ("deployments.app",),
    ("deployments.command",),
)
"""The rooms from the ground up: each may import itself and those on the floors below, and is a stranger to the others
on its own floor. A module belongs to the room with the longest name that it is within."""

FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

NAMED_AS_THEIR_ROOM = {"deployments.engine.engine", "deployments.state.state", "pipelines.generation.generation"}
"""The modules with their room's main class, or function. No other repeats the room's name."""

ONLY_HERE = {
    "ray": ("deployments",),
    "fastapi": ("deployments.api",),
}
"""Libraries, each with the packages that may import it."""

FOR_RANKS = {"torch", "diffusers", "transformers", "accelerate", "peft", "safetensors.torch", "av"}
"""Libraries that compute and encode."""

COMPUTE_NOTHING = ("deployments.api.app", "deployments.app", "deployments.state.actor", "deployments.command.cli")
"""What the processes that compute nothing import: the Ingress and Engine replicas, the state actor and the command
line. Torch would cost each of them 150 MB and two seconds, PyAV 10 MB."""

TEXT_SUFFIXES = (".py", ".yaml", ".md", ".sh")

UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b|^(<{7}|={7}|>{7})( |$)|\bbreakpoint\(|\bimport pdb\b", re.MULTILINE)


@dataclass(frozen=True)
class Import:
    """One imported module, and whether it is imported as soon as the importing module is."""

    module: str
    at_once: bool


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {
    module_name(path): ast.parse(path.read_text(), str(path))
    for package in PACKAGES
    for path in sorted((REPOSITORY / package).rglob("*.py"))
}
"""The syntax tree of each module of the project."""


def imports_of(module: str) -> set[Import]:
    return set(_imports(SOURCES[module], at_once=True))


def _imports(node: ast.AST, *, at_once: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.Import(names):
                yield from (Import(alias.name, at_once) for alias in names)
            case ast.ImportFrom(module=str(module), names=names, level=0):
                yield Import(module, at_once)
                # `from deployments.api import images` imports a module, not a name.
                yield from (Import(name, at_once) for alias in names if (name := f"{module}.{alias.name}") in SOURCES)
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                yield from _imports(child, at_once=False)
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                yield from (Import(found.module, at_once=False) for found in _imports(child, at_once=False))
            case _:
                yield from _imports(child, at_once=at_once)


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def loaded_with(module: str) -> dict[str, str]:
    """Every module that importing `module` loads at once, through any depth of project modules, with its importer."""
    importer = {module: ""}
    waiting = [module]
    while waiting:
        current = waiting.pop()
        found = {imported.module for imported in imports_of(current) if imported.at_once}
        # Importing a.b.c imports a and a.b first.
        found |= {".".join(name.split(".")[:depth]) for name in found for depth in range(1, name.count(".") + 1)}
        for name in found - importer.keys():
            importer[name] = current
            if name in SOURCES:
                waiting.append(name)
    return importer


def room_of(module: str) -> str | None:
    """None for what is no module of the project, and for `pipelines` itself, which is empty."""
    return max((room for room in FLOOR if is_within(module, room)), key=len, default=None)


def test_every_module_is_in_a_room() -> None:
    assert {module for module in SOURCES if room_of(module) is None} == {"pipelines"}
    assert {room_of(module) for module in SOURCES} - {None} == FLOOR.keys()


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_down_only(module: str) -> None:
    own = room_of(module)
    rooms = {found.module: room for found in imports_of(module) if (room := room_of(found.module)) not in (None, own)}
    astray = {imported: room for imported, room in rooms.items() if own is None or FLOOR[room] >= FLOOR[own]}
    assert not astray, f"{module}, in the room {own}, imports {astray}"


def test_a_file_does_not_repeat_the_name_of_its_room() -> None:
    def repeats(module: str) -> bool:
        *_, room, name = ("", *module.split("."))
        return room in name.split("_")

    assert {module for module in SOURCES if repeats(module)} == NAMED_AS_THEIR_ROOM


def test_no_module_imports_itself_through_others() -> None:
    """Nor by an import within a function, which only hides a circle."""
    imported = {module: {found.module for found in imports_of(module)} & SOURCES.keys() for module in SOURCES}
    TopologicalSorter(imported).prepare()  # raises CycleError with the circle


@pytest.mark.parametrize(("library", "packages"), ONLY_HERE.items())
def test_a_library_stays_in_its_room(library: str, packages: tuple[str, ...]) -> None:
    strays = [
        module
        for module in SOURCES
        if any(is_within(found.module, library) for found in imports_of(module))
        and not any(is_within(module, package) for package in packages)
    ]
    assert not strays, f"{library} is imported by {strays}"


@pytest.mark.parametrize("entrance", COMPUTE_NOTHING)
def test_what_ranks_compute_with_does_not_reach_a_process_that_computes_nothing(entrance: str) -> None:
    importer = loaded_with(entrance)
    assert not [path_to(module, importer) for module in FOR_RANKS & importer.keys()]


@pytest.mark.parametrize("library", ["torch", "av"])
def test_what_ranks_compute_with_is_found_where_it_is_imported(library: str) -> None:
    assert any(library in loaded_with(module) for module in SOURCES if is_within(module, "pipelines"))


def path_to(module: str, importer: dict[str, str]) -> str:
    """The chain of imports by which `module` is loaded."""
    chain = [module]
    while importer.get(chain[0]):
        chain.insert(0, importer[chain[0]])
    return " -> ".join(chain)


def test_imports_name_their_module_in_full() -> None:
    relative = [
        module
        for module, tree in SOURCES.items()
        if any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(tree))
    ]
    assert not relative


@pytest.mark.parametrize(
    "path", [*PACKAGES, "tests", "benchmarks", "docs", "Makefile", "README.md", "serve_config.yaml"]
)
def test_nothing_is_left_unfinished(path: str) -> None:
    top = REPOSITORY / path
    files = [top] if top.is_file() else [file for file in top.rglob("*") if file.suffix in TEXT_SUFFIXES]
    assert files, f"{path} is gone"
    unfinished = {
        str(file.relative_to(REPOSITORY)): found[0]
        for file in files
        if file != Path(__file__) and (found := UNFINISHED.search(file.read_text()))
    }
    assert not unfinished
