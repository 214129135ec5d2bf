"""How the hub connects to the broker: as itself, and for a moment in the place of a node that was revoked."""

from __future__ import annotations

import asyncio
import ssl
import tempfile
from pathlib import Path

from cloud_hub.authority import Authority
from cloud_hub.certificate_parts import new_key, private_pem
from cloud_hub.certificates import HubCertificates
from sync.channel import LinkOptions, Will, broker_address
from sync.clock import Clock
from sync.credentials import trusting
from sync.link import Link
from sync.topics import HUB_USER, check_node_id

MAX_INCOMING = 20_000
"""A fleet's retained messages arrive at once on every connect: three per node."""
TAKE_SECONDS = 300.0
"""Life of the certificate by which a revoked node's place is taken."""


class BrokerConnection:
    """`url`: of the broker. Over TLS the hub shows a certificate, else a password."""

    def __init__(self, url: str, own: HubCertificates, authority: Authority, clock: Clock) -> None:
        self._url = url
        self._own = own
        self._authority = authority
        self._clock = clock
        self._tls = broker_address(url).tls

    def options(self, password: str | None, will: Will) -> LinkOptions:
        return LinkOptions(
            url=self._url,
            client_id=HUB_USER,
            username=None if self._tls else HUB_USER,
            password=None if self._tls else password,
            will=will,
            max_incoming=MAX_INCOMING,
            tls=self._context if self._tls else None,
        )

    async def take_place_of(self, node_id: str) -> None:
        """Connect as `node_id`, which ends its connection and its session, and leave. Raises TimeoutError with the caller's."""
        key = new_key()
        certificate = self._authority.issue_client(
            key.public_key(), check_node_id(node_id), self._clock.wall(), TAKE_SECONDS
        )
        there = asyncio.Event()
        with tempfile.TemporaryDirectory(prefix="tierline-") as folder:
            pair = Path(folder) / "crt", Path(folder) / "key"
            pair[0].write_bytes(certificate.chain)
            pair[1].touch(mode=0o600)
            pair[1].write_bytes(private_pem(key))

            def context() -> ssl.SSLContext:
                made = trusting(self._authority.bundle().decode())()
                made.load_cert_chain(*pair)
                return made

            options = LinkOptions(url=self._url, client_id=node_id, tls=context, session_seconds=0, keepalive=10)
            async with Link(options) as link:
                link.on_connect(there.set)
                await there.wait()

    def _context(self) -> ssl.SSLContext:
        context = trusting(self._own.bundle.read_text())()
        context.load_cert_chain(*self._own.broker)
        return context
