"""The errors a user can cause. Each message names the file, key or value and says what to do."""


class UserError(Exception):
    """Something the user can mend. The command line prints it without a traceback and exits with 2."""


class ConfigError(UserError):
    """A configuration that cannot run: all its problems at once, each with its path and what would be right."""


class TransientError(UserError):
    """What another attempt may find gone: a full disk, a service that did not answer."""


class CheckpointError(UserError):
    """A checkpoint that cannot be written, found, verified or loaded."""
