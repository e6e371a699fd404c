"""The package's modules, and its folders, import one another without a circle."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import recalkv_vllm

PACKAGE = Path(recalkv_vllm.__file__).parent
#: Where the modules of a folder lie that ``setup.py`` maps into the package.
MAPPED = {"kernels": PACKAGE.parent / "kernels", "benchmarks": PACKAGE.parent / "benchmarks"}
Graph = dict[str, set[str]]


def sources() -> dict[str, Path]:
    """Every module of the package and its file; a folder's ``__init__`` has the folder's name."""
    roots = {"recalkv_vllm": PACKAGE}
    roots |= {f"recalkv_vllm.{name}": folder for name, folder in MAPPED.items()}
    found = {}
    for root, folder in roots.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((root, *parts))] = path
    return found


def imported(name: str, tree: ast.AST, known: set[str]) -> Iterator[str]:
    """Modules of ``known`` that module ``name`` imports, in functions too, not for annotations."""
    annotations = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in annotations:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            # Relative ones are written in modules alone, not in a folder's __init__.
            above = name.split(".")[: -node.level] if node.level else []
            module = ".".join((*above, *filter(None, (node.module,))))
            for alias in node.names:
                submodule = f"{module}.{alias.name}"
                found = submodule if submodule in known else module
                if found in known:
                    yield found


def import_graph(files: dict[str, Path]) -> Graph:
    trees = {name: ast.parse(path.read_text("utf-8")) for name, path in files.items()}
    return {name: set(imported(name, tree, set(files))) - {name} for name, tree in trees.items()}


def folders(graph: Graph) -> Graph:
    """The graph between the package's top-level folders and modules."""

    def of(module: str) -> str:
        return ".".join(module.split(".")[:2])

    merged: Graph = {}
    for name, used in graph.items():
        merged.setdefault(of(name), set()).update(of(each) for each in used)
    return {name: used - {name} for name, used in merged.items()}


def circle(graph: Graph) -> list[str]:
    """Modules of one circle, each imported by the next; empty if there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = import_graph(sources())
    assert len(graph) > 100
    assert circle(graph) == []


def test_no_folder_imports_itself_by_way_of_others() -> None:
    graph = folders(import_graph(sources()))
    assert {f"recalkv_vllm.{n}" for n in ("ops", "kernels", "serving", "compression")} <= set(graph)
    assert circle(graph) == []


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("compression", {"serving", "ops", "kernels"}),
        ("serving", {"compression", "evaluation"}),
        ("ops", {"serving", "compression", "checkpoint"}),
        ("kernels", {"serving", "compression", "checkpoint", "cost"}),
        ("cost", {"serving", "compression", "checkpoint", "ops"}),
        ("checkpoint", {"serving", "compression", "ops", "kernels"}),
    ],
)
def test_offline_tool_and_server_meet_in_the_checkpoint_alone(
    folder: str, forbidden: set[str]
) -> None:
    used = folders(import_graph(sources()))[f"recalkv_vllm.{folder}"]
    assert not used & {f"recalkv_vllm.{name}" for name in forbidden}


@pytest.mark.parametrize(
    "circular",
    [
        {"a": "import p.b", "b": "from p import a"},
        {"a": "from p.b import x", "b": "def f():\n    from p.c import y", "c": "import p.a"},
    ],
)
def test_the_check_sees(circular: dict[str, str], tmp_path: Path) -> None:
    files = {"p": tmp_path / "__init__.py"} | {f"p.{n}": tmp_path / f"{n}.py" for n in circular}
    for path, source in zip(files.values(), ("", *circular.values()), strict=True):
        path.write_text(source)
    assert circle(import_graph(files))
    (tmp_path / "a.py").write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n"
                                   "    import p.b\n    import p.c")  # fmt: skip
    assert not circle(import_graph(files))
