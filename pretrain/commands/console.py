"""Where commands print: a terminal's width where there is one, and whole lines where the output goes elsewhere."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from rich.console import Console

WIDE = 10_000
"""Columns of output that no terminal shows: nothing in it is wrapped or left out."""


def plain_console(file: TextIO | None = None, **options: Any) -> Console:
    """A console that shows text as it is: brackets and colons in names and reasons are no markup.

    In a pipe or a file no line is wrapped and no cell of a table is shortened.
    """
    stream = file or sys.stdout
    width = None if stream.isatty() else WIDE
    settings: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False, "width": width}
    return Console(file=file, **{**settings, **options})
