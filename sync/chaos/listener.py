"""A listening TCP socket that can be made deaf: handshakes get no answer at all, as from a host that is gone.

Linux drops the SYN of a connection for which the accept queue has no room (tcp_conn_request). So a deaf listener asks for
the shortest queue, fills it with a connection of its own, and accepts nothing. The socket counts what it dropped.
"""

from __future__ import annotations

import asyncio
import socket
import struct

BACKLOG = 128
FILL_SECONDS = 0.05
"""A loopback handshake that takes longer gets no answer."""
MAX_FILLERS = 8
_SO_MEMINFO = 55  # Linux 4.12, asm-generic/socket.h; the ninth number is the count of dropped packets


class Listener:
    """`address`: where it listens, the port as chosen by the system when 0 was asked for."""

    def __init__(self, host: str, port: int) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind((host, port))
            self._socket.listen(BACKLOG)
        except OSError:
            self._socket.close()
            raise
        self._socket.setblocking(False)
        self.address: tuple[str, int] = self._socket.getsockname()[:2]
        self._fillers: list[socket.socket] = []
        self._own_ports: set[int] = set()
        self._dropped_before = 0

    async def accept(self) -> socket.socket:
        """The next connection that is not one of our own fillers."""
        loop = asyncio.get_running_loop()
        while True:
            client, peer = await loop.sock_accept(self._socket)
            if peer[1] not in self._own_ports:
                return client
            self._own_ports.discard(peer[1])
            client.close()

    async def deafen(self) -> None:
        """From here on handshakes get no answer. The caller must not accept meanwhile."""
        self._socket.listen(0)
        for _ in range(MAX_FILLERS):
            if not await self._fill():
                break
        self._dropped_before = self._dropped()

    def hear(self) -> int:
        """Answer again. How many handshakes (each attempt's repetitions included) got no answer meanwhile."""
        unanswered = self._dropped() - self._dropped_before
        for filler in self._fillers:
            filler.close()
        self._fillers.clear()
        self._socket.listen(BACKLOG)
        return unanswered

    def close(self) -> None:
        for filler in self._fillers:
            filler.close()
        self._socket.close()

    async def _fill(self) -> bool:
        filler = socket.socket(self._socket.family, socket.SOCK_STREAM)
        filler.setblocking(False)
        try:
            async with asyncio.timeout(FILL_SECONDS):
                await asyncio.get_running_loop().sock_connect(filler, self.address)
        except (TimeoutError, OSError):
            filler.close()
            return False
        self._fillers.append(filler)
        self._own_ports.add(filler.getsockname()[1])
        return True

    def _dropped(self) -> int:
        try:
            return struct.unpack("9I", self._socket.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, 36))[8]  # type: ignore[no-any-return]
        except (OSError, struct.error):
            return 0  # another kernel: attempts cannot be counted, only connections that were open
