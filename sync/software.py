"""The body of a document of kind `software`: which version of its own software a node runs, as wheels. Pure."""

from __future__ import annotations

import re

import msgspec

from sync.errors import Malformed
from sync.trust import check_digest, digest_of
from sync.version import DISTRIBUTION

MAX_WHEELS = 64
MAX_WHEEL_BYTES = 1 << 30

_VERSION = re.compile(r"[0-9][A-Za-z0-9.!+]{0,63}")
_WHEEL = re.compile(r"([A-Za-z0-9][A-Za-z0-9._]{0,99})-([0-9][A-Za-z0-9._!+]{0,63})(-[A-Za-z0-9_.]{1,100}){3,4}\.whl")


class Wheel(msgspec.Struct, frozen=True):
    """A file as the binary distribution format names it: what pip needs to know of it is in the name."""

    name: str
    digest: str
    size: int


class Software(msgspec.Struct, frozen=True):
    """`version`: of the project. `wheels`: its own, and those of dependencies the node may lack."""

    version: str
    wheels: tuple[Wheel, ...]


def decode_software(body: bytes) -> Software:
    """Decode and check. Raises Malformed naming the field."""
    try:
        software = msgspec.json.decode(body, type=Software)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Malformed(f"software: {error}") from error
    if not _VERSION.fullmatch(software.version):
        raise Malformed(f"version: {software.version[:70]!r} is no version")
    if not 1 <= len(software.wheels) <= MAX_WHEELS:
        raise Malformed(f"wheels: {len(software.wheels)} given, 1 to {MAX_WHEELS} are accepted")
    found: dict[str, str] = {}
    for index, wheel in enumerate(software.wheels):
        distribution, version = parse_wheel(f"wheels[{index}].name", wheel.name)
        if distribution in found:
            raise Malformed(f"wheels[{index}].name: {distribution} is there twice")
        found[distribution] = version
        check_digest(wheel.digest)
        if not 0 < wheel.size <= MAX_WHEEL_BYTES:
            raise Malformed(f"wheels[{index}].size: {wheel.size} is not 1 to {MAX_WHEEL_BYTES} bytes")
    if found.get(DISTRIBUTION) != software.version:
        raise Malformed(f"wheels: there is no {DISTRIBUTION}-{software.version}-...whl among them")
    return software


def encode_software(software: Software) -> bytes:
    return msgspec.json.encode(software, order="sorted")


def parse_wheel(field: str, name: str) -> tuple[str, str]:
    """(distribution, version) of a wheel's file name, which can therefore be no path. Raises Malformed naming `field`."""
    match = _WHEEL.fullmatch(name)
    if match is None:
        raise Malformed(f"{field}: {name[:100]!r} is not name-version-python-abi-platform.whl")
    return match.group(1).lower().replace(".", "_"), match.group(2)


def name_of(software: Software) -> str:
    """What names this software among others: equal for equal contents, whatever fields a later hub adds."""
    return digest_of(encode_software(software))
