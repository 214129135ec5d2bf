"""What events are on the wire: a packet of them going up, one acknowledgement of many coming down. Pure.

A packet is MessagePack, not JSON: a body is bytes, and base64 would carry 48 KiB past what brokers accept. An event in it is
kept apart until it is read, so that one that makes no sense does not take the others with it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

from sync.errors import Malformed

MAX_BODY_BYTES = 48 * 1024
"""Largest body of one event: with what surrounds it, it still is one MQTT message."""
MAX_PACKET_BYTES = 60 * 1024
"""Where a packet is closed; `sync.messages.MAX_MESSAGE_BYTES` is what a broker must carry."""
MAX_PACKET_EVENTS = 64
MAX_ACK_IDS = 1_000
"""Events that one acknowledgement may settle: 26 KB of ids."""
MAX_REASON_CHARS = 200
ID_CHARS = 26
LOWEST, HIGHEST = 0, 9
"""Priorities: higher ones are sent first and dropped last."""
ALARM, UPDATE, APPLICATION = "alarm", "update", "app."

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_ID = re.compile(rf"[{_ALPHABET}]{{{ID_CHARS}}}")
_KIND = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_BOOT = re.compile(r"[0-9a-f]{16}")


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """`seq`: its number in the outbox, never given twice. `at`: Unix seconds by the node's clock when it was put in."""

    id: str
    seq: int
    kind: str
    body: bytes
    priority: int = 5
    at: float = 0.0


class EventPacket(msgspec.Struct, frozen=True, kw_only=True):
    """Some events, each an encoded `Event`.

    `boot` names one opening of the outbox, `starts` counts them. `low`: every event with a smaller `seq` is settled and will
    never be sent again, so whoever remembers ids to recognise repetitions may forget those.
    """

    v: int = 1
    boot: str
    starts: int
    low: int
    events: tuple[msgspec.Raw, ...]


class Ack(msgspec.Struct, frozen=True, kw_only=True):
    """`ids`: on the hub's disk. `refused`: id -> why no repetition will make it acceptable. `fleet`: number of nodes."""

    v: int = 1
    ids: tuple[str, ...] = ()
    refused: dict[str, str] = {}
    fleet: int = 1


class Salvage(msgspec.Struct, frozen=True):
    """What can be said of an event that does not decode."""

    id: str = ""
    kind: str = ""


def new_id(wall: float, entropy: bytes) -> str:
    """A ULID: 48 bits of milliseconds since 1970, 80 of `entropy` (10 bytes), in Crockford's base 32."""
    number = (int(max(wall, 0.0) * 1000) & (1 << 48) - 1) << 80 | int.from_bytes(entropy[:10], "big")
    return "".join(_ALPHABET[number >> shift & 31] for shift in range(125, -1, -5))


def check_kind(kind: str) -> str:
    """Return `kind` when it can name a stream. Raises Malformed."""
    if not _KIND.fullmatch(kind):
        raise Malformed(f"kind {kind[:100]!r} is not 1-64 of a-z, 0-9, '.', '_' and '-', the first a letter or digit")
    return kind


def check_priority(priority: int) -> int:
    if not LOWEST <= priority <= HIGHEST:
        raise Malformed(f"priority {priority} is not {LOWEST} to {HIGHEST}")
    return priority


def check_body(body: bytes) -> bytes:
    if len(body) > MAX_BODY_BYTES:
        raise Malformed(f"body: {len(body)} bytes, at most {MAX_BODY_BYTES} are accepted")
    return body


def encode_body(body: Mapping[str, object]) -> bytes:
    """A body as JSON. Raises Malformed when it holds what JSON has no word for."""
    try:
        return msgspec.json.encode(body)
    except (TypeError, ValueError, RecursionError) as error:
        raise Malformed(f"body: {error}") from error


def pack_event(event: Event) -> msgspec.Raw:
    return msgspec.Raw(msgspec.msgpack.encode(event))


def pack(packet: EventPacket) -> bytes:
    return msgspec.msgpack.encode(packet)


def unpack(data: bytes) -> EventPacket:
    """Raises Malformed naming the field."""
    try:
        packet = msgspec.msgpack.decode(data, type=EventPacket)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise Malformed(f"EventPacket: {error}") from error
    if not _BOOT.fullmatch(packet.boot) or not _number(packet.starts) or not _number(packet.low):
        raise Malformed("EventPacket: boot is 16 hexadecimal digits, starts and low are 1 to 2^62")
    if len(packet.events) > MAX_PACKET_EVENTS:
        raise Malformed(f"events: {len(packet.events)}, at most {MAX_PACKET_EVENTS} are accepted")
    return packet


def unpack_event(data: msgspec.Raw) -> Event:
    """Raises Malformed naming the field."""
    try:
        event = msgspec.msgpack.decode(data, type=Event)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise Malformed(f"Event: {error}") from error
    if not _ID.fullmatch(event.id):
        raise Malformed(f"id: not {ID_CHARS} characters of a ULID")
    if not _number(event.seq):
        raise Malformed("seq: not 1 to 2^62")
    if not 0 <= event.at < 1e12:
        raise Malformed("at: not Unix seconds")
    check_kind(event.kind)
    check_priority(event.priority)
    check_body(event.body)
    return event


def salvage(data: msgspec.Raw) -> Salvage:
    """Id and kind of an event that is refused, as far as they make sense: its sender must be told what to give up."""
    try:
        found = msgspec.msgpack.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return Salvage()
    if not isinstance(found, dict):
        return Salvage()
    id_, kind = found.get("id"), found.get("kind")
    return Salvage(
        id_ if isinstance(id_, str) and _ID.fullmatch(id_) else "",
        kind if isinstance(kind, str) and _KIND.fullmatch(kind) else "",
    )


def decode_ack(data: bytes) -> Ack:
    """Raises Malformed naming the field."""
    try:
        ack = msgspec.json.decode(data, type=Ack)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Malformed(f"Ack: {error}") from error
    if len(ack.ids) + len(ack.refused) > MAX_ACK_IDS:
        raise Malformed(f"Ack: more than {MAX_ACK_IDS} ids")
    return ack


def _number(value: int) -> bool:
    return 1 <= value < 1 << 62
