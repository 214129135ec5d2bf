"""Every error of the control plane, split by who must act. A refusal always carries a stable `code` for counting."""

from __future__ import annotations


class SyncError(Exception):
    """Base of the tree. `code` is a short stable word, used in reports and counters."""

    code = "error"


# --- the sender must act: retrying the same bytes will not help ----------------------------------------------------


class Refused(SyncError):
    """Something received was not accepted; nothing was changed by it."""

    code = "refused"


class Malformed(Refused):
    """It does not decode, or is over a limit; the message names the field."""

    code = "malformed"


class BadSignature(Refused):
    """No signature by a pinned key that may sign this kind."""

    code = "bad_signature"


class WrongScope(Refused):
    """A good signature on a document meant for another kind, node or tenant."""

    code = "wrong_scope"


class Expired(Refused):
    """The document is no longer, or not yet, valid."""

    code = "expired"


class Replayed(Refused):
    """The revision is below the stored floor."""

    code = "replayed"


class NotListed(Refused):
    """A digest that the signed list of approved files does not have."""

    code = "not_listed"


class DigestMismatch(Refused):
    """The bytes fetched are not the bytes that were signed for."""

    code = "digest_mismatch"


class Rejected(Refused):
    """The activator would not plan or prepare the document: the reason is its own."""

    code = "rejected"


# --- time must pass: the network or a peer is at fault -------------------------------------------------------------


class Unavailable(SyncError):
    """A peer did not answer, or answered with a fault of its own; to be tried again with jitter."""

    code = "unavailable"


class Absent(Unavailable):
    """A source answered that it has no such file."""

    code = "absent"


# --- we must act ---------------------------------------------------------------------------------------------------


class StoreFailed(SyncError):
    """The disk refused: full, read-only or gone."""

    code = "store_failed"


class InvalidConfig(SyncError):
    """A configuration that cannot be used; the message names the field."""

    code = "invalid_config"
