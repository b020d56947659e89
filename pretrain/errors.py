"""The errors a user can cause. Each message names the file, key or value and says what to do."""


class UserError(Exception):
    """Something the user can mend. The command line prints it without a traceback and exits with 2."""


class ConfigError(UserError):
    """A configuration that cannot run: all its problems at once, each with its path and what would be right."""


class CheckpointError(UserError):
    """A checkpoint that cannot be written, found, verified or loaded."""
