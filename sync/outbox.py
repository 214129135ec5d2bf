"""Events up, the node's half: what is put in is on the disk, and stays there until the hub says that it has it.

    put, offer -> [waiting] -> one transaction for all that waits -> disk -> Sender -> up/event
    down/ack -> acknowledge -> [waiting] -> the same transaction removes them and counts them as delivered

The disk has a thread of its own, which sleeps when nothing happens; the event loop never waits for it. Whatever the disk does
(full, read-only, a broken file), the node goes on serving: what could not be kept is counted as dropped.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from sync.clock import Clock
from sync.errors import Malformed, StoreFailed
from sync.events import check_body, check_kind, check_priority, decode_ack, new_id
from sync.ledger import Ledger, ledger_of
from sync.outbox_policy import MAX_FLEET, MAX_KINDS, Flight, OutboxPolicy, Uniform
from sync.outbox_store import Change, Damaged, Entry, OutboxStore, Waiting

MAX_BATCH = 512
"""Events of one transaction: one disk flush pays for all of them."""
MAX_WAITING = 10_000
"""Events in memory on their way to the disk, and their bytes: a disk that stalls must not take the node's memory."""
MAX_WAITING_BYTES = 8 * 1024 * 1024
MAX_SETTLING = 10_000
"""Acknowledged ids in memory on their way to the disk; what is beyond is acknowledged again after its repetition."""
CLOSE_SECONDS = 5.0
"""How long `close` waits for the disk to take what waits."""
KEPT_ASIDE = 3
"""Damaged files that are kept; the next one takes the place of the oldest."""
NO_DISK, OVERRUN = "disk", "overrun"
"""Reasons of drops that happen before the disk is reached."""
_SUFFIXES = ("", "-wal", "-shm")

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Put:
    entry: Entry
    done: asyncio.Future[str] | None


class Outbox:
    """Use from one event loop, as `async with`; `put` needs no broker and no hub.

    `flight`: what is under way (the sender's). `on_change` is called when there may be something new to send.
    """

    def __init__(
        self,
        path: Path,
        *,
        clock: Clock,
        policy: OutboxPolicy | None = None,
        uniform: Uniform = random.uniform,
        entropy: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self.policy = policy or OutboxPolicy()
        self.flight = Flight(self.policy.window, uniform)
        self.on_change: Callable[[], None] = lambda: None
        self.boot = ""
        self._path = path
        self._clock = clock
        self._entropy = entropy
        self._waiting: deque[_Put] = deque()
        self._waiting_bytes = 0
        self._delivered: dict[str, None] = {}
        self._refused: dict[str, str] = {}
        self._lost: Counter[tuple[str, str]] = Counter()
        self._kinds: set[str] = set()
        self._sweep = False
        self._work = asyncio.Event()
        self._closing = False
        self._broken = False
        self._set_aside = 0
        self._store: OutboxStore | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="outbox")
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._sweep = True
        self._work.set()
        self._task = asyncio.create_task(self._run(), name="outbox")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Bring what waits to the disk and close the file."""
        self._closing = True
        self._work.set()
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=CLOSE_SECONDS)
            self._task.cancel()
        self._thread.submit(self._close_store)
        self._thread.shutdown(wait=False)
        for item in self._waiting:
            _fail(item, StoreFailed("the outbox was closed before the disk took the event"))

    # --- putting in ---------------------------------------------------------------------------------------------

    async def put(self, kind: str, body: bytes, *, priority: int | None = None, ttl: float | None = None) -> str:
        """Store an event; its id, once it is on the disk.

        `priority`: 0..9, higher is sent first and dropped last; `ttl`: seconds after which it is not worth sending; None = the
        kind's own. Raises Malformed (nothing was enqueued), or StoreFailed: it was dropped, which the ledger says.
        """
        done: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._enqueue(self._entry(kind, body, priority, ttl), done)
        return await done

    def offer(self, kind: str, body: bytes, *, priority: int | None = None, ttl: float | None = None) -> None:
        """Store an event without waiting for the disk. Raises Malformed only; a drop is counted, like every other."""
        self._enqueue(self._entry(kind, body, priority, ttl), None)

    def _entry(self, kind: str, body: bytes, priority: int | None, ttl: float | None) -> Entry:
        policy = self.policy.of(check_kind(kind))
        if kind not in self._kinds and kind not in self.policy.kinds:
            if len(self._kinds) >= MAX_KINDS:
                raise Malformed(f"kind {kind!r}: a node has at most {MAX_KINDS} kinds of events")
            self._kinds.add(kind)
        if ttl is not None and not 0 < ttl < 1e10:
            raise Malformed(f"ttl {ttl} is not a positive number of seconds")
        wall = self._clock.wall()
        return Entry(
            id=new_id(wall, self._entropy(10)),
            kind=kind,
            body=check_body(bytes(body)),
            priority=policy.priority if priority is None else check_priority(priority),
            last=policy.last,
            at=wall,
            ttl=policy.ttl if ttl is None else ttl,
        )

    def _enqueue(self, entry: Entry, done: asyncio.Future[str] | None) -> None:
        item = _Put(entry, done)
        full = len(self._waiting) >= MAX_WAITING or self._waiting_bytes + entry.size > MAX_WAITING_BYTES
        if full or self._closing:
            self._lost[entry.kind, OVERRUN] += 1
            _fail(item, StoreFailed("events come faster than the disk takes them, or the outbox is closed"))
            return
        self._waiting.append(item)
        self._waiting_bytes += entry.size
        self._work.set()

    # --- settling -----------------------------------------------------------------------------------------------

    def acknowledge(self, payload: bytes) -> None:
        """A message on `down/ack`. Raises Malformed."""
        ack = decode_ack(payload)
        self.flight.fleet = max(1, min(ack.fleet, MAX_FLEET))
        if len(self._delivered) + len(self._refused) > MAX_SETTLING:
            return
        for id_, reason in ack.refused.items():
            log.warning("the hub refuses event %s for good: %s", id_[:40], reason[:200])
        self._refused.update(ack.refused)
        self._delivered.update(dict.fromkeys(id_ for id_ in ack.ids if id_ not in self._refused))
        self.flight.settling((*ack.ids, *ack.refused))
        self._work.set()

    def sweep(self) -> None:
        """Have the disk expire what is past its time, and try again what it refused before."""
        self._sweep = True
        self._work.set()

    # --- reading ------------------------------------------------------------------------------------------------

    def ledger(self) -> Ledger:
        """As it is on the disk, with what never got there."""
        store = self._store
        counters, pending = store.snapshot() if store is not None else ({}, {})
        rows = [(*key, count) for key, count in counters.items()]
        for (kind, reason), count in self._lost.items():
            rows += [(kind, "enqueued", "", count), (kind, "dropped", reason, count)]
        return ledger_of(rows, pending, self._set_aside)

    @property
    def pending(self) -> int:
        """Events on the disk."""
        return 0 if self._store is None else self._store.rows

    @property
    def size(self) -> int:
        """Bytes that they count for in the quota."""
        return 0 if self._store is None else self._store.size

    @property
    def resent(self) -> int:
        """Events sent again because no acknowledgement came."""
        return self.flight.resent

    @property
    def starts(self) -> int:
        return 0 if self._store is None else self._store.starts

    @property
    def unwritten(self) -> bool:
        """Whether counts wait for a disk that refused them."""
        return bool(self._lost)

    def totals(self) -> dict[str, int]:
        """enqueued, delivered, expired and, by reason, `dropped.<reason>`: over all kinds."""
        total = self.ledger().total()
        plain = {"enqueued": total.enqueued, "delivered": total.delivered, "expired": total.expired}
        return plain | {f"dropped.{reason}": count for reason, count in total.dropped.items()}

    async def fetch(self, limit: int) -> Waiting:
        """Up to `limit` events to send for the first time by this process. Raises StoreFailed."""
        flying = self.flight.seqs
        return await self._in_thread(lambda store: store.waiting(limit, flying, self._clock.monotonic()))

    async def fetch_again(self, seqs: Sequence[int]) -> Waiting:
        """Those of `seqs` that still wait and are not past their time. Raises StoreFailed."""
        return await self._in_thread(lambda store: store.again(seqs, self._clock.monotonic()))

    async def oldest(self) -> float | None:
        """Unix seconds of the event that has waited longest. Raises StoreFailed."""
        return await self._in_thread(OutboxStore.oldest)

    # --- the disk -----------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            await self._work.wait()
            self._work.clear()
            try:
                while self._waiting or self._delivered or self._refused or self._sweep:
                    await self._commit_once()
            except Exception:
                log.exception("the outbox could not take a batch")
            if self._closing and not self._waiting:
                if self._lost:
                    self._sweep = True
                    await self._commit_once()
                return

    async def _commit_once(self) -> None:
        """Everything that waits, in one transaction; those who put it are told."""
        self._sweep = False
        batch = [self._waiting.popleft() for _ in range(min(MAX_BATCH, len(self._waiting)))]
        self._waiting_bytes -= sum(item.entry.size for item in batch)
        delivered, self._delivered = tuple(self._delivered), {}
        refused, self._refused = self._refused, {}
        lost, self._lost = self._lost, Counter()
        settled = (*delivered, *refused)
        change = Change([item.entry for item in batch], delivered, refused, lost, self.flight.seqs)
        try:
            dropped = await self._in_thread(lambda store: self._apply(store, change))
        except StoreFailed as error:
            self._failed(batch, error)
            self._lost.update(lost)
            self._unsettle(settled)
            return
        except BaseException:
            self._lost.update(lost)
            self._failed(batch, StoreFailed("the outbox failed"))
            self._unsettle(settled)
            raise
        self._tell(working=True)
        self.flight.settled(settled)
        for item in batch:
            if item.entry.id in dropped:
                _fail(item, StoreFailed("dropped: the outbox is full of events worth more"))
            elif item.done is not None and not item.done.done():
                item.done.set_result(item.entry.id)
        self.on_change()

    def _unsettle(self, settled: Sequence[str]) -> None:
        if settled:
            self.flight.unsettled(settled)
            self.on_change()  # they are due again, which nobody waits for

    def _failed(self, batch: Sequence[_Put], error: StoreFailed) -> None:
        self._tell(working=False, why=str(error))
        for item in batch:
            self._lost[item.entry.kind, NO_DISK] += 1
            _fail(item, error)

    def _tell(self, *, working: bool, why: str = "") -> None:
        """Once when it breaks and once when it heals."""
        if self._broken is working:
            self._broken = not working
            if working:
                log.info("the outbox works again")
            else:
                log.error("events are dropped and counted until the outbox works again: %s", why)

    async def _in_thread(self, act: Callable[[OutboxStore], T]) -> T:
        """Run `act` on the open file. Raises StoreFailed."""
        before = self.boot
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._guarded, act)
        except Damaged as error:
            raise StoreFailed(f"the outbox's file is damaged: {error}") from error
        finally:
            if self.boot != before and before:
                self.flight.clear()

    # --- in the thread ------------------------------------------------------------------------------------------

    def _guarded(self, act: Callable[[OutboxStore], T]) -> T:
        try:
            return act(self._opened())
        except Damaged as error:
            self._put_aside(error)
            return act(self._opened())

    def _apply(self, store: OutboxStore, change: Change) -> frozenset[str]:
        if change.flying and store.starts == 1 and not store.rows:
            change = replace(change, flying=())  # a file made anew: the numbers mean nothing in it
        return store.apply(change, wall=self._clock.wall(), monotonic=self._clock.monotonic())

    def _opened(self) -> OutboxStore:
        if self._store is None:
            wall, monotonic = self._clock.wall(), self._clock.monotonic()
            store = OutboxStore(
                self._path, self.policy.quota, wall=wall, monotonic=monotonic, set_aside=self._set_aside
            )
            self._kinds |= store.kinds
            self._set_aside = store.set_aside
            self.boot = store.boot
            self._store = store
        return self._store

    def _put_aside(self, error: Damaged) -> None:
        """Keep the broken file for whoever wants to look into it; go on with an empty one."""
        self._close_store()
        self._set_aside += 1
        name = f"{self._path.name}.damaged-{(self._set_aside - 1) % KEPT_ASIDE + 1}"
        try:
            for suffix in _SUFFIXES:
                self._path.with_name(name + suffix).unlink(missing_ok=True)
                if (broken := self._path.with_name(self._path.name + suffix)).exists():
                    broken.replace(self._path.with_name(name + suffix))
        except OSError as failure:
            raise StoreFailed(f"the damaged outbox could not be put aside: {failure}") from failure
        log.error("the outbox was damaged (%s): put aside as %s, events in it were not delivered", error, name)

    def _close_store(self) -> None:
        store, self._store = self._store, None
        if store is not None:
            try:
                store.close()
            except (StoreFailed, Damaged) as error:
                log.warning("closing the outbox: %s", error)


def _fail(item: _Put, error: StoreFailed) -> None:
    if item.done is not None and not item.done.done():
        item.done.set_exception(error)
