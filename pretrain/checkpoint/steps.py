"""The step folders of a run: their names, which are whole, which are removed."""

from __future__ import annotations

import itertools
import json
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pretrain.checkpoint.manifest import (
    MANIFEST_NAME,
    META_NAME,
    Manifest,
    ManifestMissingError,
    check_checksums,
    check_sizes,
    fsync_folder,
    read_manifest,
)
from pretrain.errors import CheckpointError
from pretrain.typed import typed

logger = logging.getLogger(__name__)

STEP_PATTERN = re.compile(r"step_(\d{8,})")
PARTIAL_PATTERN = re.compile(r"step_\d{8,}\.(partial|attempt-\d+|removed)")
"""A step while it is being written, or what an interrupted save left: named after its writer. Or one that is being
removed: what has a step's own name was saved, whatever it has lost since."""


@dataclass(frozen=True)
class StepInfo:
    """What `checkpoint list` shows of one step folder.

    Attributes:
        step: optimizer steps done.
        path: the folder.
        bytes: of its files, as the manifest has them; of what is there without a readable manifest.
        written_at: time of the commit; None without a readable manifest.
        world_size: ranks that wrote it; None without a readable manifest.
        problem: what is wrong with it; None when it is whole.
        is_torn: its manifest is gone; `problem` says so.
    """

    step: int
    path: Path
    bytes: int
    written_at: datetime | None
    world_size: int | None
    problem: str | None
    is_torn: bool

    @property
    def is_damaged(self) -> bool:
        """Whether the step, which was whole when it got its name, is so no more."""
        return self.problem is not None


def step_name(step: int) -> str:
    """Folder name of a step."""
    return f"step_{step:08d}"


def rank_file_name(rank: int) -> str:
    """Name of the file with a rank's own blob."""
    return f"rank_{rank:05d}.bin"


def step_of(folder: Path) -> int:
    """The step that a folder's name says."""
    match = STEP_PATTERN.fullmatch(folder.name)
    assert match is not None, f"{folder} is no step folder"
    return int(match.group(1))


def is_step_folder(path: Path) -> bool:
    """Whether a path is a folder named as a step's, whole or not."""
    return STEP_PATTERN.fullmatch(path.name) is not None and path.is_dir()


def step_folders(folder: Path) -> list[Path]:
    """All step folders, newest first, whole or not."""
    if not folder.is_dir():
        return []
    return sorted(filter(is_step_folder, folder.iterdir()), key=step_of, reverse=True)


@contextmanager
def telling_how_to_restore(step: Path) -> Iterator[None]:
    """Within it a CheckpointError of the step folder that was asked for, and is damaged, says what to do."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}. Put the files back from a copy, or take another step: "
            f"`{typed('checkpoint', 'verify', step.parent.parent)}` says which are whole"
        ) from error


def verify_step(folder: Path, *, checksums: bool = True) -> Manifest:
    """Check a step folder in this process alone.

    Args:
        folder: a step folder.
        checksums: False compares presence and sizes only.

    Raises:
        CheckpointError: naming the files that are missing or altered; or the folder is named as another step.
    """
    manifest = read_manifest(folder)
    _check_contents(folder, manifest, checksums=checksums)
    return manifest


def _check_contents(folder: Path, manifest: Manifest, *, checksums: bool) -> None:
    match = STEP_PATTERN.fullmatch(folder.name)
    if match is not None and int(match.group(1)) != manifest.step:
        raise CheckpointError(
            f"{MANIFEST_NAME} is of step {manifest.step}, not of {folder.name}: the folder was renamed or copied"
        )
    check_sizes(folder, manifest)
    if checksums:
        check_checksums(folder, manifest.files)


def list_steps(folder: Path, *, checksums: bool = False) -> list[StepInfo]:
    """All steps of a checkpoint folder, oldest first, each with what is wrong with it.

    A run may save and remove steps meanwhile; those removed are left out.
    """
    infos = (step_info(path, checksums=checksums) for path in reversed(step_folders(folder)))
    return [info for info in infos if info is not None]


def step_info(path: Path, *, checksums: bool = False) -> StepInfo | None:
    """What there is to know of one step folder; None when it is not there any more."""
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return _info_without_manifest(path, error)
    problem = None
    try:
        _check_contents(path, manifest, checksums=checksums)
    except CheckpointError as error:
        try:
            read_manifest(path)
        except ManifestMissingError as missing:  # the run is removing the step, the manifest first
            return _info_without_manifest(path, missing)
        problem = str(error)
    when = datetime.fromtimestamp(manifest.written_at, UTC)
    return StepInfo(
        step_of(path), path, manifest.total_bytes, when, manifest.world_size, problem, is_torn=False
    )


def _info_without_manifest(path: Path, error: CheckpointError) -> StepInfo | None:
    present = 0
    try:
        for file in path.iterdir():
            with suppress(FileNotFoundError):  # renamed or removed by the run meanwhile
                present += file.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return None
    is_torn = isinstance(error, ManifestMissingError)
    return StepInfo(step_of(path), path, present, None, None, str(error), is_torn)


def newest_whole(folder: Path) -> Path | None:
    """The newest step whose manifest and sizes are right; checksums are not read."""
    return next((path for path in step_folders(folder) if _has_right_sizes(path)), None)


def read_meta(path: Path) -> dict[str, Any]:
    """The meta of a step folder.

    Raises:
        CheckpointError: the file is missing or not a JSON object.
    """
    file = Path(path) / META_NAME
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    except RecursionError:
        raise CheckpointError(f"{file} cannot be read: its JSON is nested too deep") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} cannot be read: it holds no object")
    return found


def remove_unfinished(folder: Path) -> None:
    """Remove what interrupted saves and interrupted removals left. Nothing that has a step's name is touched."""
    for path in folder.iterdir():
        if PARTIAL_PATTERN.fullmatch(path.name) and path.is_dir():
            logger.warning("removing %s: its save was interrupted", path)
            shutil.rmtree(path)


def remove_step(folder: Path) -> None:
    """Remove a step that no rule keeps; interrupted half-way, it has its name no more."""
    going = folder.with_name(f"{folder.name}.removed")
    shutil.rmtree(going, ignore_errors=True)
    folder.rename(going)
    fsync_folder(folder.parent)
    shutil.rmtree(going)


def move_aside(folder: Path) -> Path:
    """Give a step's folder another name, and return that: what is in it was saved once, and may be mended."""
    taken = (folder.with_name(f"{folder.name}.aside-{number}") for number in itertools.count(1))
    aside = next(path for path in taken if not path.exists())
    folder.rename(aside)
    fsync_folder(folder.parent)
    return aside


def retire_steps(
    folder: Path, written: int, keep_last: int, keep_every_steps: int | None, *, ignore: set[int]
) -> None:
    """Remove whole steps that no rule keeps, after a save.

    Damaged steps stay, for their owner to look at, and so do steps beyond the one written: they are of
    another course of the run, which was resumed before them. A folder that cannot be removed is reported and
    left, since the save that led here has succeeded.

    Args:
        folder: the checkpoint folder.
        written: the step that was just committed.
        keep_last: how many of the newest whole steps up to `written` stay.
        keep_every_steps: steps divisible by this stay; None for no such rule.
        ignore: steps known to be damaged though their sizes are right.
    """
    try:
        candidates = [path for path in step_folders(folder) if step_of(path) <= written]
        whole = [path for path in candidates if step_of(path) not in ignore and _has_right_sizes(path)]
        for path in whole[keep_last:]:
            if keep_every_steps is None or step_of(path) % keep_every_steps:
                remove_step(path)
    except OSError as error:
        logger.warning("an old checkpoint in %s could not be removed: %s", folder, error)


def _has_right_sizes(path: Path) -> bool:
    try:
        verify_step(path, checksums=False)
    except CheckpointError:
        return False
    return True
