"""The checks of a hub that look at its fleet: who is away, out of step, or cannot come back."""

from __future__ import annotations

from collections.abc import Sequence

from cloud_hub.doctor_subject import HubSubject
from cloud_hub.publisher import wanted_by
from cloud_hub.records import PRESENT, Member
from cloud_hub.rollout import Sync, sync_of
from sync.doctor.check import Check, Finding, Skipped, duration, ok, warn
from sync.doctor.machine import software
from sync.messages import Reported

SHOWN = 5
"""Nodes named in one sentence."""
SILENT_SECONDS = 86_400.0
KEPT_RELEASES = 2
"""Releases apart that hub and node may be."""


def check_in_sync(subject: HubSubject) -> Finding:
    now, behind, refused = subject.clock.wall(), list[str](), list[str]()
    with subject.records() as records:
        members = records.members()
        for member, documents in zip(members, wanted_by(records, members), strict=True):
            for issued in documents:
                sync, why = sync_of(member.standing(issued.kind, issued, now))
                if sync == Sync.REFUSED:
                    refused.append(f"{member.node.id} refuses {issued.kind} {issued.revision}: {why}")
                elif sync != Sync.IN_SYNC:
                    behind.append(member.node.id)
    if refused:
        return warn(_some(refused))
    late = sorted(set(behind))
    if late:
        return warn(f"{len(late)} of {len(members)} nodes do not run what they should yet: {_some(late)}")
    return ok(f"{_nodes(members)} run what they should")


def check_lost(subject: HubSubject) -> Finding:
    now, members = subject.clock.wall(), _members(subject)
    never = [member.node.id for member in members if not member.seen]
    lost = [
        f"{member.node.id} ({duration(now - member.left)})"
        for member in members
        if member.left and member.state not in PRESENT and now - member.left > SILENT_SECONDS
    ]
    told = [f"away for long: {_some(lost)}"] if lost else []
    told += [f"never seen: {_some(never)}"] if never else []
    here = sum(member.state in PRESENT for member in members)
    return warn("; ".join(told)) if told else ok(f"{here} of {_nodes(members)} are here, none was away for a day")


def check_certificates(subject: HubSubject) -> Finding:
    now, late = subject.clock.wall(), list[str]()
    with subject.records() as records:
        enrolled = sorted(records.identities.enrolled())
        for node in enrolled:
            newest = max((known.not_after for known in records.identities.current(node)), default=0.0)
            if newest < now:
                late.append(f"{node} ({duration(now - newest)} ago)")
    if not enrolled:
        raise Skipped("no node has a certificate")
    return warn(f"expired: {_some(late)}") if late else ok(f"{len(enrolled)} nodes have one that is good")


def check_alarms(subject: HubSubject) -> Finding:
    with subject.records() as records:
        alarms = records.events.alarms()
    if alarms:
        return warn(
            _some([f"{alarm.node}: {alarm.alarm}{f', {alarm.text}' if alarm.text else ''}" for alarm in alarms])
        )
    return ok("no alarm is raised")


def check_letters(subject: HubSubject) -> Finding:
    with subject.records() as records:
        counts = {
            member.node.id: sum(each.dead_letters for each in records.events.counts(member.node.id).values())
            for member in records.members()
        }
    bad = [f"{node} ({count})" for node, count in counts.items() if count]
    return warn(f"events that were none: {_some(bad)}") if bad else ok("every event could be read")


def check_skew(subject: HubSubject) -> Finding:
    own, members = software(), _members(subject)
    said = {m.node.id: m.capabilities.software for m in members if m.capabilities and m.capabilities.software}
    if not said:
        raise Skipped("no node says which release it runs")
    far = [f"{node} ({version})" for node, version in said.items() if _apart(version, own) > KEPT_RELEASES]
    if far:
        return warn(f"more than {KEPT_RELEASES} releases away from this hub's {own}: {_some(far)}")
    return ok(f"{len(said)} nodes are within {KEPT_RELEASES} releases of this hub's {own}")


def check_counts(subject: HubSubject) -> Finding:
    """Messages that nodes count as useless: somebody speaks who should not, or another release does."""
    bad = []
    for member in _members(subject):
        reported: Reported | None = member.reported
        if reported is not None and any(reported.refused.values()):
            reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(reported.refused.items()) if count)
            bad.append(f"{member.node.id} ({reasons})")
    return warn(f"nodes refused messages: {_some(bad)}") if bad else ok("no node refused a message")


FLEET: tuple[Check[HubSubject], ...] = (
    Check(
        "fleet.sync",
        "whether nodes run what they should",
        "tierline nodes ID shows the document and the reason; then tierline hub doctor ID",
        check_in_sync,
        10.0,
    ),
    Check(
        "fleet.lost",
        "nodes that are away for a day, or never came",
        "look at the machine and its network; take those that will not come back out: tierline hub decommission ID",
        check_lost,
    ),
    Check(
        "fleet.certificates",
        "nodes whose certificate has expired",
        "a node that is switched on renews by itself; if it does not, invite it again: tierline hub enrol ID",
        check_certificates,
    ),
    Check(
        "fleet.alarms",
        "alarms that are raised",
        "tierline hub doctor ID; the alarm's text says what to do",
        check_alarms,
    ),
    Check(
        "fleet.events",
        "events that could not be read",
        "GET /api/v1/nodes/ID/ledger shows their beginning; mostly the node's release is newer than the hub's",
        check_letters,
    ),
    Check(
        "fleet.refused",
        "messages that nodes refused",
        "bad_signature: somebody else publishes, look at the broker's access list; replayed: a broker with old messages; "
        "malformed: another release",
        check_counts,
    ),
    Check(
        "fleet.releases",
        "how far hub and nodes are apart",
        "upgrade the older side first to a release between",
        check_skew,
    ),
)


def _members(subject: HubSubject) -> list[Member]:
    def read() -> list[Member]:
        with subject.records() as records:
            return records.members()

    return subject.shared("members", read)


def _nodes(members: Sequence[Member]) -> str:
    return f"{len(members)} node{'s' * (len(members) != 1)}"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _apart(one: str, other: str) -> int:
    """Releases between two versions: of 1.4 and 1.6 two; a hundred for another major one. 0 when one cannot be read."""
    try:
        (a, b), (c, d) = ([int(part) for part in version.split(".")[:2]] for version in (one, other))
    except ValueError:
        return 0
    return abs(a - c) * 100 + abs(b - d)
