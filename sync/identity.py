"""Who a node is and whom it talks to: the `[node]` table of every tier's configuration file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec

from sync.channel import address_of
from sync.errors import InvalidConfig, Malformed
from sync.topics import check_name, check_node_id, tenant_of
from sync.trust import Keyring, decode_keyring

TIERS = ("device", "edge", "cloud")
LOOPBACK = ("127.0.0.1", "::1", "localhost")
MAX_CONFIG_BYTES = 1 << 20
MAX_CREDENTIAL_BYTES = 4096

T = TypeVar("T")


class Membership(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[node]`. Relative paths are relative to the configuration file. Raises InvalidConfig naming the field.

    `id`: tenant.node. `tier`: device, edge or cloud. `broker`: mqtt://host:port. `sources`: base URLs of files, nearest
    first. `keyring`: the pinned keys, JSON. `credential`: file of mode 0600 with the node's token, which is its MQTT
    password and its HTTP bearer token. `data`: folder of its state. `groups`: whose policies it also reads. `insecure`:
    allows a broker or source beyond this machine; the connections are not encrypted yet.
    """

    id: str
    tier: str
    broker: str
    keyring: Path
    credential: Path
    data: Path
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
        self._check_host("node.broker", self.broker, address_of(self.broker)[0])
        for index, source in enumerate(self.sources):
            self._check_source(f"node.sources[{index}]", source)

    @property
    def tenant(self) -> str:
        return tenant_of(self.id)

    def token(self) -> str:
        """The node's credential. Raises InvalidConfig when it is missing, empty or readable by others."""
        field = f"node.credential: {self.credential}"
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

    def pinned(self) -> Keyring:
        """The keys this node believes. Raises InvalidConfig."""
        try:
            return decode_keyring(self.keyring.read_bytes())
        except OSError as error:
            raise InvalidConfig(f"node.keyring: {self.keyring}: {error.strerror}") from error
        except Malformed as error:
            raise InvalidConfig(f"node.keyring: {self.keyring}: {error}") from error

    def _check_source(self, field: str, source: str) -> None:
        try:
            parts = urlsplit(source)
            host, _ = parts.hostname, parts.port
        except ValueError as error:
            raise InvalidConfig(f"{field}: {source!r}: {error}") from error
        if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment or source.endswith("/"):
            raise InvalidConfig(f"{field}: {source!r} is not http(s)://host[:port][/path] without a final '/'")
        self._check_host(field, source, host)

    def _check_host(self, field: str, url: str, host: str) -> None:
        if host not in LOOPBACK and not self.insecure:
            raise InvalidConfig(
                f"{field}: {url!r} is beyond this machine; say insecure = true to allow that unencrypted"
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
