"""The body of one request while it arrives, held to the server's limits. No sockets here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from models.errors import Overloaded, TooLarge

if TYPE_CHECKING:
    from models.serving.http.service import HttpLimits

MAX_PIECES = 1024
"""Pieces of a body that are kept apart: the object around a chunk of two bytes weighs twenty times as much."""


SMALL_BODY_BYTES = 16 * 1024
"""Bodies up to this size are not counted against what all connections may hold: they are bounded by their number."""


class Holder(Protocol):
    """Counts the bytes of bodies that all connections of a server hold."""

    held_bytes: int


class BodyBudget:
    """One connection's share of the bytes that all may hold: what is arriving, and what is in work."""

    __slots__ = ("_arriving", "_holder", "_limit")

    def __init__(self, holder: Holder, limits: HttpLimits) -> None:
        self._holder = holder
        self._limit = limits.held_bytes
        self._arriving = 0

    def arrive(self, received: int) -> bool:
        """More of a body came. False = it is too much: it must be refused."""
        self._arriving += received
        self._holder.held_bytes += received
        return self._arriving <= SMALL_BODY_BYTES or self._holder.held_bytes <= self._limit

    def arrived(self) -> None:
        """The body is whole, or no longer wanted."""
        self._holder.held_bytes -= self._arriving
        self._arriving = 0

    def hold(self, size: int) -> Callable[[], None]:
        """A whole body is kept until what this returns is called, once."""
        self._holder.held_bytes += size

        def let_go() -> None:
            self._holder.held_bytes -= size

        return let_go


class ArrivingBody:
    """Watches `parts`, to which the parser appends pieces of the body, and `trailers`, which it fills after the last one."""

    def __init__(self, parts: list[bytes], trailers: Mapping[bytes, bytes], limits: HttpLimits) -> None:
        self._parts = parts
        self._trailers = trailers
        self._limits = limits
        self.begin()

    def begin(self) -> None:
        self._received = 0
        self._joined = 0  # pieces at the front of the parts that were joined from smaller ones
        self._seen = 0  # parts after the last read
        self._framing = 0  # bytes received since the last piece of the body

    def check(self, received: int) -> None:
        """`received` bytes came and the body has not ended. Raises TooLarge."""
        self._received += received
        parts, limits = self._parts, self._limits
        if self._received > limits.body_bytes + limits.header_bytes:
            raise body_too_large(limits)
        # Trailers, or what stands between two chunks.
        self._framing = self._framing + received if len(parts) == self._seen else 0
        if self._framing > limits.header_bytes or len(self._trailers) > limits.header_count:
            raise head_too_large(limits)
        self.join()
        self._seen = len(parts)

    def join(self) -> None:
        """Keep the number of pieces within its limit."""
        parts = self._parts
        if len(parts) - self._joined > MAX_PIECES:
            # Only the new ones: joining all of them each time would copy a long body over and over.
            parts[self._joined :] = [b"".join(parts[self._joined :])]
            self._joined += 1


def head_too_large(limits: HttpLimits) -> TooLarge:
    return TooLarge(f"request line and headers exceed {limits.header_bytes} bytes or {limits.header_count} headers")


def body_too_large(limits: HttpLimits) -> TooLarge:
    return TooLarge(f"the body exceeds {limits.body_bytes} bytes")


def held_too_much() -> Overloaded:
    return Overloaded("this server holds as many bytes of bodies as it may")
