"""A node's bundles: each one found below its data folder becomes the first source, and its documents are offered.

From there on everything goes its usual way: metadata, documents and files of a bundle are verified like those of a network.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from sync.bundle import Index, read_back, remove
from sync.clock import Clock
from sync.errors import SyncError
from sync.fetch import Fetcher, Source
from sync.packages import Packages
from sync.trust import unseal
from sync.updater import Updater

POLL_SECONDS = 2.0
"""How often the folder is looked at: a person waits for it."""
KEEP_SECONDS = 30 * 86_400.0
"""A bundle whose documents wait (for a window, a hold, a file it does not have) stays a source for so long."""
SETTLE_SECONDS = 60.0
"""A report may still be about an older document; after so long it is about the one that was offered."""
MAX_BUNDLES = 8
ENDED = ("refused", "rolled_back")

log = logging.getLogger(__name__)

_NAME = re.compile(r"[0-9a-f]{16}")


class Outcome(msgspec.Struct, frozen=True):
    """What became of a bundle: by kind of document a state and why; `error`: why it was not read at all."""

    states: dict[str, str] = {}
    errors: dict[str, str] = {}
    error: str = ""


@dataclass(frozen=True, slots=True)
class _Open:
    source: Source
    index: Index
    revisions: Mapping[str, int]
    at: float


class Bundles:
    """`folder`: where `sync.bundle_import` puts them. `cache`: files that no document names are kept in the store."""

    def __init__(
        self,
        folder: Path,
        fetcher: Fetcher,
        packages: Packages,
        updaters: Mapping[str, Updater],
        clock: Clock,
        *,
        cache: bool = False,
    ) -> None:
        self._folder = folder
        self._fetcher = fetcher
        self._packages = packages
        self._updaters = updaters
        self._clock = clock
        self._cache = cache
        self._open: dict[str, _Open] = {}

    async def run(self) -> None:
        """Look now and again, until cancelled."""
        while True:
            try:
                for name in await asyncio.to_thread(self._names):
                    await self._look_at(name)
            except Exception:
                log.exception("the bundles could not be looked at")
            await self._clock.sleep(POLL_SECONDS)

    def _names(self) -> list[str]:
        try:
            with os.scandir(self._folder) as found:
                names = [entry.name for entry in found if _NAME.fullmatch(entry.name)]
        except FileNotFoundError:
            return []
        return sorted(names)[:MAX_BUNDLES]

    async def _look_at(self, name: str) -> None:
        if name not in self._open:
            try:
                await self._take(name)
            except SyncError as error:
                log.warning("bundle %s is of no use: %s", name, error)
                await self._close(name, Outcome(error=f"{error.code}: {error}"))
                return
        opened = self._open.get(name)
        if opened is not None and (outcome := self._outcome(opened)) is not None:
            await self._close(name, outcome)

    async def _take(self, name: str) -> None:
        """Make it a source, then read what it says. Raises a SyncError when it is refused as a whole."""
        folder = self._folder / name
        index, envelopes = await asyncio.to_thread(read_back, folder)
        source = Source(f"file://{folder}")
        self._fetcher.add(source)
        offered: dict[str, int] = {}
        try:
            await self._packages.refresh()
            for envelope in envelopes:
                document = unseal(envelope).document
                updater = self._updaters.get(document.kind)
                if updater is not None and updater.scope == document.scope:
                    offered[document.kind] = document.revision
                    updater.offer(envelope)
            if not offered and self._cache:
                await self._keep(index)
        except BaseException:
            self._fetcher.drop(source)
            raise
        self._open[name] = _Open(source, index, offered, self._clock.monotonic())
        log.info("bundle %s: %d files, documents: %s", name, len(index.files), ", ".join(offered) or "none")

    async def _keep(self, index: Index) -> None:
        for digest, size in (await self._packages.require(tuple(index.files))).items():
            await self._fetcher.fetch(digest, size)

    def _outcome(self, opened: _Open) -> Outcome | None:
        """None while it may still be needed."""
        if not opened.revisions:
            late = self._clock.wall() - opened.index.made > KEEP_SECONDS
            return Outcome() if self._cache or late else None
        states, errors = {}, {}
        for kind, revision in opened.revisions.items():
            report = self._updaters[kind].report
            settled = report.revision >= revision or self._clock.monotonic() - opened.at > SETTLE_SECONDS
            over = report.applied >= revision or (settled and report.state in ENDED)
            if not over and self._clock.wall() - opened.index.made <= KEEP_SECONDS:
                return None
            states[kind] = report.state
            if report.error:
                errors[kind] = report.error
        return Outcome(states, errors)

    async def _close(self, name: str, outcome: Outcome) -> None:
        opened = self._open.pop(name, None)
        if opened is not None:
            self._fetcher.drop(opened.source)
        await asyncio.to_thread(self._finish, name, outcome)

    def _finish(self, name: str, outcome: Outcome) -> None:
        remove(self._folder / name)
        try:
            staged = self._folder / f"{name}.json.new"
            staged.write_bytes(msgspec.json.encode(outcome))
            staged.replace(self._folder / f"{name}.json")
        except OSError as error:
            log.warning("what became of bundle %s could not be written: %s", name, error)
