"""The two ways in which a command ends badly, with their exit codes."""

import errno


class UserError(Exception):
    """The user's input is wrong: a configuration, path, option, data set or checkpoint. Exit code 2."""

    exit_code = 2


class RunError(Exception):
    """It failed while running: a non-finite likelihood, a full disk. Exit code 1."""

    exit_code = 1


def is_disk_full(error: BaseException) -> bool:
    """Whether an error is about space on the disk, which is not the user's input (exit 1)."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
