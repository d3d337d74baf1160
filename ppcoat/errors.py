"""The error for a user's mistake. Its message says in one line what came, what was wanted and what to do."""


class ConfigError(ValueError):
    """A wrong setting, file or folder. The command line prints it in one line and exits with 2."""
