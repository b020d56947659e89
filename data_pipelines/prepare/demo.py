"""A text corpus that every machine has: the sources of the running Python's standard library."""

from __future__ import annotations

import math
import sysconfig
from pathlib import Path

from data_pipelines.errors import DataError
from data_pipelines.prepare.text import BuildOptions, Built, Progress, build_from_files
from data_pipelines.raw.files import find_files
from data_pipelines.typed import typed

# Installed packages, and folders of generated tables that are no text to learn from.
SKIPPED = {"site-packages", "dist-packages", "__pycache__", "encodings", "lib2to3", "idlelib"}


def library_files(megabytes: float) -> list[Path]:
    """Python files of the standard library in the order of their names, tests last, up to `megabytes`.

    Raises:
        DataError: this Python has no sources on disk.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    found = [p for p in find_files(folder) if p.suffix == ".py"]
    kept = [p for p in found if not SKIPPED & set(p.relative_to(folder).parts[:-1])]
    kept.sort(key=lambda p: _is_test(p.relative_to(folder)))  # stable: the order of names stays within each
    files: list[Path] = []
    size = 0
    for path in kept:
        size += path.stat().st_size
        if files and size > megabytes * 1e6:
            break
        files.append(path)
    if not files:
        raise DataError(
            f"{folder}: no Python sources here; build a dataset of your own text: "
            f"`{typed('data', 'build', '--help')}`."
        )
    return files


def _is_test(path: Path) -> bool:
    return any(part in ("test", "tests") for part in path.parts)


def build_demo(
    out: Path | str, options: BuildOptions, megabytes: float, progress: Progress | None = None
) -> Built:
    """Build the demo dataset. The same Python gives the same bytes.

    Raises:
        DataError: as `build`; or the size is not positive.
    """
    if not math.isfinite(megabytes) or megabytes <= 0:
        raise DataError(f"--megabytes {megabytes}: it must be a positive number.")
    options.check()
    return build_from_files(library_files(megabytes), out, options, progress)
