"""gRPC's status codes, and what code an error becomes."""

from __future__ import annotations

import logging
from enum import IntEnum
from errno import EDQUOT, ENOSPC

from hpmapper.errors import (
    AlreadyExists,
    Corrupt,
    FailedPrecondition,
    HpmapperError,
    InvalidArgument,
    NoSpace,
    NotFound,
    Unsupported,
)

log = logging.getLogger(__name__)


class Code(IntEnum):
    """gRPC's status codes (grpc.github.io/grpc/core/md_doc_statuscodes.html), as far as they are used."""

    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    UNIMPLEMENTED = 12
    INTERNAL = 13
    DATA_LOSS = 15


CODES: dict[type[HpmapperError], Code] = {
    NotFound: Code.NOT_FOUND,
    AlreadyExists: Code.ALREADY_EXISTS,
    InvalidArgument: Code.INVALID_ARGUMENT,
    FailedPrecondition: Code.FAILED_PRECONDITION,
    Unsupported: Code.UNIMPLEMENTED,
    NoSpace: Code.RESOURCE_EXHAUSTED,
    Corrupt: Code.DATA_LOSS,
}
"""containerd's own client turns these into its errors (errdefs/pkg/errgrpc)."""


def code_of(error: Exception) -> Code:
    """The code of an error that a method raised; a bug's is INTERNAL."""
    if isinstance(error, HpmapperError):
        return CODES.get(type(error), Code.UNKNOWN)
    return Code.INTERNAL


class Failure(Exception):
    """A call's end without an answer. `http`: it was no gRPC at all."""

    def __init__(self, code: Code, message: str, *, http: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.http = http

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """What an error that a method raised is for the client; a bug is logged."""
        if isinstance(error, Failure):
            return error
        if isinstance(error, HpmapperError):
            return cls(code_of(error), str(error))
        if isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT):
            return cls(Code.RESOURCE_EXHAUSTED, f"no space left: {error} (hpmapper pool grow, or remove something)")
        log.error("a call failed", exc_info=error)
        return cls(Code.INTERNAL, f"{type(error).__name__}: {error} (a bug in hpmapper; its log has the details)")
