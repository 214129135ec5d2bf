"""What the serving process and its metadata child say to each other: length-prefixed MessagePack over two pipes. Pure types.

parent --Ask--> child        one refresh, and the names to look up
child  --Get--> parent       a metadata file is wanted; the parent owns the network and the credentials
parent --Got--> child
child  --Answer--> parent    what is listed, and what must be remembered
"""

from __future__ import annotations

import struct
from typing import BinaryIO, TypeVar

import msgspec

MAX_FRAME = 8 << 20
"""Bytes of one message: the largest metadata file, and the kept copies, with room to spare."""

T = TypeVar("T")

_LENGTH = struct.Struct(">I")


class Mark(msgspec.Struct, frozen=True):
    """The highest version of a role that was verified, and a fingerprint of the keys that vouched for it.

    TUF specification 5.3.11: when a newer root replaces a role's keys, versions made under the old keys count no more.
    """

    version: int
    keys: str


class Ask(msgspec.Struct, frozen=True, kw_only=True, tag="ask"):
    """`root`: the pinned root. `folder`: the cache. `now`: Unix seconds to judge expiry by. `floors`: by role.

    `kept`: role -> its last verified bytes, put back when the cache lost them. `names`: targets to look up.
    """

    root: bytes
    folder: str
    now: float
    floors: dict[str, Mark]
    kept: dict[str, bytes]
    names: tuple[str, ...]


class Get(msgspec.Struct, frozen=True, tag="get"):
    """`path` below the repository's base; the answer may have at most `limit` bytes."""

    path: str
    limit: int


class Got(msgspec.Struct, frozen=True, tag="got"):
    """`data`, or why there is none: `code` is that of a SyncError, or `absent`."""

    data: bytes = b""
    code: str = ""
    text: str = ""


class Listed(msgspec.Struct, frozen=True):
    """A target: `digest` as `sha256:<hex>`, `size` in bytes."""

    digest: str
    size: int


class Answer(msgspec.Struct, frozen=True, kw_only=True, tag="answer"):
    """`files`: the names that are listed. `marks`, `kept`: what was verified, also when the refresh then failed.

    `expires`: Unix seconds when the first of the metadata used expires. `issued`: when the hub signed the newest of it.
    `code`, `text`: the SyncError that ended the refresh; empty = it is complete.
    """

    files: dict[str, Listed] = {}
    marks: dict[str, Mark] = {}
    kept: dict[str, bytes] = {}
    expires: float = 0.0
    issued: float = 0.0
    code: str = ""
    text: str = ""


def write_frame(stream: BinaryIO, message: Ask | Get | Got | Answer) -> None:
    """Raises OSError when the other side is gone."""
    data = msgspec.msgpack.encode(message)
    stream.write(_LENGTH.pack(len(data)) + data)
    stream.flush()


def read_frame(stream: BinaryIO, into: type[T]) -> T | None:
    """The next message; None at the end of the stream. Raises ValueError for anything that is no such message."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    if length > MAX_FRAME:
        raise ValueError(f"a message of {length} bytes, at most {MAX_FRAME} are accepted")
    data = stream.read(length)
    if len(data) < length:
        return None
    return msgspec.msgpack.decode(data, type=into)
