"""The one error that a user's mistake raises. It says what came, what was wanted and what to do, in one
line."""


class ConfigError(ValueError):
    """A wrong setting, file or folder. The command line prints it in one line and exits with 2."""
