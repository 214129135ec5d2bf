"""Compressed bodies: gzip and deflate in both directions, within bounds on size, memory and time in the event loop.

Sources: RFC 9110 8.4 and 12.5.3 (content codings), RFC 1950 to 1952 (zlib, deflate, gzip). Infer answers are compressed when
the caller's Accept-Encoding prefers that and they have at least `MIN_PACKED_BYTES`; other answers are small and never are.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Mapping

from models.errors import InvalidRequest, Overloaded, TooLarge, UnsupportedEncoding
from models.serving.exchange import HttpRequest, HttpResponse
from models.serving.memory import give_back

MAX_EXPANDED_BYTES = 64 * 1024 * 1024
"""Most bytes one body may expand to: what the server takes uncompressed, too."""
MAX_HELD_BYTES = 256 * 1024 * 1024
"""Most expanded bytes of all requests at once: a client that sends 64 KiB may mean 64 MiB, many times over."""
INLINE_BYTES = 256 * 1024
"""Up to here, compressed and expanded, a body is expanded in the event loop, which takes 1 ms; beyond it in a thread."""
PACK_INLINE_BYTES = 64 * 1024
"""Up to here an answer is compressed in the event loop, which takes 1 to 2 ms; beyond it in a thread."""
STEP_BYTES = 1024 * 1024
"""Expanded in a thread at a time: what is held is counted after each step."""
SLICE_BYTES = 64 * 1024
"""Given to zlib at a time: what it leaves over is copied."""
MIN_PACKED_BYTES = 1024
"""Shortest answer that is compressed: below it the time costs more than the bytes."""
LEVEL = 1
"""Of compression: numbers hardly shrink further at higher ones, which take many times as long."""

GZIP, DEFLATE = "gzip", "deflate"
_GZIP_WINDOW, _ZLIB_WINDOW, _RAW_WINDOW = 16 + zlib.MAX_WBITS, zlib.MAX_WBITS, -zlib.MAX_WBITS
_MAX_CODINGS = 16  # an Accept-Encoding names three or four


def content_coding(headers: Mapping[bytes, bytes]) -> str | None:
    """How the body was compressed: "gzip", "deflate" or None. Raises UnsupportedEncoding."""
    value = headers.get(b"content-encoding")
    if value is None:
        return None
    match value.strip().lower():
        case b"" | b"identity":
            return None
        case b"gzip" | b"x-gzip":  # RFC 9110 8.4.1.3: the two are the same
            return GZIP
        case b"deflate":
            return DEFLATE
    raise UnsupportedEncoding(
        f"content encoding {value.decode('latin-1')!r} is not supported: send gzip, deflate, or the body as it is"
    )


def accepted_coding(headers: Mapping[bytes, bytes]) -> str | None:
    """The coding that Accept-Encoding prefers, gzip among equals; None = the body as it is.

    A header that does not parse asks for nothing: the plain body is always acceptable.
    """
    value = headers.get(b"accept-encoding")
    if value is None:
        return None
    weights: dict[str, float] = {}
    for item in value.decode("latin-1").lower().split(",", _MAX_CODINGS)[:_MAX_CODINGS]:
        name, _, parameter = item.partition(";")
        weights[name.strip().removeprefix("x-")] = _weight(parameter)
    rest = weights.get("*", 0.0)
    best = max((GZIP, DEFLATE), key=lambda name: weights.get(name, rest))  # the first of equals
    weight = weights.get(best, rest)
    return best if weight > 0 and weight >= weights.get("identity", 0.0) else None


def _weight(parameter: str) -> float:
    """Of `q=0.5`; 1 when there is none, 0 when it is no number from 0 to 1 (RFC 9110 12.4.2)."""
    name, _, value = parameter.strip().partition("=")
    if not name:
        return 1.0
    try:
        weight = float(value)
    except ValueError:
        return 0.0
    return weight if name.strip() == "q" and 0 <= weight <= 1 else 0.0


TRIM_BYTES = 16 * 1024 * 1024
"""After so many expanded bytes at once the allocator would keep tens of megabytes in pieces that nothing else fits."""


class Expander:
    """Expands bodies; `held` counts the bytes of all that were not given back. For one event loop."""

    def __init__(self, max_held: int = MAX_HELD_BYTES) -> None:
        self.held = 0
        self._max_held = max_held
        self._peak = 0
        self._trimming = False

    async def expand(self, body: bytes, coding: str, limit: int = MAX_EXPANDED_BYTES) -> bytes:
        """`body` without its coding, at most `limit` bytes of it; to be given back by `release(len(...))`.

        Raises InvalidRequest for data that is broken, cut short or followed by more, TooLarge above the limit, Overloaded
        when too much is held already.
        """
        inflater = _Inflater(body, coding)
        pieces: list[bytes] = []
        held = 0
        try:
            if len(body) <= INLINE_BYTES:
                pieces.append(inflater.step(min(INLINE_BYTES, limit + 1)))
                held = self._hold(held, len(pieces[-1]), limit)
            loop = asyncio.get_running_loop()
            while not inflater.ended:
                most = min(STEP_BYTES, limit + 1 - held)
                pieces.append(await loop.run_in_executor(None, inflater.step, most))
                held = self._hold(held, len(pieces[-1]), limit)
        except BaseException:
            self.release(held)
            raise
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def release(self, size: int) -> None:
        """`size` expanded bytes are needed no more. After many the allocator is asked, off the loop, to let go of them too."""
        self._peak = max(self._peak, self.held)
        self.held -= size
        if self._peak >= TRIM_BYTES and self.held < self._peak // 2 and not self._trimming:
            self._trimming = True
            self._peak = 0
            asyncio.get_running_loop().run_in_executor(None, give_back).add_done_callback(self._trimmed)

    def _trimmed(self, _: object) -> None:
        self._trimming = False

    def _hold(self, held: int, more: int, limit: int) -> int:
        if held + more > limit:
            raise TooLarge(f"the body expands to more than {limit} bytes")
        if self.held + more > self._max_held:
            raise Overloaded("too many compressed requests are in work")
        self.held += more
        return held + more


class _Inflater:
    """One body, expanded step by step."""

    def __init__(self, body: bytes, coding: str) -> None:
        self.ended = False
        self._coding = coding
        self._body = memoryview(body)
        self._offset = 0
        self._zlib = zlib.decompressobj(_GZIP_WINDOW if coding == GZIP else _deflate_window(body))

    def step(self, most: int) -> bytes:
        """Up to `most` more bytes, `most` > 0. Raises InvalidRequest."""
        pieces = []
        while most and not self.ended:
            given: bytes | memoryview = self._zlib.unconsumed_tail
            if not given:
                given = self._body[self._offset : self._offset + SLICE_BYTES]
                self._offset += len(given)
            try:
                piece = self._zlib.decompress(given, most)
            except zlib.error as error:
                raise InvalidRequest(f"the body is not valid {self._coding}") from error
            self.ended = self._zlib.eof
            if not piece and not given and not self.ended:
                raise InvalidRequest(f"the body ends before its {self._coding} data does")
            pieces.append(piece)
            most -= len(piece)
        if self.ended and (self._zlib.unused_data or self._offset < len(self._body)):
            raise InvalidRequest(f"the body goes on after its {self._coding} data has ended")
        return b"".join(pieces)


def _deflate_window(body: bytes) -> int:
    # RFC 9110 8.4.1.2: "deflate" is the zlib format, but some send the bare data. No encoder begins that like a zlib header.
    zlib_header = len(body) > 1 and body[0] & 0x8F == zlib.DEFLATED and (body[0] << 8 | body[1]) % 31 == 0
    return _ZLIB_WINDOW if zlib_header else _RAW_WINDOW


async def read_body(request: HttpRequest, limit: int) -> bytes:
    """The body of a small request, expanded. Raises TooLarge above `limit` bytes, and what `Expander.expand` raises."""
    coding = content_coding(request.headers)
    if len(request.body) > limit:
        raise TooLarge(f"the body exceeds {limit} bytes")
    if coding is None:
        return request.body
    return await Expander(limit).expand(request.body, coding, limit)


async def pack(response: HttpResponse, coding: str) -> HttpResponse:
    """The same answer with its body in `coding`, when it is long enough for that."""
    body = response.body
    parts = body if isinstance(body, list) else [body] if isinstance(body, bytes) else []
    size = sum(map(len, parts))
    if size < MIN_PACKED_BYTES:
        return response
    if size <= PACK_INLINE_BYTES:
        packed = _deflated(parts, coding)
    else:
        packed = await asyncio.get_running_loop().run_in_executor(None, _deflated, parts, coding)
    headers = b"%bcontent-encoding: %b\r\nvary: accept-encoding\r\n" % (response.headers, coding.encode())
    return HttpResponse(response.status, headers, packed)


def _deflated(parts: list[bytes], coding: str) -> list[bytes]:
    deflater = zlib.compressobj(LEVEL, zlib.DEFLATED, _GZIP_WINDOW if coding == GZIP else _ZLIB_WINDOW)
    return [*map(deflater.compress, parts), deflater.flush()]
