"""TLS for servers: which versions and ciphers, whose client certificates count, and new certificates without a restart.

Sources: RFC 9325 (recommended use of TLS), RFC 7301 (ALPN).
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from models.serving.access.settings import InvalidAccess
from models.serving.access.watch import Watch

log = logging.getLogger("tierline.tls")

Configure = Callable[[ssl.SSLContext], None]

TLS12_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
"""Forward secret and authenticated, RFC 9325 4.2; TLS 1.3 has no others."""


def server_context(
    cert: Path, key: Path, client_ca: Path | None = None, *, client_required: bool = True
) -> ssl.SSLContext:
    """A context for a server. `cert`: its chain, PEM, leaf first; `key`: its private key, PEM, not encrypted.

    `client_ca`: certificates that sign clients'; None = clients are not asked for one. `client_required` False = a client
    may come without, and be known by a token. A certificate that does not verify is refused either way.

    The files are looked at when a client connects, at most once a second: connections made after a renewal get the new
    certificate (and the new client CA, whatever session they would resume), those made before it go on. A renewal that does
    not load is logged, and the old certificate stays. For event loops: `wrap_socket` would know no renewals. Raises
    InvalidAccess naming the file.
    """

    def configure(context: ssl.SSLContext) -> None:
        _configure(context, cert, key, client_ca, client_required)

    return _Renewing(configure, Watch([each for each in (cert, key, client_ca) if each is not None]))


class _Renewing(ssl.SSLContext):
    """Every connection is made from the latest context: sessions that an earlier one kept cannot be resumed in it."""

    def __new__(cls, configure: Configure, watch: Watch) -> _Renewing:
        return super().__new__(cls, ssl.PROTOCOL_TLS_SERVER)

    def __init__(self, configure: Configure, watch: Watch) -> None:
        self._configure = configure
        self._watch = watch
        self._trouble = ""
        self._renewed: ssl.SSLContext | None = None
        configure(self)

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:
        """What event loops make a connection with."""
        if self._watch.changed():
            self._renew()
        wrap = super().wrap_bio if self._renewed is None else self._renewed.wrap_bio
        return wrap(incoming, outgoing, server_side, server_hostname, session)

    def _renew(self) -> None:
        renewed = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            self._configure(renewed)
        except InvalidAccess as error:
            self._watch.look_again()  # a certificate and its key are two files: the other one may be on its way
            if str(error) != self._trouble:
                log.warning("the certificate in use stays: %s", error)
            self._trouble = str(error)
            return
        self._renewed = renewed
        self._trouble = ""
        log.info("a new certificate is in use")


def _configure(context: ssl.SSLContext, cert: Path, key: Path, client_ca: Path | None, client_required: bool) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(TLS12_CIPHERS)
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])

    def no_password() -> str:
        # Without this OpenSSL would ask for one on the terminal, and wait.
        raise InvalidAccess(f"{key}: the private key is encrypted: a server has nobody to ask for its password")

    for path in (cert, key, client_ca):
        if path is not None:
            _check_readable(path)
    try:
        context.load_cert_chain(cert, key, password=no_password)
    except OSError as error:
        raise InvalidAccess(f"{cert} and {key}: not a certificate and its key: {_reason(error)}") from error
    if client_ca is not None:
        try:
            context.load_verify_locations(client_ca)
        except OSError as error:
            raise InvalidAccess(f"{client_ca}: holds no certificate: {_reason(error)}") from error
        context.verify_mode = ssl.CERT_REQUIRED if client_required else ssl.CERT_OPTIONAL
        # A client that resumes a session is not asked for its certificate again.
        context.options |= ssl.OP_NO_TICKET
        context.num_tickets = 0


def grpc_credentials(cert: Path, key: Path, client_ca: Path | None = None, *, client_required: bool = True) -> Any:
    """The same as `grpc.ServerCredentials`, renewals included. grpcio cannot ask for a certificate that a client may leave out:
    with `client_required` False none is asked for. Raises InvalidAccess."""
    try:
        grpc = import_module("grpc")
    except ModuleNotFoundError as error:
        raise InvalidAccess("gRPC needs grpcio: pip install 'tierline[grpc]'") from error

    def check() -> None:
        # OpenSSL checks here what gRPC's own TLS would only report to the clients, one by one.
        _configure(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), cert, key, client_ca, client_required)

    check()
    asks = client_ca is not None and client_required
    watch = Watch([each for each in (cert, key, client_ca) if each is not None])

    def configuration() -> Any:
        authorities = client_ca.read_bytes() if client_ca is not None and asks else None
        return grpc.ssl_server_certificate_configuration(((key.read_bytes(), cert.read_bytes()),), authorities)

    def renewed() -> Any:
        """Called by gRPC for every connection, in a thread of its own; None = as before."""
        if not watch.changed():
            return None
        try:
            check()
            return configuration()
        except (InvalidAccess, OSError) as error:
            watch.look_again()
            log.warning("gRPC goes on with the certificate in use: %s", error)
            return None

    return grpc.dynamic_ssl_server_credentials(configuration(), renewed, asks)


def _check_readable(path: Path) -> None:
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise InvalidAccess(f"{path}: {error.strerror}") from error


def _reason(error: OSError) -> str:
    return (error.reason if isinstance(error, ssl.SSLError) else error.strerror) or str(error)
