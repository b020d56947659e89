"""What one can read in a sitting: files up to 600 lines, functions up to 80, up to 10 parameters.

A Triton kernel is one function by its nature, and is held to the file's limit alone. A command has as many
parameters as options.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOMS = ("kernels", "models", "data_pipelines", "pretrain", "launch", "benchmarks")


def test_sizes() -> None:
    files = sorted(path for room in ROOMS for path in Path(room).rglob("*.py"))
    assert {path.parts[0] for path in files} == set(ROOMS)
    found = [problem for path in files for problem in _too_large(str(path), path.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


def test_what_is_too_large() -> None:
    body = "\n    pass" * 79
    parameters = ", ".join(f"p{number}" for number in range(11))
    assert list(_too_large("a.py", f"def fits({parameters[:-5]}):{body}\n")) == []
    assert list(_too_large("a.py", "\n" * 601)) == ["a.py: 601 lines"]
    assert list(_too_large("a.py", f"async def long():{body}\n    pass\n")) == ["a.py:1: long has 81 lines"]
    assert list(_too_large("a.py", f"def wide({parameters}): ...")) == ["a.py:1: wide has 11 parameters"]
    assert list(_too_large("a.py", f"@app.command()\ndef wide({parameters}): ...")) == []
    assert list(_too_large("a.py", f"@triton.jit\ndef kernel({parameters}):{body}\n    pass\n")) == []


def _too_large(name: str, text: str) -> Iterator[str]:
    if text.count("\n") > 600:
        yield f"{name}: {text.count(chr(10))} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not _is(node, "triton.jit"):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            if lines > 80:
                yield f"{name}:{node.lineno}: {node.name} has {lines} lines"
            parameters = len(node.args.args) + len(node.args.kwonlyargs)
            if parameters > 10 and not _is(node, "app.command"):
                yield f"{name}:{node.lineno}: {node.name} has {parameters} parameters"


def _is(function: ast.FunctionDef | ast.AsyncFunctionDef, decorator: str) -> bool:
    return any(ast.unparse(found).startswith(decorator) for found in function.decorator_list)
