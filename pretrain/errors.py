"""The errors a user can cause. Each message names the file, key or value and says what to do."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path


class UserError(Exception):
    """Something the user can mend. The command line prints it without a traceback and exits with 2."""


class ConfigError(UserError):
    """A configuration that cannot run: all its problems at once, each with its path and what would be right."""


class TransientError(UserError):
    """What another attempt may find gone: a full disk, a service that did not answer."""


PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
"""What a storage refuses with, and may take back."""


def may_pass(error: BaseException) -> bool:
    """Whether another attempt may find it gone."""
    return isinstance(error, TransientError) or (isinstance(error, OSError) and error.errno in PASSING)


def of_storage(error: OSError, message: str) -> UserError:
    """What to raise for something that a storage refused."""
    return TransientError(message) if may_pass(error) else UserError(message)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within it, what the storage refuses is told with the file's name: the system's own message often has none."""
    try:
        yield
    except OSError as error:
        what = error.strerror or str(error) or type(error).__name__
        raise of_storage(
            error, f"{path}: {what}; make room there or mend it, then the same command goes on"
        ) from error


class CheckpointError(UserError):
    """A checkpoint that cannot be written, found, verified or loaded."""


class NoRoomError(CheckpointError, TransientError):
    """A save that failed for what may pass: its storage was full, or away."""
