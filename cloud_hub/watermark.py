"""How repetitions are recognised for ever without remembering every id. Pure.

An outbox numbers its events and never gives a number twice; each packet says the lowest number that still waits (`low`).
So an event below it will not be sent again: its id may be forgotten, and a copy that a broker delivers late is known by
its number. Ids above it are remembered, however old they are: a node may be away for years with one of them. Age decides
nothing.

What breaks the numbering is a file that was replaced: by an empty one after damage, or by an old copy when a machine is
restored. The opening of a file has a random name (`boot`) and a count (`starts`): a name not heard before is believed and
brings its own `low`; a name heard before a newer one is an old packet, which moves nothing.
"""

from __future__ import annotations

import msgspec

from sync.events import EventPacket

MAX_PAST = 32
"""Former openings remembered by name; a packet of an older one would have waited in the broker for as many restarts."""


class Stream(msgspec.Struct, frozen=True):
    """Where a node's outbox stands. `past`: names of former openings, newest last."""

    boot: str
    starts: int
    low: int
    past: tuple[str, ...] = ()

    def is_late(self, seq: int) -> bool:
        """Whether the event with this number was settled before: a repetition, though its id may be forgotten."""
        return seq < self.low


def heed(stream: Stream | None, packet: EventPacket) -> Stream:
    """The stream after a packet."""
    if stream is None:
        return Stream(packet.boot, packet.starts, packet.low)
    if packet.boot == stream.boot:
        return Stream(stream.boot, max(stream.starts, packet.starts), max(stream.low, packet.low), stream.past)
    if packet.boot in stream.past:
        # However high its count: after a machine was restored from a copy, the old openings counted further.
        return stream
    past = (*stream.past, stream.boot)
    return Stream(packet.boot, packet.starts, packet.low, past[-MAX_PAST:])
