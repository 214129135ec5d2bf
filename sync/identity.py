"""Who a node is and whom it talks to: the `[node]` table of every tier's configuration file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec

from sync.channel import broker_address
from sync.clock import Clock
from sync.credentials import Credentials, Identity, TokenCredentials
from sync.errors import InvalidConfig, Malformed
from sync.origin import origin_of
from sync.topics import check_name, check_node_id, tenant_of
from sync.tunnel import read_proxy

TIERS = ("device", "edge", "cloud")
LOOPBACK = ("127.0.0.1", "::1", "localhost")
MAX_CONFIG_BYTES = 1 << 20
MAX_CREDENTIAL_BYTES = 4096
MAX_ROOT_BYTES = 512_000
"""As `sync.tuf_client` accepts from the network; ours have 2 kB."""

T = TypeVar("T")


class _Signed(msgspec.Struct, frozen=True):
    type: str = msgspec.field(name="_type")


class _Root(msgspec.Struct, frozen=True):
    signed: _Signed


class Membership(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[node]`. Relative paths are relative to the configuration file. Raises InvalidConfig naming the field.

    `id`: tenant.node. `tier`: device, edge or cloud. `broker`: mqtts://host:port or wss://host:port/path; mqtt and ws on this
    machine alone. `sources`: base URLs of files, nearest first. `root`: the pinned root metadata of the hub, JSON. `data`:
    folder of its state. `groups`: whose policies it also reads.

    One of: `identity`: folder of its key and certificate, as joining a hub makes it, renewed at `hub`. `credential`: file of
    mode 0600 with a token, which is its MQTT password and its HTTP bearer token: for evaluation on one machine.

    `proxy`: http://[user:password@]host:port, for the broker and every source but those whose host is in `direct` or this
    machine's. `fleet`: how many nodes there are until the hub says so. `insecure`: allows broker and sources beyond this
    machine without encryption.
    """

    id: str
    tier: str
    broker: str
    root: Path
    data: Path
    credential: Path | None = None
    identity: Path | None = None
    hub: str | None = None
    proxy: str | None = None
    direct: tuple[str, ...] = ()
    fleet: int = 1
    sources: tuple[str, ...] = ()
    labels: dict[str, str] = {}
    groups: tuple[str, ...] = ()
    insecure: bool = False

    def __post_init__(self) -> None:
        try:
            check_node_id(self.id)
            for group in self.groups:
                check_name("group", group)
        except Malformed as error:
            raise InvalidConfig(f"node: {error}") from error
        if self.tier not in TIERS:
            raise InvalidConfig(f"node.tier: {self.tier!r} is none of {', '.join(TIERS)}")
        if (self.credential is None) == (self.identity is None):
            raise InvalidConfig("node: say either identity (after joining a hub) or credential (a token)")
        if self.proxy is not None:
            read_proxy(self.proxy)
        broker = broker_address(self.broker)
        self._check_host("node.broker", self.broker, broker.host, safe=broker.tls)
        if self.identity is not None and not broker.tls:
            raise InvalidConfig(f"node.broker: {self.broker!r}: an identity is shown over mqtts or wss")
        if self.hub is not None:
            self._check_source("node.hub", self.hub)
        for index, source in enumerate(self.sources):
            self._check_source(f"node.sources[{index}]", source)

    @property
    def tenant(self) -> str:
        return tenant_of(self.id)

    def credentials(self, clock: Clock | None = None) -> Credentials:
        """What opens the broker and the sources. Raises InvalidConfig."""
        if self.identity is None:
            return TokenCredentials(self.token())
        identity = Identity(self.identity, clock)
        if identity.pair.node != self.id:
            raise InvalidConfig(f"node.identity: {self.identity} is that of {identity.pair.node}, node.id is {self.id}")
        return identity

    def bearer_at(self, url: str, credentials: Credentials) -> str | None:
        """What the source at `url` is shown: this node's bearer token if it is the hub, else None.

        The hub is where it joined (`hub`) and where the hub itself said it is. A token knows of no joining: without `hub`
        it goes to the first source. Whoever else had it could ask the hub in this node's name. Raises InvalidConfig.
        """
        joined = self.hub or (self.sources[0] if self.identity is None and self.sources else "")
        origin = origin_of(url)
        known = origin is not None and (origin == origin_of(joined) or origin in credentials.hub_origins)
        return credentials.bearer() if known else None

    def proxy_to(self, url: str) -> str | None:
        """The proxy for `url`, None = connect directly."""
        host = urlsplit(url).hostname
        return None if host in LOOPBACK or host in self.direct else self.proxy

    def token(self) -> str:
        """The node's token. Raises InvalidConfig when it is missing, empty or readable by others."""
        field = f"node.credential: {self.credential}"
        if self.credential is None:
            raise InvalidConfig("node.credential: none is configured")
        try:
            mode = self.credential.stat().st_mode & 0o777
            data = self.credential.read_bytes()
        except OSError as error:
            raise InvalidConfig(f"{field}: {error.strerror}") from error
        if mode & 0o077:
            raise InvalidConfig(f"{field}: others may read it (mode {mode:04o}), 0600 is needed")
        try:
            token = data.decode("ascii").strip()
        except UnicodeDecodeError as error:
            raise InvalidConfig(f"{field}: not a token") from error
        if not token or len(data) > MAX_CREDENTIAL_BYTES or not token.isprintable():
            raise InvalidConfig(f"{field}: not a token of 1 to {MAX_CREDENTIAL_BYTES} printable characters")
        return token

    def pinned(self) -> bytes:
        """The root metadata this node believes, and with it all that follows from it. Raises InvalidConfig."""
        field = f"node.root: {self.root}"
        try:
            data = self.root.read_bytes()
        except OSError as error:
            raise InvalidConfig(f"{field}: {error.strerror}") from error
        if len(data) > MAX_ROOT_BYTES:
            raise InvalidConfig(f"{field}: {len(data)} bytes, at most {MAX_ROOT_BYTES} are accepted")
        try:
            kind = msgspec.json.decode(data, type=_Root).signed.type
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidConfig(f"{field}: no root metadata: {error}") from error
        if kind != "root":
            raise InvalidConfig(f"{field}: metadata of type {kind[:40]!r}, 'root' is expected")
        return data

    def _check_source(self, field: str, source: str) -> None:
        try:
            parts = urlsplit(source)
            host, _ = parts.hostname, parts.port
        except ValueError as error:
            raise InvalidConfig(f"{field}: {source!r}: {error}") from error
        if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment or source.endswith("/"):
            raise InvalidConfig(f"{field}: {source!r} is not http(s)://host[:port][/path] without a final '/'")
        self._check_host(field, source, host, safe=parts.scheme == "https")

    def _check_host(self, field: str, url: str, host: str, *, safe: bool) -> None:
        if host not in LOOPBACK and not safe and not self.insecure:
            raise InvalidConfig(
                f"{field}: {url!r} is beyond this machine; use TLS, or say insecure = true to allow it unencrypted"
            )


def load_config(path: Path, into: type[T]) -> T:
    """Read a TOML file into a struct type. Raises InvalidConfig naming the file and the field."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidConfig(f"{path}: {error.strerror}") from error
    if len(data) > MAX_CONFIG_BYTES:
        raise InvalidConfig(f"{path}: {len(data)} bytes, at most {MAX_CONFIG_BYTES} are accepted")
    folder = path.parent

    def decode_path(kind: type, value: Any) -> Any:
        if kind is Path and isinstance(value, str) and value:
            return folder / value
        raise ValueError("not a path")

    try:
        return msgspec.toml.decode(data, type=into, dec_hook=decode_path)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InvalidConfig(f"{path}: {error}") from error
    except InvalidConfig as error:
        raise InvalidConfig(f"{path}: {error}") from error
