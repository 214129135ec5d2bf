"""Programs of the same machine may hold updates; nobody else may, and bad requests are refused by their field."""

from __future__ import annotations

import msgspec
import pytest

from edge_node.control import MAX_BODY, LocalControl
from models.errors import Forbidden, InvalidRequest, NotFound
from models.serving.caller import Peer
from models.serving.exchange import HttpHead, HttpRequest
from sync.holds import Holds
from sync.testing import FakeClock


class FakeMember:
    def __init__(self) -> None:
        self.clock = FakeClock()
        self.holds = Holds(self.clock, lambda: 100.0)
        self.updaters = {}
        self.waited = 0

    async def settled(self) -> None:
        self.waited += 1


@pytest.fixture
def member() -> FakeMember:
    return FakeMember()


@pytest.fixture
def control(member: FakeMember) -> LocalControl:
    return LocalControl(member, member.clock)  # type: ignore[arg-type]


def request(method: str, path: str, body: object = None, peer: Peer | None = None) -> HttpRequest:
    data = body if isinstance(body, bytes) else msgspec.json.encode(body)
    return HttpRequest(HttpHead(method, path, "", {}, peer or Peer()), data)


async def test_a_hold_is_made_shown_and_released(control: LocalControl, member: FakeMember) -> None:
    made = await control.handle(request("POST", "/control/hold", {"reason": "robot in motion", "seconds": 7}))
    answer = msgspec.json.decode(made.body)
    assert answer["seconds"] == pytest.approx(7)
    assert member.waited == 1, "an activation under way is waited for"
    shown = msgspec.json.decode((await control.handle(request("GET", "/control/updates"))).body)
    assert [(each["id"], each["reason"]) for each in shown["holds"]] == [(answer["id"], "robot in motion")]
    for released in (True, False):
        ended = await control.handle(request("POST", "/control/release", {"id": answer["id"]}))
        assert msgspec.json.decode(ended.body) == {"released": released}
    assert member.holds.current() is None


async def test_other_machines_are_refused(control: LocalControl, member: FakeMember) -> None:
    with pytest.raises(Forbidden):
        await control.handle(request("POST", "/control/hold", {"reason": "spite"}, Peer("192.0.2.1")))
    assert member.holds.current() is None


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "reason"),
        ({"reason": ""}, "reason"),
        ({"reason": "x", "seconds": -1}, "seconds"),
        ({"reason": "x", "minutes": 1}, "minutes"),
        (b"\xff", "body"),
        (b"[" * (MAX_BODY + 1), "body"),
    ],
)
async def test_bad_requests_are_refused_by_their_field(control: LocalControl, body: object, field: str) -> None:
    with pytest.raises(InvalidRequest, match=field):
        await control.handle(request("POST", "/control/hold", body))


async def test_what_nobody_answers_is_not_found(control: LocalControl) -> None:
    for method, path in (("GET", "/control/hold"), ("POST", "/control/updates"), ("POST", "/control")):
        with pytest.raises(NotFound):
            await control.handle(request(method, path, {}))
