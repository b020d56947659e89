"""Commands as they are printed: each can be pasted into a shell and runs."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path


def typed(*words: str | Path, program: str = "triptych") -> str:
    """A command line; each word is one word to the shell."""
    return shlex.join([runnable(program), *map(str, words)])


def runnable(program: str) -> str:
    """The program as the user can type it: by name, or from this environment's folder."""
    return program if shutil.which(program) else str(Path(sys.executable).parent / program)
