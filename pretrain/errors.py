"""The errors a user can cause. Each message names the file, key or value and says what to do."""

from __future__ import annotations

import errno


class UserError(Exception):
    """Something the user can mend. The command line prints it without a traceback and exits with 2."""


class ConfigError(UserError):
    """A configuration that cannot run: all its problems at once, each with its path and what would be right."""


class TransientError(UserError):
    """What another attempt may find gone: a full disk, a service that did not answer."""


PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
"""What a storage refuses with, and may take back."""


def may_pass(error: Exception) -> bool:
    """Whether another attempt may find it gone."""
    return isinstance(error, TransientError) or (isinstance(error, OSError) and error.errno in PASSING)


def of_storage(error: OSError, message: str) -> UserError:
    """What to raise for something that a storage refused."""
    return TransientError(message) if may_pass(error) else UserError(message)


class CheckpointError(UserError):
    """A checkpoint that cannot be written, found, verified or loaded."""
