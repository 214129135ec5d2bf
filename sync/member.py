"""Being a node: `async with join(...)` is all that the edge node, the cloud worker and the device agent call."""

from __future__ import annotations

import asyncio
import fcntl
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from sync.activation import Activator, Probation
from sync.channel import LinkLike, LinkOptions
from sync.clock import Clock, SystemClock
from sync.control import DESIRED, POLICY, ControlPlane, lost, new_boot_id
from sync.download import Limits
from sync.errors import InvalidConfig, StoreFailed
from sync.fetch import Fetcher, Source
from sync.identity import Membership
from sync.messages import Capabilities, DocumentReport
from sync.packages import Packages
from sync.state import StateStore
from sync.store import BlobStore
from sync.updater import Updater

STOP_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Member:
    """What the rest of the process may use of the control plane."""

    store: BlobStore
    packages: Packages
    fetcher: Fetcher
    updaters: Mapping[str, Updater]
    control: ControlPlane
    link: LinkLike

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
) -> AsyncIterator[Member]:
    """Start from the disk what ran before, without any network, then follow the hub until the block ends.

    `activators`: by kind, `desired` and/or `policy`. `running`: model name -> package/version, asked for every report.
    `link`: an open link of the caller's instead of our own. `keep`: digests, beyond those of the stored documents, that
    the store must not lose when it is swept at the start. Raises InvalidConfig, StoreFailed.
    """
    clock = clock or SystemClock()
    keyring, token = membership.pinned(), membership.token()
    async with AsyncExitStack() as stack:
        stack.callback(_locked(membership.data).close)
        state = StateStore(membership.data / "state.db")
        stack.callback(state.close)
        store = BlobStore(membership.data)
        fetcher = Fetcher([Source(url, token) for url in membership.sources], store, clock=clock, limits=limits)
        stack.callback(fetcher.close)
        packages = Packages(fetcher, state, keyring, clock)
        control: ControlPlane | None = None

        def on_report(kind: str, report: DocumentReport) -> None:
            if control is not None:
                control.changed(kind, report)

        updaters = {
            kind: Updater(
                kind,
                scope_of(kind, membership),
                activator,
                state=state,
                store=store,
                packages=packages,
                fetcher=fetcher,
                keyring=keyring,
                clock=clock,
                capabilities={"engines": list(capabilities.engines)},
                on_report=on_report,
                probation=probation,
            )
            for kind, activator in activators.items()
        }
        for updater in updaters.values():
            await updater.start()
            stack.push_async_callback(updater.close)
        store.sweep({*keep(), *(digest for updater in updaters.values() for digest in updater.needed())})
        boot = new_boot_id()
        channel = link
        if channel is None:
            channel = await stack.enter_async_context(_open_link(membership, token, boot))
        control = ControlPlane(
            channel,
            membership.id,
            updaters,
            capabilities=capabilities,
            running=running,
            clock=clock,
            boot=boot,
            groups=membership.groups,
        )
        task = asyncio.create_task(control.run(), name="control plane")
        stack.push_async_callback(_stop, task)
        yield Member(store, packages, fetcher, updaters, control, channel)


def scope_of(kind: str, membership: Membership) -> str:
    """Whom a document of `kind` must be for to be for this node. Raises InvalidConfig for a kind nobody sends."""
    if kind == DESIRED:
        return f"node:{membership.id}"
    if kind == POLICY:
        return f"tenant:{membership.tenant}"
    raise InvalidConfig(f"no document of kind {kind!r} is ever sent to a node")


def _locked(data: Path) -> TextIO:
    """Two processes on one folder would write into each other's downloads. The kernel ends the lock with the process."""
    try:
        data.mkdir(parents=True, exist_ok=True)
        file = (data / "lock").open("w")
    except OSError as error:
        raise StoreFailed(f"could not lock {data}: {error}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise InvalidConfig(f"node.data: {data} is in use by another process") from error
    return file


def _open_link(membership: Membership, token: str, boot: str) -> AbstractAsyncContextManager[LinkLike]:
    from sync.link import Link

    return Link(
        LinkOptions(
            url=membership.broker,
            client_id=membership.id,
            username=membership.id,
            password=token,
            will=lost(membership.id, boot),
        )
    )


async def _stop(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task}, timeout=STOP_SECONDS)
