"""The errors a user can mend, and the exit codes every command shares.

A user's mistake (or the world's: a full disk, a storage that is down) exits with 2 and three lines that say what is wrong,
where, and how to mend it. A bug exits with 1 and a traceback.
"""

from __future__ import annotations

import errno
import signal
import sys
from collections.abc import Callable

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """Something the user can mend.

    Args:
        what: what is wrong, one sentence.
        where: the file and line, field, or address; empty when `what` already says it.
        fix: what to do about it, one sentence.
    """

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what, self.where, self.fix = what, where, fix

    def __str__(self) -> str:
        lines = [f"error: {self.what}"]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  fix:   {self.fix}")
        return "\n".join(lines)


class DataError(UserError):
    """The rows, their encoding or their layout are not usable."""


class ModelError(UserError):
    """A model folder is absent, incomplete, of the wrong kind, or not the one it claims to be."""


class StorageError(UserError):
    """Object storage or the local disk refused: absent, down, denied, full."""


class ServiceError(UserError):
    """A service, a port, the Docker Engine or a cluster did not do what was asked."""


def first_line(error: Exception) -> str:
    """The start of a library's message, on one line, for a message of ours."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def explain_os_error(error: OSError) -> UserError | None:
    """The user's view of an operating-system error, or None where it is our bug."""
    where = str(error.filename or "")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(
            "the disk is full", where=where, fix="free some space, or choose another output folder, then run the step again"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StorageError(
            "no permission to read or write here", where=where, fix="check the owner and mode of the path, or choose another one"
        )
    if error.errno == errno.ENOENT:
        return UserError("no such file or folder", where=where, fix="check the path")
    if error.errno in (errno.ENOTDIR, errno.EISDIR):
        return UserError("a file stands where a folder is needed, or the other way round", where=where, fix="check the path")
    if error.errno == errno.EADDRINUSE:
        return ServiceError(
            f"the port is taken: {error.strerror}", where=where, fix="choose another port, or stop the program that listens there"
        )
    return None


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and exit with the code that its outcome deserves.

    SIGTERM interrupts like Ctrl-C, so that scratch folders are cleaned and children stopped.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main() or 0)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except OSError as error:
        explained = explain_os_error(error)
        if explained is None:
            raise
        print(explained, file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
