"""The errors a caller can act on.

Every error is one sentence in three parts: what failed and on which object, why, and — as `hint` — what to do
next. Front ends translate the class into their own code (an exit status here, a gRPC status elsewhere) in
one table each; nothing below a front end knows about either.
"""

from __future__ import annotations


class HpmapperError(Exception):
    """Something the user or the machine did, not a bug of ours: shown without a traceback."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class InvalidArgument(HpmapperError):
    """What was asked for makes no sense, whatever the state: a bad name, digest, option or file."""


class NotFound(HpmapperError):
    """The named object does not exist."""


class AlreadyExists(HpmapperError):
    """The name is taken."""


class FailedPrecondition(HpmapperError):
    """The request makes sense, but not in the present state: still in use, has children, wrong kind."""


class Unsupported(HpmapperError):
    """This host, kernel or file system cannot do it; the hint says what would."""


class NoSpace(HpmapperError):
    """The pool's free-space floor or the file system's end is reached."""


class Corrupt(HpmapperError):
    """Bytes are not what their digest, size or format says: hostile or damaged input, or a damaged pool."""
