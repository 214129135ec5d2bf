"""Every error of the data plane, split by who must act, each with one HTTP and one gRPC code.

A frontend translates by reading `http` and `grpc` off the error it caught; nothing else decides a status.
Foreign exceptions (an engine's, a socket's) are translated once, where they are caught.
"""

from __future__ import annotations


class TierlineError(Exception):
    """Base of the tree. `http` is a status code, `grpc` the name of a canonical gRPC code."""

    http = 500
    grpc = "INTERNAL"


# --- the caller must act -------------------------------------------------------------------------------------------


class CallerError(TierlineError):
    """The request cannot be served as it was sent; sending it again unchanged will not help."""

    http = 400
    grpc = "INVALID_ARGUMENT"


class InvalidRequest(CallerError):
    """Malformed or contradictory request; the message names the field."""


class Unauthenticated(CallerError):
    """No credential, or one that does not verify."""

    http = 401
    grpc = "UNAUTHENTICATED"


class Forbidden(CallerError):
    """The caller is known and may not do this."""

    http = 403
    grpc = "PERMISSION_DENIED"


class NotFound(CallerError):
    """No such model, version, route or blob; also what a caller may not know of."""

    http = 404
    grpc = "NOT_FOUND"


class MethodNotAllowed(CallerError):
    """The path exists, the method does not apply to it."""

    http = 405
    grpc = "UNIMPLEMENTED"


class Conflict(CallerError):
    """Well formed, but not in the present state: what it asks for is decided elsewhere, or has already happened."""

    http = 409
    grpc = "FAILED_PRECONDITION"


class TooLarge(CallerError):
    """A body, header or tensor above a named limit."""

    http = 413
    grpc = "INVALID_ARGUMENT"


class UnsupportedEncoding(CallerError):
    """A content type or content encoding this server does not speak."""

    http = 415
    grpc = "INVALID_ARGUMENT"


# --- time or load must pass ----------------------------------------------------------------------------------------


class TryAgain(TierlineError):
    """The request was good; this node could not answer it now.

    `transient`: what whoever activates a package or policy reads to tell this from a refusal.
    """

    transient = True

    http = 503
    grpc = "UNAVAILABLE"


class DeadlineExceeded(TryAgain):
    """No answer could be given within the request's deadline."""

    http = 504
    grpc = "DEADLINE_EXCEEDED"


class NotReady(TryAgain):
    """The model or the node is starting, loading or draining."""


class Unreachable(TryAgain):
    """The tier above did not answer: connection refused, reset or timed out."""


class Overloaded(TryAgain):
    """Admission refused the request; `retry_after` says in how many seconds to come back."""

    http = 429
    grpc = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


# --- the publisher of a package must act ---------------------------------------------------------------------------


class PackageError(TierlineError):
    """A package cannot be accepted or activated. HTTP 422 on the management API."""

    http = 422
    grpc = "FAILED_PRECONDITION"


class InvalidManifest(PackageError):
    """The manifest does not decode or contradicts itself; the message names the field."""


class InvalidPolicy(PackageError):
    """A routing policy does not decode or is out of range; the message names the field."""


class ContractBreach(PackageError):
    """The files do not do what the manifest promises: wrong shapes, golden outputs out of tolerance, crash in the probe."""


class NoUsableVariant(PackageError):
    """No variant of the package runs on this node's engines."""


# --- we must act ---------------------------------------------------------------------------------------------------


class EngineFailure(TierlineError):
    """The engine failed on a request that passed every check: our fault or the model's, never the caller's."""
