"""Keeps a node's certificate young: at a third of its life with jitter, and after its expiry just the same.

The proof is a signature by the present key over a nonce of the hub's, sent over TLS that only the hub has to pass: nothing here
asks whether the node's own certificate is still valid. The running connection is left alone; the next one shows the new pair.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable

import msgspec

from sync.channel import spread
from sync.clock import Clock
from sync.credentials import Identity, new_key, request
from sync.enrol_messages import MAX_ANSWER_BYTES, Challenge, Enrolled, Leave, Nonce, Renew, proof_bytes
from sync.errors import SyncError
from sync.hub_call import HubRefused, call
from sync.messages import decode

FIRST_RETRY_SECONDS = 15.0
LAST_RETRY_SECONDS = 300.0
"""A node that comes back after weeks renews at most so long (and half as much again) after the hub is in reach."""
REFUSED_RETRY_SECONDS = 3600.0
SHORTEST_SECONDS = 3600.0
"""Between two renewals: on a machine whose clock is days ahead every new certificate looks old."""
LONGEST_SLEEP_SECONDS = 900.0
"""Longer waits are cut in pieces: the wall clock may jump, and a certificate's dates are in its terms."""

log = logging.getLogger(__name__)


def due_at(not_before: float, not_after: float, uniform: Callable[[float, float], float]) -> float:
    """When to renew: at a third of the life, and up to a tenth of it later, so that a fleet spreads. Unix seconds."""
    life = not_after - not_before
    return not_before + life / 3 + uniform(0.0, life / 10)


class Renewal:
    """`hub`: base URL of its API. `changed` is told after each renewal how large the fleet is."""

    def __init__(
        self,
        identity: Identity,
        hub: str,
        clock: Clock,
        *,
        proxy: str | None = None,
        fleet_size: int = 1,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._identity = identity
        self._hub = hub
        self._clock = clock
        self._proxy = proxy
        self._uniform = uniform
        self.fleet_size = fleet_size
        self.renewed = 0
        self.trouble: str | None = None

    async def run(self) -> None:
        """Until cancelled. What goes wrong is told to the log, once per kind, and tried again; serving never hears of it."""
        failures, pause, due = 0, 0.0, self._due()
        while True:
            # Pauses are durations and the date is the certificate's: a clock that is set right meanwhile upsets neither.
            await self._clock.sleep(pause)
            await self._until(due)
            try:
                await asyncio.to_thread(self.renew)
            except HubRefused as error:
                failures += 1
                self._tell(f"the hub refuses to renew the certificate: {error}")
                pause = self._uniform(0.5, 1.5) * REFUSED_RETRY_SECONDS
            except (SyncError, OSError) as error:
                failures += 1
                self._tell(f"the certificate could not be renewed: {error}")
                pause = self._retry(failures)
            except Exception:
                log.exception("renewing the certificate failed")
                pause = LAST_RETRY_SECONDS
            else:
                failures, self.trouble = 0, None
                log.info("the certificate was renewed")
                pause, due = SHORTEST_SECONDS, self._due()

    def renew(self) -> None:
        """One renewal, blocking. Raises HubRefused, Unavailable, Malformed, StoreFailed."""
        node, key = self._identity.pair.node, new_key()
        nonce = self._nonce(node)
        csr = request(key, node)
        proof = self._identity.sign(proof_bytes("renew", node, nonce, csr))
        answer = decode(self._post("renew", Renew(node, nonce, csr, proof)), Enrolled, MAX_ANSWER_BYTES)
        # The hub took a proof by this pair's key: what was before it is not needed any more.
        self._identity.forget_older()
        self._identity.replace(key, answer.certificate, answer.bundle, answer.sources)
        self.fleet_size = max(answer.fleet, 1)
        self.renewed += 1

    def leave(self) -> None:
        """Ask the hub to forget this node, blocking. Raises as `renew`."""
        node = self._identity.pair.node
        nonce = self._nonce(node)
        self._post("leave", Leave(node, nonce, self._identity.sign(proof_bytes("leave", node, nonce))))

    def _nonce(self, node: str) -> str:
        return decode(self._post("renew/challenge", Challenge(node)), Nonce).nonce

    def _post(self, path: str, body: msgspec.Struct) -> bytes:
        return call(f"{self._hub}/api/v1/{path}", body, self._identity.http_context(), self._proxy)

    def _due(self) -> float:
        pair = self._identity.pair
        if pair.hub_origins is None:
            # Until the hub has said where it is, only the URL by which the node joined is shown its bearer token.
            return self._clock.wall() + self._uniform(0.0, spread(self.fleet_size))
        return due_at(pair.not_before, pair.not_after, self._uniform)

    def _retry(self, failures: int) -> float:
        """Backoff, plus the fleet's spread: after an outage everybody asks."""
        wait = min(LAST_RETRY_SECONDS, FIRST_RETRY_SECONDS * 2.0 ** min(failures - 1, 8))
        return wait * self._uniform(0.5, 1.5) + self._uniform(0.0, spread(self.fleet_size))

    async def _until(self, due: float) -> None:
        while (left := due - self._clock.wall()) > 0:
            await self._clock.sleep(min(left, LONGEST_SLEEP_SECONDS))

    def _tell(self, trouble: str) -> None:
        if trouble != self.trouble:
            self.trouble = trouble
            log.warning("%s; it is tried again, and serving does not depend on it", trouble)
