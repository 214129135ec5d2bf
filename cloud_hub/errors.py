"""What the management API adds to the error tree of `models.errors`: two answers that inference never gives."""

from __future__ import annotations

from models.errors import CallerError


class Forbidden(CallerError):
    """A good credential whose role does not reach this route."""

    http = 403
    grpc = "PERMISSION_DENIED"


class Conflict(CallerError):
    """It contradicts what is already there: an immutable version, a name taken, two deployments for one model name."""

    http = 409
    grpc = "ALREADY_EXISTS"
