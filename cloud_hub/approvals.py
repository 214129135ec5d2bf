"""Which files are approved: what the database says, brought into the update repository, and kept from expiring."""

from __future__ import annotations

import asyncio
import logging
import random
from threading import Lock

from cloud_hub.storage import Storage
from cloud_hub.tuf_repository import Repository
from sync.clock import Clock

TEND_SECONDS = 300.0
"""How often the repository is looked at; half to one and a half times that. Its shortest interval is an hour."""

log = logging.getLogger(__name__)


class Approvals:
    """`keyring`: digest and size of the file of envelope keys. Thread-safe."""

    def __init__(self, storage: Storage, repository: Repository, keyring: tuple[str, int], clock: Clock) -> None:
        self.repository = repository
        self._storage = storage
        self._keyring = keyring
        self._clock = clock
        self._lock = Lock()
        self._told: list[str] = []

    def bring(self) -> None:
        """Make the repository say what the database says. Nothing is signed when it does already.

        Raises TryAgain when the database is locked or a role's key is not here, OSError.
        """
        # One at a time from reading to signing: else an older list could overtake a newer one.
        with self._lock:
            with self._storage.read() as records:
                files = records.approved_files()
            self.repository.publish(files, self._keyring)

    async def run(self) -> None:
        """Sign again what would expire, until cancelled."""
        while True:
            await self._clock.sleep(TEND_SECONDS * random.uniform(0.5, 1.5))  # noqa: S311 - jitter, not a secret
            try:
                await asyncio.to_thread(self.bring)
            finally:
                self.tell()

    def tell(self) -> None:
        """Each problem once when it comes."""
        problems = self.repository.problems()
        for problem in problems:
            if problem not in self._told:
                log.warning("%s", problem)
        self._told = problems
