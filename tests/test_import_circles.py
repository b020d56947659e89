"""No circle of imports among the modules of the project."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROOMS = ("kernels", "models", "data_pipelines", "pretrain", "launch", "benchmarks")
TYPES_ALONE = {
    f"pretrain.hooks.{name}": frozenset({"pretrain.run"}) for name in ("base", "evaluation", "finite")
}
"""The one circle there is, of types alone: a hook is given the run, and the run has its hooks."""


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def run_on_import(tree: ast.Module) -> Iterator[ast.stmt]:
    """The statements that importing a module runs: none of a function, none of `if TYPE_CHECKING`."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        if isinstance(node, ast.stmt):
            yield node
        waiting += ast.iter_child_nodes(node)


def imports(module: str, source: str, known: frozenset[str], *, late: bool = False) -> set[str]:
    """The project's modules that this one imports as it is imported itself; `late`: those of its functions and of
    `if TYPE_CHECKING` too."""
    found: set[str] = set()
    tree = ast.parse(source)
    for node in ast.walk(tree) if late else run_on_import(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"{module}: imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else node.module)
    return (found & known) - {module}


def circle(arrows: Mapping[str, set[str]]) -> list[str]:
    """One circle among the arrows; empty if there is none."""
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def arrows_of_the_project(*, late: bool = False) -> dict[str, set[str]]:
    sources = {module_of(path): path for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    known = frozenset(sources)
    return {
        name: imports(name, path.read_text(encoding="utf-8"), known, late=late)
        for name, path in sources.items()
    }


def test_no_module_imports_itself_by_way_of_others() -> None:
    arrows = arrows_of_the_project()
    assert len(arrows) > 200
    found = circle(arrows)
    assert not found, " -> ".join(found)


def test_no_circle_is_hidden_in_functions_or_types() -> None:
    arrows = arrows_of_the_project(late=True)
    for module, names in TYPES_ALONE.items():
        path = (ROOT / module.replace(".", "/")).with_suffix(".py")
        now = imports(module, path.read_text(encoding="utf-8"), frozenset(arrows))
        assert names <= arrows[module] and not names & now, f"{module}: TYPES_ALONE is not up to date"
        arrows[module] -= names
    found = circle(arrows)
    assert not found, " -> ".join(found)


def test_a_circle_is_found() -> None:
    known = frozenset({"a", "a.b", "c"})
    sources = {"a": "from a.b import x", "a.b": "import c", "c": "class C:\n    from a import y"}
    arrows = {name: imports(name, source, known) for name, source in sources.items()}
    assert set(circle(arrows)) == {"a", "a.b", "c"}
    late = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import a\ndef f():\n    import a\n"
    assert imports("c", late, known) == set()
    assert imports("c", late, known, late=True) == {"a"}
