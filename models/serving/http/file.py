"""A file as the pieces of an answer's body, read in a thread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

from models.serving.exchange import FileBody

PIECE_BYTES = 256 * 1024


async def read_pieces(body: FileBody) -> AsyncIterator[bytes]:
    """The bytes that `body` stands for. Raises OSError, or EOFError when the file is shorter than promised."""
    loop = asyncio.get_running_loop()
    offset, left = body.offset, body.length
    while left:
        size = min(PIECE_BYTES, left)
        piece = await loop.run_in_executor(None, _read_piece, body.path, offset, size)
        if body.sending is not None:
            body.sending.sent(size)
        yield piece
        offset += size
        left -= size


def _read_piece(path: Path, offset: int, size: int) -> bytes:
    # Opened for each piece: nothing is held open for a client that reads slowly, or went away.
    with path.open("rb") as file:
        file.seek(offset)
        piece = file.read(size)
    if len(piece) != size:
        raise EOFError(f"{path} ends before byte {offset + size}")
    return piece
