"""Whatever the cloud does, the edge answers by the deadline and says why it did so alone."""

from __future__ import annotations

import pytest

from sync.chaos import Answer503, BlackHole, Corrupt, Drip, Fault, HalfOpen, Lag, LinkCut, Reset, SlowBody
from tests.chaos.conftest import CLOUD, Tiers

DEADLINE_MS = 300.0
SLACK_SECONDS = 0.3
"""For a busy machine with two cores; the answer itself is ready long before."""

FAULTS = [
    BlackHole(),
    LinkCut(),
    HalfOpen(),
    HalfOpen("down"),
    Reset(),
    Drip(20.0, "down"),
    SlowBody(20.0),
    Lag(1.0),
    Answer503(),
    Answer503(retry_after=5),
    Corrupt(20, "down"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_edge_answers_by_the_deadline_and_says_why_it_did_so_alone(calm: Tiers, fault: Fault) -> None:
    with calm.cloud.suffering(fault):
        for _ in range(3):
            facts, took = calm.ask(DEADLINE_MS)
            assert took < DEADLINE_MS / 1e3 + SLACK_SECONDS
            assert (facts["tier"], facts["degraded"]) == ("edge", True)
            assert facts["reason"]
    calm.wait_for_cloud()


def test_a_share_of_refusals_is_answered_by_the_edge_and_the_rest_by_the_cloud(calm: Tiers) -> None:
    fault = Answer503(share=0.3)
    with calm.cloud.suffering(fault):
        found = [calm.ask(DEADLINE_MS)[0] for _ in range(30)]
    assert fault.tally.requests >= 1
    assert all(facts["degraded"] == (facts["tier"] == "edge") for facts in found)


def test_a_lag_within_the_deadline_costs_time_and_nothing_else(calm: Tiers) -> None:
    with calm.cloud.suffering(Lag(0.05, 0.02)):
        facts, took = calm.ask(2_000.0)
    assert facts["tier"] == "cloud"
    assert not facts["degraded"]
    assert took > 0.1


def test_a_frozen_cloud_worker_is_no_different(calm: Tiers) -> None:
    from sync.chaos.processes import paused

    with paused(calm.cluster.processes[CLOUD].pid):
        facts, took = calm.ask(DEADLINE_MS)
        assert took < DEADLINE_MS / 1e3 + SLACK_SECONDS
        assert (facts["tier"], facts["degraded"]) == ("edge", True)
    calm.wait_for_cloud()
