"""Where a server listens, as every client of ours sees it: TCP, TLS or a Unix socket."""

from __future__ import annotations

import re
import ssl
from os import PathLike

import msgspec

HEADER_VALUE = re.compile(r"[\x21-\x7e]{1,4096}")
"""What a token or a traceparent may be made of."""


class Endpoint(msgspec.Struct, frozen=True):
    """`path`: of a Unix socket, None = `host` and `port`. `tls`: None = not encrypted."""

    host: str = ""
    port: int = 0
    path: str | None = None
    tls: ssl.SSLContext | None = None

    @property
    def peer(self) -> str:
        """Its name in messages."""
        return self.path or (f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}")


def client_tls(
    ca: str | PathLike[str] | None = None,
    certificate: str | PathLike[str] | None = None,
    key: str | PathLike[str] | None = None,
) -> ssl.SSLContext:
    """TLS 1.2 or newer that verifies the server's chain and name.

    `ca`: PEM file of the only authorities to trust, None = the system's. `certificate`, `key`: PEM files to show the server
    when it asks (mutual TLS); the key may stand in the certificate's file. Raises OSError for a file that cannot be used.
    """
    context = ssl.create_default_context(cafile=ca)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    if certificate is not None:
        context.load_cert_chain(certificate, key)
    return context
