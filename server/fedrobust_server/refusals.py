"""Why a call is not answered: each reason has its gRPC status."""

from __future__ import annotations

from typing import ClassVar

import grpc


class RefusedError(Exception):
    """A call that is refused; its text is for the caller.

    Attributes:
        code: the gRPC status that says so.
    """

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.FAILED_PRECONDITION


class UnknownError(RefusedError):
    """No such session (any more): enrol, then call again."""


class UnauthenticatedError(RefusedError):
    """The caller has not shown who it is."""

    code = grpc.StatusCode.UNAUTHENTICATED


class ForbiddenError(RefusedError):
    """The caller is known, and may not."""

    code = grpc.StatusCode.PERMISSION_DENIED


class ExhaustedError(RefusedError):
    """A limit is reached; later it may go."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class StalledError(RefusedError):
    """The caller keeps a call open without sending what it should."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class MalformedError(RefusedError):
    """The call's message is missing, or none of ours."""

    code = grpc.StatusCode.INVALID_ARGUMENT
