"""Who may call what: one admin token, one weaker token per node, everything denied unless a role is named here.

Tokens are 256 random bits, so a plain sha256 is enough to store them: there is no dictionary to try, which is all that a
slow password hash would slow down.
"""

from __future__ import annotations

import base64
import secrets
from dataclasses import dataclass
from enum import StrEnum
from hashlib import pbkdf2_hmac, sha256
from hmac import compare_digest
from pathlib import Path

from cloud_hub.node_tokens import claimed_node, is_genuine, looks_like_one
from cloud_hub.storage import Storage
from sync.clock import Clock, SystemClock
from sync.durable import write_whole

MAX_TOKEN_CHARS = 200
"""Ours have 47; a longer one is not hashed. Those that nodes sign themselves have their own bound."""


class Role(StrEnum):
    ADMIN = "admin"
    NODE = "node"


IDENTITY_PATHS = frozenset(
    {f"/api/v1/{name}" for name in ("ca", "enrol", "renew/challenge", "renew", "leave")},
)
"""What a node asks before it has a credential, or after it expired: the body carries a token or a proof of its own."""
OPEN_PATHS = frozenset({"/healthz", "/readyz", "/docs", "/openapi.json"}) | IDENTITY_PATHS
"""What answers without a token: also health, and the description of the API, which says nothing about this hub."""
NODE_PATHS = ("/blobs/", "/tuf/", "/deltas/")
"""What a node's token reaches. Everything else is for the admin, unknown paths included."""


@dataclass(frozen=True, slots=True)
class Principal:
    """Who sent a request. `name`: the node id, or `admin`."""

    role: Role
    name: str


def roles_for(path: str) -> frozenset[Role]:
    """Roles that reach a path; none = open to everybody."""
    if path in OPEN_PATHS:
        return frozenset()
    if path.startswith(NODE_PATHS):
        return frozenset({Role.ADMIN, Role.NODE})
    return frozenset({Role.ADMIN})


class Tokens:
    """Recognises tokens. Synchronous; reads the database for everybody but the admin."""

    def __init__(self, storage: Storage, admin_hash: str, clock: Clock | None = None) -> None:
        self._storage = storage
        self._admin_hash = admin_hash
        self._clock = clock or SystemClock()

    def recognise(self, token: str) -> Principal | None:
        """Whose token it is, or None."""
        if looks_like_one(token):
            return self._signed(token)
        if len(token) > MAX_TOKEN_CHARS:
            return None
        digest = hash_token(token)
        if compare_digest(digest, self._admin_hash):
            return Principal(Role.ADMIN, "admin")
        with self._storage.read() as records:
            found = records.node_by_token(digest)
        if found is not None and compare_digest(digest, found[1]):
            return Principal(Role.NODE, found[0])
        return None

    def _signed(self, token: str) -> Principal | None:
        """A node that signed for itself. Its keys are read at every call: a revoked one is refused from then on."""
        node_id = claimed_node(token)
        if node_id is None:
            return None
        with self._storage.read() as records:
            keys = [known.public_key for known in records.identities.current(node_id)]
        return Principal(Role.NODE, node_id) if is_genuine(token, keys, self._clock.wall()) else None


def new_token(prefix: str) -> str:
    """`prefix` lets a secret scanner, and a person, tell what kind of secret lies there."""
    return f"{prefix}_{secrets.token_urlsafe(32)}"


def hash_token(token: str) -> str:
    return sha256(token.encode()).hexdigest()


def admin_token_path(data: Path) -> Path:
    return data / "admin.token"


def open_tokens(storage: Storage, data: Path, clock: Clock | None = None) -> tuple[Tokens, bool]:
    """The tokens, and whether the admin's was made just now.

    It is written, in a file of mode 0600, before its hash is stored: a crash in between makes another one at the next start.
    """
    with storage.read() as records:
        known = records.credential(Role.ADMIN)
    if known is not None:
        return Tokens(storage, known, clock), False
    token = new_token("tla")
    write_whole(admin_token_path(data), token.encode() + b"\n", mode=0o600)
    with storage.write() as records:
        records.set_credential(Role.ADMIN, hash_token(token))
    return Tokens(storage, hash_token(token), clock), True


def broker_hash(password: str) -> str:
    """A password as mosquitto's password file holds it: `$7$iterations$salt$hash`, PBKDF2 with SHA-512.

    So a node's one token opens the broker too, without the hub or the broker keeping it. 101 iterations are mosquitto's own
    default; for 256 random bits their number does not matter.
    """
    salt = secrets.token_bytes(12)
    digest = pbkdf2_hmac("sha512", password.encode(), salt, 101)
    return f"$7$101${base64.b64encode(salt).decode()}${base64.b64encode(digest).decode()}"
