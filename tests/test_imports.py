"""The house: imports run downwards only, and no module is longer than a reader's patience."""

import ast
import importlib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.resources import files
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src"
# From the bottom to the top: a package imports from its own row and those above it in this list.
ROWS = [
    {"errors", "nano"},
    {"files", "settings"},
    {"tasks", "fast", "runs"},
    {"methods"},
    {"adapters"},
    {"models"},
    {"evaluate"},
    {"serve"},
    {"train"},
    {"compare"},
    {"report"},
    {"quickstart"},
    {"cli"},
]
SCRIPTS = {"ptmoe.nano.pretrain", "ptmoe", "ptmoe.__main__"}  # run by hand, or lazy


def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__"): path
        for path in SRC.rglob("*.py")
    }


def imported(name: str, path: Path, known: set[str]) -> Iterator[str]:
    """Modules of this project that a module imports anywhere, in functions and for type checking as well; not what a
    package imports when it is used, which it names for type checkers."""
    tree = ast.parse(path.read_text())
    if path.name == "__init__.py":
        tree.body = [node for node in tree.body if not isinstance(node, ast.If)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            targets = [
                f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in known else node.module
                for alias in node.names
            ]
        else:
            continue
        yield from (target for target in targets if target in known and target != name)


def graph() -> dict[str, set[str]]:
    found = modules()
    return {name: set(imported(name, path, set(found))) for name, path in found.items()}


def test_no_import_goes_in_circles() -> None:
    try:
        tuple(TopologicalSorter(graph()).static_order())
    except CycleError as error:
        pytest.fail(f"import circle: {' -> '.join(error.args[1])}")


def test_imports_run_downwards() -> None:
    row = {package: index for index, packages in enumerate(ROWS) for package in packages}
    upwards = [
        f"{name} imports {target}"
        for name, targets in graph().items()
        for target in targets
        if name not in SCRIPTS and target != "ptmoe" and row[target.split(".")[1]] > row[name.split(".")[1]]
    ]
    assert not upwards


def test_no_module_is_over_400_lines_and_models_are_under_300() -> None:
    sizes = {path.relative_to(SRC / "ptmoe"): len(path.read_text().splitlines()) for path in modules().values()}
    assert not {path: size for path, size in sizes.items() if size > 400}
    assert not {path: size for path, size in sizes.items() if path.parts[0] == "models" and size >= 300}


@pytest.mark.parametrize("name", ["ptmoe", "ptmoe.train", "ptmoe.compare", "ptmoe.report"])
def test_type_checkers_see_what_a_package_imports_when_it_is_used(name: str) -> None:
    package, path = importlib.import_module(name), modules()[name]
    checked = next(node for node in ast.parse(path.read_text()).body if isinstance(node, ast.If))
    seen = {f"{part.module}.{alias.asname}" for part in checked.body for alias in part.names if alias.asname}
    for place in seen:
        home, _, attribute = place.rpartition(".")
        assert getattr(importlib.import_module(home), attribute) is getattr(package, attribute)
    starred = {attribute for attribute, home in package._HOMES.items() if home == "methods"}
    assert {place.rpartition(".")[2] for place in seen} == set(package._HOMES) - starred
    assert files("ptmoe").joinpath("py.typed").is_file()
