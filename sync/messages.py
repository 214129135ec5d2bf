"""Everything that travels on the control plane, as types. Pure.

A **document** is a signed, versioned statement of the hub. On the wire it is an envelope: the exact bytes that were
signed, in base64, and the signatures over those bytes. It is verified once, over the bytes received, never over a
re-serialised form (`sync.trust`). Everything else here is unsigned: a hint or a report, trusted for nothing.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from sync.errors import Malformed

MAX_MESSAGE_BYTES = 64 * 1024
"""Largest MQTT payload. Hosted brokers accept 64-128 KiB."""
MAX_SIGNATURES = 8

T = TypeVar("T")


class Document(msgspec.Struct, frozen=True):
    """The signed payload. Unknown fields are ignored, as in every message: the other side may be of another release.

    `kind`: desired, policy, settings or software. `scope`: `node:<id>`, `tenant:<name>` or `group:<tenant>.<name>`.
    `revision`: monotone per (kind, scope). `issued`, `expires`: Unix seconds, `expires` None = does not expire.
    `digests`: every file that `body` names. `body`: JSON that only the activator reads, kept as raw bytes.
    """

    kind: str
    scope: str
    revision: int
    issued: float
    digests: tuple[str, ...]
    body: msgspec.Raw
    expires: float | None = None


class Signature(msgspec.Struct, frozen=True):
    """`kid` names a pinned key; `sig` is its Ed25519 signature (64 bytes, base64 on the wire) over the payload bytes."""

    kid: str
    sig: bytes


class Envelope(msgspec.Struct, frozen=True):
    """`payload`: the exact bytes of a Document as JSON (base64 on the wire)."""

    payload: bytes
    sigs: tuple[Signature, ...]


class DocumentReport(msgspec.Struct, frozen=True, kw_only=True):
    """How far a node has got with one document.

    `state`: a state of `sync.states.STATES`. `revision`: the newest revision seen; `applied`: the one in force, 0 = none.
    `digest`: of the applied payload. `error`: why the newest is not in force, `code: text`. `at`: Unix seconds of the last
    change of state. `detail`: what it waits for, or what its verdict rests on. `attempts`: that failed so far.
    """

    revision: int
    applied: int
    state: str
    digest: str = ""
    error: str | None = None
    at: float = 0.0
    detail: str | None = None
    attempts: int = 0


class Reported(msgspec.Struct, frozen=True, kw_only=True):
    """What a node runs. Retained, so the hub sees it again after its own restart.

    `documents`: kind -> report. `running`: model name -> `package/version`. `seq`: monotone within one `boot`.
    `alarms`: name -> what is wrong, while it is.
    """

    v: int = 1
    boot: str
    seq: int
    documents: dict[str, DocumentReport]
    running: dict[str, str] = {}
    refused: dict[str, int] = {}
    alarms: dict[str, str] = {}


class State(msgspec.Struct, frozen=True, kw_only=True):
    """Birth, death and will of a node. `state`: init, ready, disconnected, sleeping, lost or alert."""

    v: int = 1
    state: str
    boot: str = ""
    at: float = 0.0


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What a node is and can do. `engines`: names of usable engines. `url`: where its data plane answers, if anywhere."""

    v: int = 1
    tier: str
    engines: tuple[str, ...] = ()
    labels: dict[str, str] = {}
    software: str = ""
    url: str | None = None


class HubState(msgspec.Struct, frozen=True, kw_only=True):
    """`epoch` changes at every start of the hub. `fleet`: number of nodes, which scales their jitter; 0 = not said."""

    v: int = 1
    state: str
    epoch: str = ""
    fleet: int = 0


def decode(data: bytes, into: type[T], limit: int = MAX_MESSAGE_BYTES) -> T:
    """Decode JSON into a type of this module. Raises Malformed naming the field; `limit` in bytes."""
    if len(data) > limit:
        raise Malformed(f"{into.__name__}: {len(data)} bytes, at most {limit} are accepted")
    try:
        return msgspec.json.decode(data, type=into)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Malformed(f"{into.__name__}: {error}") from error


def encode(message: msgspec.Struct) -> bytes:
    return msgspec.json.encode(message)
