"""Joining a hub: from a URL and a token to a folder that a node can be started in.

The token carries the fingerprint of the hub's authority. The authorities are asked for over a connection that verifies nothing,
one of them must have that fingerprint, and the token itself travels only over a connection that this one vouches for.
"""

from __future__ import annotations

import json
import ssl
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding

from sync.clock import SystemClock
from sync.credentials import (
    PENDING,
    Identity,
    forget_pending_key,
    pending_key,
    request,
    trusting,
    write_pair,
)
from sync.durable import write_whole
from sync.enrol_messages import MAX_ANSWER_BYTES, Enrol, Enrolled, read_token
from sync.errors import BadSignature, InvalidConfig, StoreFailed, SyncError
from sync.hub_call import HubRefused, call
from sync.identity import LOOPBACK, Membership
from sync.messages import decode
from sync.renewal import Renewal

CONFIG = "node.toml"
KEY_USED = 409
"""What the hub answers when the key, not the token, is the trouble."""
_NAMES = ("root.json", "keyring.json")
"""What the pinned file may be called: a hub does not choose where on this machine it writes."""


@dataclass(frozen=True, slots=True)
class Joined:
    """`config`: the file to start the node with. `ahead`: seconds by which this machine's clock is ahead of the hub's."""

    node: str
    config: Path
    enrolled: Enrolled
    ahead: float = 0.0


class _Authorities(msgspec.Struct, frozen=True):
    bundle: str


def join_hub(
    url: str,
    token: str,
    folder: Path,
    *,
    tier: str,
    hardware: str | None = None,
    proxy: str | None = None,
    top: Mapping[str, str] | None = None,
) -> Joined:
    """Enrol this machine and write `folder`: identity/, the pinned trust and node.toml, never over existing ones.

    node.toml is written last. Until then the same call, with the same token, finishes what was begun.
    `tier`: what the token must be for. `top`: further text settings of node.toml. Blocking.
    Raises Malformed, BadSignature (another hub than the token is of), HubRefused, Unavailable, InvalidConfig, StoreFailed.
    """
    url = url.rstrip("/")
    _check_url(url)
    asked = read_token(token)
    identity = folder / "identity"
    begun = (identity / PENDING).exists()
    if (folder / CONFIG).exists() or ((identity / "live").exists() and not begun):
        raise InvalidConfig(f"{folder}: there is a node already; use another folder, or take that one out first")
    context = _vouched(url, asked.pin, proxy)

    def ask() -> tuple[EllipticCurvePrivateKey, Enrolled]:
        # On the disk before the token is used: a machine that cannot write must not use it up, and the hub takes the token
        # again from the same key.
        key = pending_key(identity)
        body = Enrol(token=token.strip(), csr=request(key), hardware=hardware)
        return key, decode(call(f"{url}/api/v1/enrol", body, context, proxy), Enrolled, MAX_ANSWER_BYTES)

    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        key, answer = ask()
    except HubRefused as error:
        if error.status != KEY_USED or not begun:
            raise
        # It was enrolled by a token before this one, and revoked since.
        forget_pending_key(identity)
        key, answer = ask()
    ahead = SystemClock().wall() - answer.time if answer.time else 0.0
    if answer.trust_name not in _NAMES:
        raise BadSignature(f"the hub wants a file {answer.trust_name[:40]!r} pinned")
    write_pair(identity, key, answer.certificate, answer.bundle, answer.sources)
    config = folder / CONFIG
    try:
        write_whole(folder / answer.trust_name, answer.trust)
        write_whole(config, _config(url, answer, proxy, top or {}).encode())
    except OSError as error:
        raise StoreFailed(f"could not write {folder}: {error}; join again, with the same token") from error
    forget_pending_key(identity)
    if answer.tier != tier:
        raise InvalidConfig(
            f"the token is for tier {answer.tier}: start it with 'tierline {_command(answer.tier)} {config}'"
        )
    return Joined(answer.node, config, answer, ahead)


def leave_hub(membership: Membership) -> str:
    """Take a node out of service: the hub forgets it, then its keys are deleted here. Blocking; returns what was done.

    The keys go even when the hub is out of reach, and then the answer says so.
    """
    if membership.identity is None:
        raise InvalidConfig("node.identity: this node has a token; revoke it at the hub")
    identity = Identity(membership.identity)
    told = "the hub has forgotten this node"
    if membership.hub is None:
        told = "no hub is configured: decommission the node there too"
    else:
        try:
            Renewal(identity, membership.hub, SystemClock(), proxy=membership.proxy_to(membership.hub)).leave()
        except (SyncError, OSError) as error:
            told = f"the hub was not told ({error}): decommission the node there too"
    identity.forget()
    return f"{told}; its keys are deleted"


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    local = parts.scheme == "http" and parts.hostname in LOOPBACK
    if not (parts.scheme == "https" and parts.hostname) and not local:
        raise InvalidConfig(f"{url!r} is not https://host:port of a hub")


def _vouched(url: str, pin: str, proxy: str | None) -> ssl.SSLContext | None:
    """A context that trusts the authority with the fingerprint `pin` alone. Raises BadSignature when it is not shown."""
    blind = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    blind.check_hostname = False
    blind.verify_mode = ssl.CERT_NONE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # unverified, and nothing but a fingerprint is made of it
        answer = call(f"{url}/api/v1/ca", None, blind, proxy)
    shown = decode(answer, _Authorities, MAX_ANSWER_BYTES).bundle
    with suppress(ValueError):
        for cert in x509.load_pem_x509_certificates(shown.encode()):
            if cert.fingerprint(SHA256()).hex() == pin:
                return trusting(cert.public_bytes(Encoding.PEM).decode())()
    raise BadSignature(f"{url} is not the hub that the token is of: its authority has another fingerprint")


def _config(url: str, answer: Enrolled, proxy: str | None, top: Mapping[str, str]) -> str:
    lines = [f"{name} = {_quoted(value)}" for name, value in top.items()]
    lines += [
        "[node]",
        f"id = {_quoted(answer.node)}",
        f"tier = {_quoted(answer.tier)}",
        f"hub = {_quoted(url)}",
        f"broker = {_quoted(answer.brokers[0] if answer.brokers else _broker_beside(url))}",
        f"sources = {_quoted(list(answer.sources) or [url])}",
        f"{answer.trust_name.partition('.')[0]} = {_quoted(answer.trust_name)}",
        'identity = "identity"',
        'data = "data"',
        f"groups = {_quoted(list(answer.groups))}",
        f"fleet = {answer.fleet}",
    ]
    if proxy is not None:
        lines.append(f"proxy = {_quoted(proxy)}")
    if answer.labels:
        lines += [
            "[node.labels]",
            *(f"{_quoted(name)} = {_quoted(value)}" for name, value in answer.labels.items()),
        ]
    return "\n".join(lines) + "\n"


def _quoted(value: str | list[str]) -> str:
    """A TOML string, or a list of them. TOML takes neither DEL nor the surrogates that JSON writes beyond 16 bits."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _broker_beside(url: str) -> str:
    """Where the broker is when the hub does not say: on the hub's machine, at its usual port."""
    host = urlsplit(url).hostname or ""
    return f"mqtts://[{host}]:8883" if ":" in host else f"mqtts://{host}:8883"


def _command(tier: str) -> str:
    return "worker" if tier == "cloud" else tier
