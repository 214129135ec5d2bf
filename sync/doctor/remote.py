"""The doctor inside a running node, asked by the hub. What it needs is imported when it is asked for the first time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from sync.daemon import in_daemon

if TYPE_CHECKING:
    from sync.doctor.subject import Live
    from sync.member import Member

LIVE_SECONDS = 25.0
"""For all checks: below what a hub waits."""
LIVE_PARALLEL = 2
"""The node serves meanwhile."""


def offer_doctor(member: Member, tier: str, config: object, running: Callable[[], Mapping[str, str]]) -> None:
    """Let the hub ask this node's doctor. `tier`: module with the tier's `CHECKS` and `fields_of`; `running`: as of `join`."""

    async def answer() -> object:
        def work() -> dict[str, Any]:
            from sync.doctor.subject import Live

            protocol = str(getattr(member.link, "protocol", ""))
            return report(tier, config, Live(member.connected, protocol, dict(running())))

        return await in_daemon(work, "doctor")

    member.rpc.offer("doctor", answer)


def report(tier: str, config: object, live: Live) -> dict[str, Any]:
    """Run a tier's checks; what comes out holds no secret."""
    import time

    from sync.doctor.machine import software
    from sync.doctor.render import as_json
    from sync.doctor.runner import run_checks
    from sync.doctor.subject import NodeSubject

    module = import_module(tier)
    subject = NodeSubject(None, config=config, live=live, **module.fields_of(config))
    results = run_checks(module.CHECKS, subject, seconds=LIVE_SECONDS, parallel=LIVE_PARALLEL)
    node = subject.node
    title = {"about": node.id, "tier": node.tier, "software": software(), "at": round(time.time())}
    cleaned: dict[str, Any] = subject.redaction().value(as_json(title, results))
    return cleaned
