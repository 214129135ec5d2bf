"""The broker, seen from the node: login, protocol, its own topics, and that the broker keeps it from those of others.

A probe logs in under the node's name, which would end a running node's connection: beside a node that runs, or inside it,
only what its own link says is told.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sync import topics
from sync.channel import LinkOptions
from sync.doctor.check import Check, Finding, Skipped, fail, ok, warn
from sync.doctor.subject import NodeSubject

if TYPE_CHECKING:
    from sync.link import Link

LOGIN_SECONDS = 6.0
LOOK_SECONDS = 0.1
NOBODY = "no connection to the broker"
QUIET_SECONDS = 0.8
"""How long after the subscriptions messages are waited for: a broker sends what it retains at once."""
ANSWER_SECONDS = 3.0
MAX_HEARD = 500
OTHER = "doctor-probe"
"""Name of a neighbour that does not exist, in the node's own tenant."""


@dataclass(slots=True)
class Probe:
    """`trouble`: why there was no login. `heard`: topics of what came. `own`, `other`: whether a publish was refused, on the
    node's topic and on a neighbour's; None = the protocol does not say."""

    connected: bool = False
    protocol: str = ""
    trouble: str = ""
    heard: list[str] = field(default_factory=list)
    own: bool | None = None
    other: bool | None = None


def probe_of(subject: NodeSubject) -> Probe:
    """One login for all checks. Raises Skipped beside a node that runs, SyncError."""
    node = subject.node
    if subject.live is not None:
        raise Skipped("asked inside the running node: a second login would end its connection")
    if subject.runs():
        raise Skipped(
            "the node runs, and a second login would end its connection; ask it: tierline hub doctor " + node.id
        )
    return subject.shared("broker", lambda: asyncio.run(_probe(subject)))


async def _probe(subject: NodeSubject) -> Probe:
    from sync.link import Link  # paho is imported when somebody wants to connect

    node, credentials = subject.node, subject.credentials()
    found = Probe()
    options = LinkOptions(
        url=node.broker,
        client_id=node.id,
        username=node.id,
        password=credentials.password,
        tls=credentials.link_context,
        proxy=node.proxy_to(node.broker),
        session_seconds=0,
        max_incoming=MAX_HEARD,
    )
    async with Link(options) as link:
        there = asyncio.Event()
        link.on_connect(there.set)
        for _ in range(int(LOGIN_SECONDS / LOOK_SECONDS)):
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await there.wait()
            if link.connected or _is_final(link.trouble):
                break
        found.connected, found.protocol, found.trouble = link.connected, link.protocol, link.trouble
        if not found.connected:
            return found
        # Everything there is: what the access list lets through is what this node can read.
        link.subscribe(f"{topics.ROOT}/#")
        listening = asyncio.create_task(_listen(link, found.heard))
        found.own = await _is_refused(link, topics.up(node.id, "rpc"))
        found.other = await _is_refused(link, topics.up(f"{node.tenant}.{OTHER}", "rpc"))
        await asyncio.sleep(QUIET_SECONDS)
        listening.cancel()
    return found


def _is_final(trouble: str) -> bool:
    """Whether a second attempt would end like the first. Only another version of MQTT may be worth one."""
    return trouble == NOBODY or (trouble.startswith("the broker refused us") and "version" not in trouble)


async def _listen(link: Link, heard: list[str]) -> None:
    async for message in link.messages():
        heard.append(message.topic)


async def _is_refused(link: Link, topic: str) -> bool | None:
    """Publish something that nobody waits for."""
    before = link.refused
    link.publish(topic, b"{}")
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            while link.pending:  # noqa: ASYNC110 - a link says nothing when it has nothing left to send
                await asyncio.sleep(0.01)
    except TimeoutError:
        return None
    # Only MQTT 5 has reasons; before it, a broker that does not want a message says that it has it.
    return link.refused > before if link.protocol == "MQTT 5" else None


def check_login(subject: NodeSubject) -> Finding:
    if subject.live is not None:
        return ok("connected") if subject.live.connected else fail("the running node is not connected")
    probe = probe_of(subject)
    if not probe.connected:
        return fail(f"no login: {probe.trouble or 'no answer'}", _fix_login(probe.trouble))
    return ok("the broker let this node in")


def check_version(subject: NodeSubject) -> Finding:
    protocol = subject.live.protocol if subject.live is not None else _connected(subject).protocol
    if not protocol:
        raise Skipped("not connected")
    return ok(protocol) if protocol == "MQTT 5" else warn(f"only {protocol} is granted")


def check_publish(subject: NodeSubject) -> Finding:
    refused = _connected(subject).own
    if refused is None:
        raise Skipped("this protocol does not say whether a message was taken")
    return fail("a message on this node's own topic was refused") if refused else ok("a message of its own was taken")


def check_retained(subject: NodeSubject) -> Finding:
    probe, node = _connected(subject), subject.node
    leaves = [topic for topic in probe.heard if topic.startswith(f"{topics.ROOT}/{node.id}/down/")]
    hub = topics.HUB_STATE in probe.heard
    if topics.down(node.id, "desired") in leaves:
        return ok("the desired document is there" + ("" if hub else "; the hub has not said that it is there"))
    if hub:
        return warn("the hub is there, but no desired document for this node")
    return warn("the broker keeps nothing for this node: neither its desired document nor the hub's state")


def check_access(subject: NodeSubject) -> Finding:
    probe, node = _connected(subject), subject.node
    mine = topics.node_filters(node.id, node.groups)
    foreign = [t for t in probe.heard if t not in mine and not t.startswith(f"{topics.ROOT}/{node.id}/")]
    if foreign:
        return fail(f"this node can read what is not its own: {foreign[0]} and {len(foreign) - 1} more")
    if probe.other is False:
        return fail(f"this node can speak in the name of others ({node.tenant}.{OTHER})")
    said = "" if probe.other else "; whether it may speak in others' names this protocol does not say"
    return ok(f"nothing foreign could be read in {QUIET_SECONDS:g} s{said}")


BROKER: tuple[Check[NodeSubject], ...] = (
    Check(
        "broker.login",
        "whether the broker lets this node in",
        "see network.ports and network.tls; then whether the hub knows the node: tierline nodes ID, tierline hub denied",
        check_login,
        LOGIN_SECONDS + 6,
    ),
    Check(
        "broker.version",
        "which MQTT version the broker grants",
        "use mosquitto 2 or another broker with MQTT 5: with 3.1.1 a refused message cannot be told from one that was taken",
        check_version,
        LOGIN_SECONDS + 6,
    ),
    Check(
        "broker.publish",
        "whether the broker takes this node's own messages",
        "bring the broker's access list up to date: it is what the hub gives at /api/v1/broker/access",
        check_publish,
        LOGIN_SECONDS + 6,
    ),
    Check(
        "broker.retained",
        "whether the broker has this node's desired document and the hub's state",
        "see that the hub runs and is connected to this broker; deploy something to this node: tierline deploy",
        check_retained,
        LOGIN_SECONDS + 6,
    ),
    Check(
        "broker.access",
        "that this node can neither read nor write what belongs to others",
        "the broker's access list is missing or too wide: use the one that the hub gives at /api/v1/broker/access",
        check_access,
        LOGIN_SECONDS + 6,
    ),
)


def _connected(subject: NodeSubject) -> Probe:
    probe = probe_of(subject)
    if not probe.connected:
        raise Skipped("no login, see broker.login")
    return probe


def _fix_login(trouble: str) -> str:
    low = trouble.lower()
    if "not authori" in low or "bad user" in low:
        return "the hub does not know this node or its credential: tierline nodes ID, tierline hub denied; join again if needed"
    if "certificate" in low or "ssl" in low or "tls" in low:
        return "see network.tls and identity.expiry"
    return ""
