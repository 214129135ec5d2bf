"""What a node and a hub say to each other about certificates. Pure: types, tokens, and the bytes a proof is made over.

A proof of possession is a signature by the key the hub knows, over a nonce of the hub's and the request it goes with. It does
not depend on any certificate being valid: a node that comes back after a year renews like any other.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import sha256

import msgspec

from sync.errors import Malformed

MAX_ANSWER_BYTES = 256 * 1024
"""Longest answer a node reads: a few certificates and the metadata it pins."""

_TOKEN = re.compile(r"tle1\.([A-Za-z0-9_-]{43})\.([0-9a-f]{64})")


class Enrol(msgspec.Struct, frozen=True):
    """`token`: as the operator got it. `csr`: PEM. `hardware`: the machine's serial number, when the token is bound to one."""

    token: str
    csr: str
    hardware: str | None = None


class Challenge(msgspec.Struct, frozen=True):
    node: str


class Nonce(msgspec.Struct, frozen=True):
    nonce: str


class Renew(msgspec.Struct, frozen=True):
    """`proof`: base64url signature by the present key over `proof_bytes("renew", ...)`. `csr`: with the next key."""

    node: str
    nonce: str
    csr: str
    proof: bytes


class Leave(msgspec.Struct, frozen=True):
    """A node that is taken out of service asks to be forgotten."""

    node: str
    nonce: str
    proof: bytes


class Enrolled(msgspec.Struct, frozen=True, kw_only=True):
    """`certificate`: PEM chain, leaf first. `bundle`: PEM of the authorities to trust. `trust`: the file to pin, named
    `trust_name`. `brokers`, `sources`: where to go, best first. `fleet`: number of nodes. `time`: the hub's clock, Unix
    seconds."""

    node: str
    tier: str
    certificate: str
    bundle: str
    trust: bytes
    trust_name: str
    labels: dict[str, str] = {}
    groups: tuple[str, ...] = ()
    brokers: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    fleet: int = 1
    time: float = 0.0


@dataclass(frozen=True, slots=True)
class Token:
    """`secret`: what the hub stores a hash of. `pin`: sha256, hexadecimal, of the authority's certificate."""

    secret: str
    pin: str

    def __str__(self) -> str:
        return f"tle1.{self.secret}.{self.pin}"


def read_token(text: str) -> Token:
    """Raises Malformed, without repeating the text."""
    found = _TOKEN.fullmatch(text.strip())
    if found is None:
        raise Malformed("token: not one of 'tierline hub enrol': it begins with 'tle1.' and has three parts")
    return Token(found[1], found[2])


def proof_bytes(purpose: str, node: str, nonce: str, body: str = "") -> bytes:
    """What a proof signs. `body`: the request's further content, so that the proof is good for nothing else."""
    return b"\0".join(
        (b"tierline proof 1", purpose.encode(), node.encode(), nonce.encode(), sha256(body.encode()).digest())
    )
