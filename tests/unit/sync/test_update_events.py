"""Outcomes of updates become events, each once; steps in between and repeated failures do not."""

from __future__ import annotations

import msgspec

from sync.errors import Malformed
from sync.messages import DocumentReport
from sync.update_events import UpdateEvent, UpdateEvents


class Offered:
    def __init__(self) -> None:
        self.bodies: list[UpdateEvent] = []
        self.refuse = False

    def offer(self, kind: str, body: bytes) -> None:
        assert kind == "update"
        if self.refuse:
            raise Malformed("no room")
        self.bodies.append(msgspec.json.decode(body, type=UpdateEvent))


def report(state: str, revision: int = 3, error: str | None = None) -> DocumentReport:
    return DocumentReport(revision=revision, applied=2, state=state, digest="d", error=error, at=7.0)


def test_the_way_of_an_update_is_one_event_at_its_end() -> None:
    offered = Offered()
    tell = UpdateEvents(offered)
    for state in ("verifying", "fetching", "preparing", "committing", "probation", "applied", "applied"):
        tell("desired", report(state))
    assert [(body.document, body.state, body.revision) for body in offered.bodies] == [("desired", "applied", 3)]


def test_refusals_and_rollbacks_are_told_with_their_reason() -> None:
    offered = Offered()
    tell = UpdateEvents(offered)
    tell("desired", report("refused", error="bad_signature: x"))
    tell("desired", report("rolled_back", error="bad: too slow"))
    assert [(body.state, body.error) for body in offered.bodies] == [
        ("refused", "bad_signature: x"),
        ("rolled_back", "bad: too slow"),
    ]


def test_a_failure_that_repeats_itself_while_the_network_is_gone_is_one_event() -> None:
    offered = Offered()
    tell = UpdateEvents(offered)
    for _ in range(50):
        tell("desired", report("fetching"))
        tell("desired", report("failed", error="unavailable: no route"))
    tell("policy", report("failed", error="unavailable: no route"))
    assert len(offered.bodies) == 2


def test_an_outbox_that_refuses_does_not_reach_the_updater() -> None:
    offered = Offered()
    offered.refuse = True
    UpdateEvents(offered)("desired", report("applied"))
