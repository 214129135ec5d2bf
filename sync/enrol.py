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
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding

from sync.clock import SystemClock
from sync.credentials import Identity, new_key, request, trusting, write_pair
from sync.enrol_messages import MAX_ANSWER_BYTES, Enrol, Enrolled, read_token
from sync.errors import BadSignature, InvalidConfig, SyncError
from sync.hub_call import call
from sync.identity import LOOPBACK, Membership
from sync.messages import decode
from sync.renewal import Renewal

CONFIG = "node.toml"
_NAMES = ("root.json", "keyring.json")
"""What the pinned file may be called: a hub does not choose where on this machine it writes."""


@dataclass(frozen=True, slots=True)
class Joined:
    """`config`: the file to start the node with."""

    node: str
    config: Path
    enrolled: Enrolled


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

    `tier`: what the token must be for. `top`: further text settings of node.toml. Blocking.
    Raises Malformed, BadSignature (another hub than the token is of), HubRefused, Unavailable, InvalidConfig, StoreFailed.
    """
    url = url.rstrip("/")
    _check_url(url)
    asked = read_token(token)
    if (folder / CONFIG).exists() or (folder / "identity" / "live").exists():
        raise InvalidConfig(f"{folder}: there is a node already; use another folder, or take that one out first")
    context = _vouched(url, asked.pin, proxy)
    key = new_key()
    # Kept until the hub has answered: a machine that cannot write its key must not use up the token.
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    body = Enrol(token=token.strip(), csr=request(key), hardware=hardware)
    answer = decode(call(f"{url}/api/v1/enrol", body, context, proxy), Enrolled, MAX_ANSWER_BYTES)
    if answer.trust_name not in _NAMES:
        raise BadSignature(f"the hub wants a file {answer.trust_name[:40]!r} pinned")
    write_pair(folder / "identity", key, answer.certificate, answer.bundle)
    (folder / answer.trust_name).write_bytes(answer.trust)
    config = folder / CONFIG
    config.write_text(_config(url, answer, proxy, top or {}))
    if answer.tier != tier:
        raise InvalidConfig(
            f"the token is for tier {answer.tier}: start it with 'tierline {_command(answer.tier)} {config}'"
        )
    return Joined(answer.node, config, answer)


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
            Renewal(identity, membership.hub, SystemClock(), proxy=membership.proxy).leave()
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
    lines = [f"{name} = {json.dumps(value)}" for name, value in top.items()]
    lines += [
        "[node]",
        f"id = {json.dumps(answer.node)}",
        f"tier = {json.dumps(answer.tier)}",
        f"hub = {json.dumps(url)}",
        f"broker = {json.dumps(answer.brokers[0] if answer.brokers else _broker_beside(url))}",
        f"sources = {json.dumps(list(answer.sources) or [url])}",
        f"{answer.trust_name.partition('.')[0]} = {json.dumps(answer.trust_name)}",
        'identity = "identity"',
        'data = "data"',
        f"groups = {json.dumps(list(answer.groups))}",
        f"fleet = {answer.fleet}",
    ]
    if proxy is not None:
        lines.append(f"proxy = {json.dumps(proxy)}")
    if answer.labels:
        lines += [
            "[node.labels]",
            *(f"{json.dumps(name)} = {json.dumps(value)}" for name, value in answer.labels.items()),
        ]
    return "\n".join(lines) + "\n"


def _broker_beside(url: str) -> str:
    """Where the broker is when the hub does not say: on the hub's machine, at its usual port."""
    host = urlsplit(url).hostname or ""
    return f"mqtts://[{host}]:8883" if ":" in host else f"mqtts://{host}:8883"


def _command(tier: str) -> str:
    return "worker" if tier == "cloud" else tier
