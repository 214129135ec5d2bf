"""What waits to be sent over a link: bounded, and for a retained topic only the newest. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, eq=False)
class Packet:
    """One publish. Two packets are never equal: each is its own attempt to say something."""

    topic: str
    payload: bytes
    qos: int
    retain: bool


class Outgoing:
    """A retained topic is level-triggered, so a newer packet replaces an older one that still waits.

    Everything else is a stream in order. Above `limit` the oldest of the stream goes first and the levels last; `dropped`
    counts what was lost that way.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._levels: dict[str, Packet] = {}
        self._stream: deque[Packet] = deque()
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._levels) + len(self._stream)

    def put(self, packet: Packet) -> None:
        if packet.retain:
            self._levels.pop(packet.topic, None)
            self._levels[packet.topic] = packet
        else:
            self._stream.append(packet)
        while len(self) > self._limit:
            self._drop_oldest()

    def take(self) -> Packet | None:
        """The next packet to send, levels first; None when nothing waits."""
        if self._levels:
            return self._levels.pop(next(iter(self._levels)))
        return self._stream.popleft() if self._stream else None

    def give_back(self, packets: Iterable[Packet]) -> None:
        """Put unacknowledged packets, oldest first, before all others. A level that was replaced meanwhile is forgotten.

        QoS 0 packets are lost with the connection, as the protocol has it, and are counted.
        """
        levels: dict[str, Packet] = {}
        stream: list[Packet] = []
        for packet in packets:
            if packet.retain:
                levels[packet.topic] = packet
            elif packet.qos > 0:
                stream.append(packet)
            else:
                self.dropped += 1
        self._levels = {**levels, **self._levels}
        self._stream.extendleft(reversed(stream))
        while len(self) > self._limit:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        if self._stream:
            self._stream.popleft()
        else:
            self._levels.pop(next(iter(self._levels)))
        self.dropped += 1
