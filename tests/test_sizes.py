"""What one can read in a sitting: files up to 600 lines, functions up to 80, up to 10 parameters.

A Triton kernel is one function by its nature, and is held to the file's limit alone. A command has as many
parameters as options.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOMS = ("kernels", "models", "data_pipelines", "pretrain", "launch", "benchmarks")
FILES = sorted(path for room in ROOMS for path in Path(room).rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=str)
def test_sizes(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 600
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not _is(node, "triton.jit"):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 80, f"{node.name} is too long"
            parameters = len(node.args.args) + len(node.args.kwonlyargs)
            assert parameters <= 10 or _is(node, "app.command"), f"{node.name} has too many parameters"


def _is(function: ast.FunctionDef | ast.AsyncFunctionDef, decorator: str) -> bool:
    return any(ast.unparse(found).startswith(decorator) for found in function.decorator_list)
