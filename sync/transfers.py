"""What one refresh of the update metadata asks of one source, bounded as a whole: one that drips must not starve the next."""

from __future__ import annotations

import asyncio
from concurrent.futures import CancelledError

from sync.errors import Unavailable
from sync.fetch import Fetcher, Source

PATH = "/tuf/"
"""Where a source has the metadata."""
SOURCE_SECONDS = 60.0
"""What one source may take of a refresh: the next one gets its turn before whoever waits has given up. What came is kept."""


class Transfers:
    """What is asked of one source in one refresh, until it is cut. Lives in the event loop; `get` is for another thread."""

    def __init__(self, fetcher: Fetcher, source: Source) -> None:
        self.url = source.url
        self._fetcher = fetcher
        self._source = source
        self._loop = asyncio.get_running_loop()
        self._under_way: asyncio.Future[bytes] | None = None
        self._over = False

    def get(self, path: str, limit: int) -> bytes:
        """A metadata file; blocks."""
        try:
            return asyncio.run_coroutine_threadsafe(self.bring(PATH + path, limit), self._loop).result()
        except (CancelledError, RuntimeError) as error:
            raise Unavailable("the transfer was cancelled") from error

    async def bring(self, path: str, limit: int) -> bytes:
        """Raises what `Fetcher.get` does; Unavailable when it was cut."""
        why = f"{self.url} was not done within {SOURCE_SECONDS:g} s"
        if self._over:
            raise Unavailable(why)
        self._under_way = asyncio.ensure_future(self._fetcher.get(self._source, path, limit))
        try:
            return await self._under_way
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise
            raise Unavailable(why) from None

    def cut(self, end: object = None) -> None:
        self._over = True
        if self._under_way is not None:
            self._under_way.cancel()
