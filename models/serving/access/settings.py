"""What an access file says: whose tokens are believed, what each tenant may see, and how much each client may ask.

audience = "tierline"
keys = "keys"                     # folder of <kid>.pem, or a JSON Web Key Set
revoked = "revoked.txt"           # see models.serving.access.revoked
[tenants.acme]
models = ["acme-*", "shared-*"]
rate = 100                        # requests per second, of each client
burst = 200
concurrency = 16                  # of the whole tenant
[clients."acme.gateway-1"]        # a token's sub, or a certificate's common name
tenant = "acme"
rate = 500
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from models.errors import TierlineError

MAX_ACCESS_BYTES = 64 * 1024
"""Some 1,500 clients with a table each. It is read within the event loop, in about 20 ms: nobody may be answered by settings
that no longer hold, and nobody answered meanwhile."""
MAX_PATTERNS = 64
"""Patterns of one list; each is tried in turn."""
MAX_NAME = 256
"""Characters of a client's or tenant's name or of a pattern: they go into logs and tables."""
ANYONE = "*"

Rate = Annotated[float, msgspec.Meta(gt=0, le=1e9)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000_000)]
Pattern = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME)]
Patterns = Annotated[tuple[Pattern, ...], msgspec.Meta(max_length=MAX_PATTERNS)]


class InvalidAccess(TierlineError):
    """An access file, key file or certificate cannot be used; the message names the file and the field."""


class Tenant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`models`: names it may know of and use, shell patterns, None = all. `rate`: requests per second of each of its clients,
    `burst`: how many of them may come at once, None = one second's worth. `concurrency`: requests of the whole tenant in
    work at once. None = not limited."""

    models: Patterns | None = None
    rate: Rate | None = None
    burst: Count | None = None
    concurrency: Count | None = None


class Client(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What differs from its tenant for one client. `tenant`: whose it is, when its certificate or token does not say.
    `models`, `rate`, `burst`: in the tenant's place, None = as the tenant. `admin`: may load and unload models."""

    tenant: str | None = None
    models: Patterns | None = None
    rate: Rate | None = None
    burst: Count | None = None
    admin: bool = False


class Limits(msgspec.Struct, frozen=True):
    """What one client may ask. None = not limited."""

    rate: float | None = None
    burst: int | None = None
    concurrency: int | None = None


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, dict=True):
    """An access file. Relative paths are relative to it.

    `keys`: None = no tokens are taken. `revoked`: None = nothing is revoked. `open_loopback`: whether this machine's own
    clients need no credential; None = only while the server listens nowhere else. Behind a proxy on this machine everybody
    is local: say false there. `loopback_admin`: whether they may load and unload models too. `require_tls`: refuse
    credentials from other machines on connections that are not encrypted; false behind a proxy that ends TLS.
    `tenant_from_certificate`: a certificate for `tenant.node` that no `[clients]` names belongs to that tenant; false = it
    is refused. `max_in_flight`: requests in work at once, of all callers. `default_deadline_ms`: for requests that carry
    none. `tenants`: "*" stands for all that are not listed, callers without a tenant among them; with none listed at all,
    tenants are not checked.
    """

    audience: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME)] = "tierline"
    keys: str | None = None
    revoked: str | None = None
    open_loopback: bool | None = None
    loopback_admin: bool = False
    require_tls: bool = True
    tenant_from_certificate: bool = False
    max_in_flight: Count | None = None
    default_deadline_ms: Annotated[float, msgspec.Meta(gt=0, le=86_400_000)] | None = None
    tenants: Mapping[str, Tenant] = {}
    clients: Mapping[str, Client] = {}

    @cached_property
    def is_limited(self) -> bool:
        """Whether any client or tenant has a limit of its own."""
        return any(each.rate or each.concurrency for each in self.tenants.values()) or any(
            each.rate for each in self.clients.values()
        )

    def tenant(self, name: str | None) -> Tenant | None:
        """The entry that holds for a tenant, None = there is none."""
        found = None if name is None else self.tenants.get(name)
        return found or self.tenants.get(ANYONE)

    def limits(self, tenant: str | None, client: str | None) -> Limits:
        """What `client` of `tenant` may ask."""
        whole = self.tenant(tenant) or Tenant()
        own = None if client is None else self.clients.get(client)
        if own is None or own.rate is None:
            return Limits(whole.rate, whole.burst, whole.concurrency)
        # A rate of its own comes with its own burst: the tenant's was meant for another rate.
        return Limits(own.rate, own.burst, whole.concurrency)


NO_SETTINGS = Settings()

S = TypeVar("S", Tenant, Client)


def load_settings(path: Path) -> Settings:
    """Read an access file. Raises InvalidAccess naming the file and the field."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_ACCESS_BYTES + 1)
    except OSError as error:
        raise InvalidAccess(f"{path}: {error.strerror}") from error
    if len(data) > MAX_ACCESS_BYTES:
        raise InvalidAccess(f"{path}: more than {MAX_ACCESS_BYTES} bytes")
    try:
        return decode_settings(data)
    except InvalidAccess as error:
        raise InvalidAccess(f"{path}: {error}") from error


def decode_settings(data: bytes) -> Settings:
    """Raises InvalidAccess naming the field."""
    try:
        table = tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidAccess(f"not TOML: {error}") from error
    # One by one, so that an error names whose entry it is in.
    tenants = _entries(table.pop("tenants", {}), "tenants", Tenant)
    clients = _entries(table.pop("clients", {}), "clients", Client)
    settings = _convert(table, "", Settings)
    tables: tuple[tuple[str, Mapping[str, Tenant | Client]], ...] = (("tenants", tenants), ("clients", clients))
    for field, entries in tables:
        for name, entry in entries.items():
            if entry.burst is not None and entry.rate is None:
                raise InvalidAccess(f'{field}."{name}".burst: needs a rate beside it')
    for name, client in clients.items():
        if client.tenant is not None and tenants and not {client.tenant, ANYONE} & tenants.keys():
            raise InvalidAccess(f'clients."{name}".tenant: {client.tenant!r} is not listed under tenants')
    return msgspec.structs.replace(settings, tenants=tenants, clients=clients)


def _entries(table: object, field: str, kind: type[S]) -> dict[str, S]:
    if not isinstance(table, dict):
        raise InvalidAccess(f"{field}: is a table of tables, [{field}.NAME]")
    for name in table:
        if not 0 < len(name) <= MAX_NAME or not name.isprintable():
            raise InvalidAccess(f"{field}: {name[:MAX_NAME]!r} is not a name of 1 to {MAX_NAME} printable characters")
    return {name: _convert(value, f'{field}."{name}"', kind) for name, value in table.items()}


T = TypeVar("T")


def _convert(value: Any, field: str, kind: type[T]) -> T:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        text, _, place = str(error).partition(" - at `$")
        where = f"{field}{place.rstrip('`')}".lstrip(".")
        raise InvalidAccess(f"{where}: {text}" if where else text) from error
