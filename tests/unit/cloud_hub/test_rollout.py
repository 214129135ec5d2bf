"""Which node runs what: decided by values alone."""

from __future__ import annotations

import pytest

from cloud_hub.errors import Conflict
from cloud_hub.rollout import (
    STALE_AFTER,
    Deployment,
    Node,
    PackageRef,
    Standing,
    Sync,
    decided_by,
    desired_models,
    matches,
    parse_reference,
    progress,
    sync_of,
)
from models.errors import InvalidRequest
from sync.messages import DocumentReport

EDGE = Node("acme.edge-1", "edge", {"line": "2", "site": "north"}, ("canaries",))
V1, V2 = PackageRef("digits-cnn", "1"), PackageRef("digits-cnn", "2")


def deployment(name: str, ref: PackageRef, tenant: str = "*", **selector: str) -> Deployment:
    return Deployment(name, tenant, selector, {"digits": ref})


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ({}, True),
        ({"tier": "edge"}, True),
        ({"tier": "cloud"}, False),
        ({"tier": "edge", "line": "2"}, True),
        ({"tier": "edge", "line": "3"}, False),
        ({"id": "acme.edge-1"}, True),
        ({"id": "acme.edge-2"}, False),
        ({"group": "canaries"}, True),
        ({"group": "others"}, False),
        ({"floor": "1"}, False),
    ],
)
def test_every_key_of_a_selector_must_hold(selector: dict[str, str], expected: bool) -> None:
    assert matches(selector, EDGE) is expected


def test_the_more_specific_deployment_wins_whatever_the_order() -> None:
    wide, narrow = deployment("all", V1, tier="edge"), deployment("one", V2, tier="edge", line="2")
    assert desired_models(EDGE, [wide, narrow]) == {"digits": V2}
    assert desired_models(EDGE, [narrow, wide]) == {"digits": V2}


def test_naming_the_tenant_is_more_specific_than_naming_none() -> None:
    assert desired_models(EDGE, [deployment("all", V1), deployment("ours", V2, tenant="acme")]) == {"digits": V2}


def test_another_tenants_deployment_says_nothing() -> None:
    assert desired_models(EDGE, [deployment("theirs", V1, tenant="globex")]) == {}


def test_deployments_of_different_models_add_up() -> None:
    other = Deployment("other", "*", {"tier": "edge"}, {"letters": V2})
    assert desired_models(EDGE, [deployment("all", V1, tier="edge"), other]) == {"digits": V1, "letters": V2}


def test_a_tie_is_refused_naming_both() -> None:
    with pytest.raises(Conflict, match=r"'a' and 'b'.*'digits'.*acme\.edge-1"):
        desired_models(EDGE, [deployment("b", V1, tier="edge"), deployment("a", V2, line="2")])


def test_a_tie_below_a_more_specific_winner_harms_nobody() -> None:
    tied = [deployment("a", V1, tier="edge"), deployment("b", V1, line="2")]
    assert desired_models(EDGE, [*tied, deployment("c", V2, tier="edge", line="2")]) == {"digits": V2}


@pytest.mark.parametrize("text", ["", "digits", "/1", "digits/", "a/b/c", "../x/1", "a b/1"])
def test_a_reference_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_reference(text)


def report(
    revision: int, applied: int, state: str = "idle", error: str | None = None, digest: str = "d3"
) -> DocumentReport:
    return DocumentReport(revision=revision, applied=applied, state=state, error=error, digest=digest)


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        (Standing(), Sync.IN_SYNC),
        (Standing(3, "d3"), Sync.PENDING),
        (Standing(3, "d3", report(2, 2, digest="d2")), Sync.PENDING),
        (Standing(3, "d3", report(3, 2, "fetching", digest="d2")), Sync.APPLYING),
        (Standing(3, "d3", report(3, 3)), Sync.IN_SYNC),
        (Standing(3, "d3", report(3, 3, digest="other")), Sync.APPLYING),
        (Standing(3, "d3", report(3, 2, "refused", "rejected: no", "d2")), Sync.REFUSED),
        (Standing(3, "d3", report(2, 2, "refused", "rejected: an older one", "d2")), Sync.PENDING),
        (Standing(3, "d3", report(3, 3), silent=STALE_AFTER), Sync.IN_SYNC),
        (Standing(3, "d3", report(3, 3), silent=STALE_AFTER + 1), Sync.STALE),
    ],
)
def test_how_a_node_stands_follows_from_what_is_wanted_and_reported(known: Standing, expected: Sync) -> None:
    assert sync_of(known)[0] is expected


def test_a_deployment_counts_only_the_nodes_it_decides_about() -> None:
    wide, narrow = deployment("all", V1, tier="edge"), deployment("one", V2, tier="edge", line="2")
    nodes = [EDGE, Node("acme.edge-2", "edge"), Node("acme.cloud-1", "cloud")]
    assert decided_by(nodes, [wide, narrow]) == {"all": ["acme.edge-2"], "one": ["acme.edge-1"]}


def test_progress_says_why_a_node_refused_and_that_another_was_never_heard() -> None:
    refusing = Standing(3, "d3", report(3, 2, "refused", "rejected: wrong shape", "d2"))
    first, second = progress(["b", "a"], {"a": refusing, "b": Standing(3, "d3")})
    assert (first.node, first.sync, first.reason) == ("a", Sync.REFUSED, "rejected: wrong shape")
    assert (second.node, second.sync, second.reason) == ("b", Sync.PENDING, None)
