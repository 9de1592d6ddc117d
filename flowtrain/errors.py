"""The two ways in which a command ends badly, with their exit codes."""


class UserError(Exception):
    """The user's input is wrong: a configuration, path, option, data set or checkpoint. Exit code 2."""

    exit_code = 2


class RunError(Exception):
    """It failed while running: a non-finite likelihood, a full disk. Exit code 1."""

    exit_code = 1
