"""What a fault does to the bytes of a connection. Pure: bytes, time and randomness come in as arguments.

`up` is client -> server, `down` the other way. A fault says three things: how a new connection is received (`admission`),
in which directions everything waits until the fault ends (`holds`), and what becomes of a chunk (`shape`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import ClassVar, Literal

Direction = Literal["up", "down"]
Admission = Literal["pass", "silent", "reset", "unanswered"]
"""`pass`: connected to the server. `silent`: accepted, read, never answered. `reset`: accepted and reset. `unanswered`: the
handshake itself gets no answer."""
BOTH: frozenset[Direction] = frozenset(("up", "down"))
DRIP_TICK_SECONDS = 0.05
"""How often a drip falls: short enough that no read timeout of a second or more is met by it."""


class NeverFired(AssertionError):
    """The fault was on and nothing came its way: the test around it proved nothing."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes that leave at `due` (seconds of the proxy's loop). `back`: to whom they came from."""

    due: float
    data: bytes
    back: bool = False


@dataclass(slots=True)
class Flow:
    """One direction of one connection. `connection`: its number. `last_due`: when its last piece leaves.

    `notes`: what a fault remembers of the connection, shared by both directions. `spoiled`: bytes were lost or changed, so
    the connection is reset when the fault ends, as a peer that came back would.
    """

    connection: int
    direction: Direction
    random: Random
    notes: dict[str, object]
    last_due: float = 0.0
    spoiled: bool = False


@dataclass(slots=True)
class Tally:
    """What a fault touched: connections by number, bytes, HTTP requests, and handshakes that got no answer."""

    connections: set[int] = field(default_factory=set)
    bytes: int = 0
    requests: int = 0
    unanswered: int = 0

    def touch(self, connection: int, count: int = 0) -> None:
        self.connections.add(connection)
        self.bytes += count

    @property
    def any(self) -> bool:
        return bool(self.connections or self.unanswered)


def directions(which: str) -> frozenset[Direction]:
    """`up`, `down` or `both`. Raises ValueError."""
    if which == "both":
        return BOTH
    if which == "up":
        return frozenset(("up",))
    if which == "down":
        return frozenset(("down",))
    raise ValueError(f"direction {which!r} is none of up, down, both")


class Fault:
    """Passes everything. `tally` counts what was touched since the fault began."""

    name: ClassVar[str] = "none"
    admission: Admission = "pass"
    holds: frozenset[Direction] = frozenset()
    resets_open: bool = False
    """Whether connections that are open when the fault begins are reset at once."""
    hides_the_end: bool = False
    """Whether the other side learns only after the fault that a connection ended."""

    def __init__(self) -> None:
        self.tally = Tally()

    def shape(self, flow: Flow, data: bytes, now: float) -> Iterator[Piece]:
        """What becomes of `data`, which arrived at `now`; nothing = swallowed. `b""` is the end of the direction."""
        yield Piece(max(now, flow.last_due), data)

    @property
    def fired(self) -> bool:
        return self.tally.any

    def insist(self) -> None:
        """Raises NeverFired."""
        if not self.fired:
            raise NeverFired(f"{self.name}: nothing passed through while it was on")


class LinkCut(Fault):
    """The cable is out: nothing passes, nobody is told. What was sent meanwhile arrives after it is back, as TCP does it.

    `direction`: `both` (new handshakes get no answer either), `up` or `down`.
    """

    name = "link-cut"
    hides_the_end = True

    def __init__(self, direction: str = "both") -> None:
        super().__init__()
        self.holds = directions(direction)
        self.admission = "unanswered" if direction == "both" else "pass"

    def shape(self, flow: Flow, data: bytes, now: float) -> Iterator[Piece]:
        if flow.direction in self.holds:
            self.tally.touch(flow.connection, len(data))
        yield Piece(max(now, flow.last_due), data)


class Lag(Fault):
    """Each chunk leaves `delay` + up to `jitter` seconds late, per direction, in order."""

    name = "lag"

    def __init__(self, delay: float = 0.2, jitter: float = 0.0, direction: str = "both") -> None:
        super().__init__()
        if delay < 0 or jitter < 0 or delay + jitter <= 0:
            raise ValueError("delay and jitter are seconds, 0 or more, and together more than 0")
        self._delay, self._jitter, self._directions = delay, jitter, directions(direction)

    def shape(self, flow: Flow, data: bytes, now: float) -> Iterator[Piece]:
        late = 0.0
        if flow.direction in self._directions:
            late = self._delay + flow.random.uniform(0.0, self._jitter)
            self.tally.touch(flow.connection, len(data))
        yield Piece(max(now + late, flow.last_due), data)


class Drip(Fault):
    """Each connection gets `rate` bytes per second, a few at a time."""

    name = "drip"

    def __init__(self, rate: float = 1_000.0, direction: str = "both") -> None:
        super().__init__()
        if rate <= 0:
            raise ValueError("rate is bytes per second, more than 0")
        self._rate, self._directions = rate, directions(direction)

    def shape(self, flow: Flow, data: bytes, now: float) -> Iterator[Piece]:
        if flow.direction not in self._directions or not data:
            yield Piece(max(now, flow.last_due), data)
            return
        self.tally.touch(flow.connection, len(data))
        yield from dripped(data, max(now, flow.last_due), self._rate)


class HalfOpen(Fault):
    """The peer is gone without a word: connections are accepted, bytes are swallowed, no answer comes.

    `direction`: `both` (the server sees nothing of new connections), or the one that is cut; the other one works.
    """

    name = "half-open"
    hides_the_end = True

    def __init__(self, direction: str = "both") -> None:
        super().__init__()
        self._directions = directions(direction)
        self.admission = "silent" if direction == "both" else "pass"

    def shape(self, flow: Flow, data: bytes, now: float) -> Iterator[Piece]:
        if flow.direction in self._directions:
            self.tally.touch(flow.connection, len(data))
            flow.spoiled = True
            return
        yield Piece(max(now, flow.last_due), data)


class BlackHole(HalfOpen):
    """As `HalfOpen`, and the handshake of a new connection gets no answer, unless `accept`."""

    name = "black-hole"

    def __init__(self, accept: bool = False) -> None:
        super().__init__()
        self.admission = "silent" if accept else "unanswered"


class Reset(Fault):
    """Open connections are reset (RST) when it begins, new ones as soon as they are accepted."""

    name = "reset"
    admission: Admission = "reset"
    resets_open = True


class Corrupt(Fault):
    """Of every `every` bytes about one is another one: what a broken box between the two does behind TCP's checksum."""

    name = "corrupt"

    def __init__(self, every: int = 1_000, direction: str = "both") -> None:
        super().__init__()
        if every < 1:
            raise ValueError("every is a number of bytes, 1 or more")
        self._every, self._directions = every, directions(direction)

    def shape(self, flow: Flow, data: bytes, now: float) -> Iterator[Piece]:
        if flow.direction in self._directions and data:
            data = self._spoil(flow, data)
        yield Piece(max(now, flow.last_due), data)

    def _spoil(self, flow: Flow, data: bytes) -> bytes:
        spoiled = bytearray(data)
        at = int(flow.random.expovariate(1 / self._every))
        while at < len(spoiled):
            spoiled[at] ^= flow.random.randrange(1, 256)
            self.tally.touch(flow.connection, 1)
            flow.spoiled = True
            at += 1 + int(flow.random.expovariate(1 / self._every))
        return bytes(spoiled)


def dripped(data: bytes, start: float, rate: float) -> Iterator[Piece]:
    """`data` in pieces that leave at `rate` bytes per second."""
    step = max(1, int(rate * DRIP_TICK_SECONDS))
    for at in range(0, len(data), step):
        piece = data[at : at + step]
        yield Piece(start + (at + len(piece)) / rate, piece)
