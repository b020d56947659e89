"""A folder that is whole or not there: written under another name, and renamed at the end."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

from data_pipelines.errors import DataError


def refuse_used(out: Path, force: bool) -> None:
    if out.name in ("", ".."):
        raise DataError(f"{out}: not the name of a new folder; choose another --out.")
    try:
        _restore_old(out)
        used = out.is_dir() and any(out.iterdir())
    except OSError as error:
        raise DataError(f"{out}: cannot be read ({error.strerror}); choose another --out.") from None
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: a file is in the way; choose another output folder.")
    if used:
        if not force:
            raise DataError(f"{out}: the folder is not empty. Use --force to replace it, or another --out.")
        if not any(out.glob("dataset.json")) and not any(out.glob("*/dataset.json")):
            raise DataError(f"{out}: not a dataset folder, so --force will not delete it; use another --out.")


def _prefix(out: Path, kind: str) -> str:
    """The name of a build's own folder, up to its process. With the host: the folder may be a shared one, and
    a process of another host cannot be seen from here."""
    return f".{out.name}.{kind}-{socket.gethostname()}-"


def make_partial(out: Path) -> tuple[list[Path], Path]:
    """Make the folder of the unfinished build, before any work so that a bad --out is known at once; also
    returns the folders of killed builds that were removed."""
    partial = out.with_name(f"{_prefix(out, 'part')}{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        removed = _remove_leftovers(out)
        partial.mkdir(parents=True)
    except OSError as error:
        raise DataError(
            f"{out}: the output folder cannot be made ({error.strerror}); choose another --out."
        ) from None
    return removed, partial


def _left_by_killed_builds(out: Path, kind: str) -> list[Path]:
    """Folders of one kind that builds of this host into `out` left when they were killed."""
    prefix = _prefix(out, kind)
    found = sorted(out.parent.glob(f".*.{kind}-*")) if out.parent.is_dir() else []
    processes = ((path, path.name.removeprefix(prefix)) for path in found if path.name.startswith(prefix))
    return [path for path, process in processes if process.isdigit() and not _is_running(int(process))]


def _restore_old(out: Path) -> None:
    """Put back the dataset that a build killed between the two renames of `publish` had moved away."""
    left = _left_by_killed_builds(out, "old")
    if left and not out.exists():
        left[-1].rename(out)


def _remove_leftovers(out: Path) -> list[Path]:
    """Remove what builds of this host into `out` left when they were killed; returns the folders."""
    left = _left_by_killed_builds(out, "part") + _left_by_killed_builds(out, "old")
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    return [path for path in left if not path.exists()]


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def publish(partial: Path, out: Path) -> None:
    """Give the finished folder its name; an old dataset is moved away first and then deleted."""
    for path in (*partial.rglob("*.json"), *partial.rglob("*.safetensors")):  # shards were synced when closed
        _sync(path)
    for path in (*(path for path in partial.rglob("*") if path.is_dir()), partial):
        _sync(path)
    old = out.with_name(f"{_prefix(out, 'old')}{os.getpid()}")
    if out.exists():
        out.rename(old)
    partial.rename(out)
    _sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    """Bring a file or a folder's list of names to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
