"""Being a node: `async with join(...)` is all that the edge node, the cloud worker and the device agent call."""

from __future__ import annotations

import asyncio
import fcntl
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from math import inf
from pathlib import Path
from typing import TextIO

from msgspec.structs import replace

from sync.activation import Activator, Probation
from sync.alarms import Alarms, Judge
from sync.blocks import Blocks, BlockSettings
from sync.bundle_import import FOLDER as BUNDLES
from sync.bundle_watch import Bundles
from sync.channel import LinkLike, LinkOptions
from sync.clock import Clock, SystemClock
from sync.control import DESIRED, POLICY, SETTINGS, SOFTWARE, ControlPlane, lost, new_boot_id
from sync.credentials import Credentials, Identity
from sync.download import Limits, Route
from sync.errors import InvalidConfig, StoreFailed
from sync.fetch import Fetcher, Source
from sync.gate import Gate
from sync.holds import Holds
from sync.identity import Membership
from sync.messages import Capabilities, DocumentReport
from sync.outbox import Outbox
from sync.outbox_sender import Sender
from sync.packages import Packages
from sync.quota import Quota
from sync.renewal import Renewal
from sync.rpc import Answerer
from sync.schema import check_folder
from sync.settings import Settings, SettingsBook
from sync.state import StateStore
from sync.store import BlobStore
from sync.sweep import Sweeper
from sync.tunnel import read_proxy
from sync.update_events import UpdateEvents
from sync.updater import Updater

STOP_SECONDS = 2.0
ENDS = ("applied", "refused", "rolled_back")
"""States of an update after which files may have become superfluous."""


@dataclass(frozen=True, slots=True)
class Member:
    """What the rest of the process may use of the control plane."""

    store: BlobStore
    packages: Packages
    fetcher: Fetcher
    updaters: Mapping[str, Updater]
    control: ControlPlane
    link: LinkLike
    outbox: Outbox
    holds: Holds
    sweeper: Sweeper
    rpc: Answerer

    def hold(self, reason: str, seconds: float | None = None) -> Callable[[], None]:
        """Delay the activation of updates until the returned function is called, `seconds` are over, or the settings' limit.

        Await `settled` to know that none is being activated just now. Raises Malformed.
        """
        made = self.holds.hold(reason, seconds)

        def release() -> None:
            self.holds.release(made.id)

        return release

    async def settled(self) -> None:
        """Return when no activation is under way."""
        for updater in self.updaters.values():
            await updater.settled()

    @property
    def connected(self) -> bool:
        """Whether the broker is reached; serving does not depend on it."""
        return self.link.connected


@asynccontextmanager
async def join(
    membership: Membership,
    *,
    activators: Mapping[str, Activator],
    capabilities: Capabilities,
    running: Callable[[], dict[str, str]],
    clock: Clock | None = None,
    link: LinkLike | None = None,
    keep: Callable[[], Iterable[str]] = tuple,
    probation: Probation | None = None,
    limits: Limits | None = None,
    settings: Settings | None = None,
    on_settings: Callable[[Settings], None] | None = None,
    quota: Quota | None = None,
    blocks: BlockSettings | None = None,
) -> AsyncIterator[Member]:
    """Start from the disk what ran before, without any network, then follow the hub until the block ends.

    `activators`: by kind, `desired` and/or `policy`. `running`: model name -> package/version, asked for every report.
    `link`: an open link of the caller's instead of our own. `keep`: digests, beyond those of the stored documents, that
    the store must not lose; asked in a thread. `settings`: of the node's configuration; the hub's replace them field by
    field. `on_settings` hears of those in force, now and whenever they change. `quota`: how much disk the files may take.
    `blocks`: whether files come over MQTT when nothing else delivers them. Raises InvalidConfig, StoreFailed.
    """
    clock = clock or SystemClock()
    root, credentials = membership.pinned(), membership.credentials(clock)
    async with AsyncExitStack() as stack:
        stack.callback(_locked(membership.data).close)
        state = StateStore(membership.data / "state.db")
        stack.callback(state.close)
        store = BlobStore(membership.data)
        fetcher = Fetcher(sources_of(membership, credentials), store, clock=clock, limits=limits)
        stack.callback(fetcher.close)
        packages = Packages(fetcher, state, root, clock, membership.data / "tuf")
        stack.callback(packages.close)
        outbox = await stack.enter_async_context(Outbox(membership.data / "outbox.db", clock=clock))
        tell_outcome = UpdateEvents(outbox)
        book = SettingsBook(settings)
        holds = Holds(clock, lambda: book.current.max_hold_seconds, state)
        holds.restore()
        gates = _gates(holds, book, clock)
        book.watch(lambda now: fetcher.pace.limit(now.bandwidth))
        if on_settings is not None:
            book.watch(on_settings)
        control: ControlPlane | None = None

        def on_report(kind: str, report: DocumentReport) -> None:
            tell_outcome(kind, report)
            if kind in (DESIRED, SOFTWARE) and report.state in ENDS:
                sweeper.look_again()
            if control is not None:
                control.changed(kind, report)

        def needed() -> Collection[str]:
            return {*keep(), *(digest for updater in updaters.values() for digest in updater.needed())}

        sweeper = Sweeper(store, needed, quota or Quota(), clock)
        fetcher.room_for = sweeper.room_for
        updaters = {
            kind: Updater(
                kind,
                scope_of(kind, membership),
                activator,
                state=state,
                store=store,
                packages=packages,
                fetcher=fetcher,
                clock=clock,
                capabilities={"engines": list(capabilities.engines)},
                on_report=on_report,
                # Nothing but its own word proves another version of the software.
                probation=Probation(seconds=inf, poll=1.0) if kind == SOFTWARE else probation,
                settings=lambda: book.current,
                gate=gates.get(kind),
            )
            # Settings first: they say when the others may go on.
            for kind, activator in {SETTINGS: book, **activators}.items()
        }
        for updater in updaters.values():
            await updater.start()
            stack.push_async_callback(updater.close)
        await sweeper.sweep()
        caching = sweeper.quota.cache_bytes > 0
        bundles = Bundles(membership.data / BUNDLES, fetcher, packages, updaters, clock, cache=caching)
        boot = new_boot_id()
        channel = link
        if channel is None:
            channel = await stack.enter_async_context(_open_link(membership, credentials, boot))
            channel.on_connect(credentials.connected)
        alarms = Alarms(_judges(packages, credentials, clock), outbox, clock)
        sender = Sender(outbox, channel, membership.id, clock)
        rpc = await stack.enter_async_context(Answerer(channel, membership.id, clock))
        control = ControlPlane(
            channel,
            membership.id,
            updaters,
            capabilities=capabilities,
            running=running,
            clock=clock,
            boot=boot,
            groups=membership.groups,
            handlers={
                "ack": outbox.acknowledge,
                "rpc": rpc.hear,
                **_over_mqtt(blocks or BlockSettings(), channel, membership.id, clock, fetcher),
            },
            on_hub=sender.hub_started,
            alarms=lambda: alarms.raised,
        )
        alarms.on_change = control.say_again
        for task in (
            asyncio.create_task(packages.run(), name="update metadata"),
            asyncio.create_task(sender.run(), name="event sender"),
            asyncio.create_task(sweeper.run(), name="store sweeper"),
            asyncio.create_task(bundles.run(), name="bundles"),
            asyncio.create_task(alarms.run(), name="alarms"),
            asyncio.create_task(control.run(), name="control plane"),
        ):
            stack.push_async_callback(_stop, task)
        _keep_certified(stack, membership, credentials, clock)
        yield Member(store, packages, fetcher, updaters, control, channel, outbox, holds, sweeper, rpc)


def _judges(packages: Packages, credentials: Credentials, clock: Clock) -> Mapping[str, Judge]:
    """What may be wrong with a node that serves as ever."""

    def certificate() -> str:
        late = clock.wall() - credentials.pair.not_after if isinstance(credentials, Identity) else 0.0
        return f"the certificate expired {late / 3600:.1f} hours ago" if late > 0 else ""

    return {"update-repository": lambda: packages.status().alarm, "certificate": certificate}


def _over_mqtt(
    settings: BlockSettings, link: LinkLike, node_id: str, clock: Clock, fetcher: Fetcher
) -> Mapping[str, Callable[[bytes], None]]:
    """Files over MQTT as the fetcher's last source, and what hears the blocks."""
    if not settings.enabled:
        return {}
    blocks = Blocks(link, node_id, clock, settings, fetcher.pace)
    fetcher.fall_back_to(blocks)
    return {"block": blocks.heard}


def _gates(holds: Holds, book: SettingsBook, clock: Clock) -> Mapping[str, Gate]:
    """By kind of document, for those that wait for holds and windows. What the settings' `force` numbers are revisions of
    models."""
    gates = {
        DESIRED: Gate(holds, lambda: book.current, clock),
        SOFTWARE: Gate(holds, lambda: replace(book.current, force=0), clock),
    }

    def look_again(_: Settings) -> None:
        for gate in gates.values():
            gate.look_again()

    book.watch(look_again)
    return gates


def scope_of(kind: str, membership: Membership) -> str:
    """Whom a document of `kind` must be for to be for this node. Raises InvalidConfig for a kind nobody sends."""
    if kind in (DESIRED, SETTINGS, SOFTWARE):
        return f"node:{membership.id}"
    if kind == POLICY:
        return f"tenant:{membership.tenant}"
    raise InvalidConfig(f"no document of kind {kind!r} is ever sent to a node")


def _locked(data: Path) -> TextIO:
    """Two processes on one folder would write into each other's downloads. The kernel ends the lock with the process."""
    try:
        data.mkdir(parents=True, exist_ok=True)
        check_folder(data)
        file = (data / "lock").open("w")
    except OSError as error:
        raise StoreFailed(f"could not lock {data}: {error}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise InvalidConfig(f"node.data: {data} is in use by another process") from error
    return file


def sources_of(membership: Membership, credentials: Credentials) -> list[Source]:
    """Where files come from. Mirrors need not be trusted: none sees a bearer token, with which it could ask the hub in the
    node's name. Who is the hub is asked for each transfer: renewal may bring another answer."""
    found = []
    for url in membership.sources:
        proxy = membership.proxy_to(url)
        route = Route(credentials.http_context, read_proxy(proxy) if proxy else None)
        found.append(Source(url, partial(membership.bearer_at, url, credentials), route))
    return found


def _keep_certified(stack: AsyncExitStack, membership: Membership, credentials: Credentials, clock: Clock) -> None:
    """Renew the certificate until `stack` ends."""
    hub = membership.hub
    if isinstance(credentials, Identity) and hub is not None:
        renewal = Renewal(credentials, hub, clock, proxy=membership.proxy_to(hub), fleet_size=membership.fleet)
        stack.push_async_callback(_stop, asyncio.create_task(renewal.run(), name="certificate renewal"))


def _open_link(membership: Membership, credentials: Credentials, boot: str) -> AbstractAsyncContextManager[LinkLike]:
    from sync.link import Link

    return Link(
        LinkOptions(
            url=membership.broker,
            client_id=membership.id,
            username=membership.id,
            password=credentials.password,
            will=lost(membership.id, boot),
            fleet_size=membership.fleet,
            tls=credentials.link_context,
            proxy=membership.proxy_to(membership.broker),
        )
    )


async def _stop(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task}, timeout=STOP_SECONDS)
