"""A real node against a hub that repeats, reorders, loses and lies: it ends up with the newest good document, and says so."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from approving import Approving

from sync import topics
from sync.chaos.hub import HubSimulator, simulated_hub
from sync.chaos.source import FILES
from sync.clock import SystemClock
from sync.control import lost
from sync.download import Limits
from sync.identity import Membership
from sync.member import Member, join
from sync.messages import Capabilities, DocumentReport
from sync.testing import FakeActivator, MemoryBroker, MemoryLink

NODE = "acme.edge-1"
DATA = bytes(range(256)) * 200
LIMITS = Limits(connect_seconds=1, read_seconds=0.3, budget_seconds=1.0, slowest_rate=10_000_000)


@dataclass
class Site:
    hub: HubSimulator
    member: Member
    models: FakeActivator
    book: FakeActivator

    @property
    def desired(self) -> DocumentReport | None:
        return self._report("desired")

    @property
    def policy(self) -> DocumentReport | None:
        return self._report("policy")

    def _report(self, kind: str) -> DocumentReport | None:
        heard = self.hub.nodes.get(NODE)
        return heard.reported.documents.get(kind) if heard and heard.reported else None

    def applied(self, kind: str, revision: int) -> bool:
        report = self._report(kind)
        return report is not None and (report.applied, report.state) == (revision, "applied")

    async def when(self, ready: Callable[[], object], seconds: float = 20.0) -> None:
        async with asyncio.timeout(seconds):
            while not ready():
                await asyncio.sleep(0.01)

    async def born(self) -> None:
        await self.when(lambda: self.policy is not None)


@pytest.fixture(scope="module")
def approving(tmp_path_factory: pytest.TempPathFactory) -> Approving:
    return Approving(tmp_path_factory.mktemp("repository"), SystemClock())


@asynccontextmanager
async def opened(folder: Path, approving: Approving) -> AsyncIterator[Site]:
    broker = MemoryBroker()
    async with AsyncExitStack() as stack:
        link = await stack.enter_async_context(MemoryLink(broker))
        hub = await stack.enter_async_context(simulated_hub(link, approve=approving, seed=5))
        (folder / "root.json").write_bytes(approving.root)
        (folder / "token").write_text("secret")
        (folder / "token").chmod(0o600)
        membership = Membership(
            id=NODE,
            tier="edge",
            broker="mqtt://127.0.0.1:1",
            root=folder / "root.json",
            credential=folder / "token",
            data=folder / "data",
            sources=(hub.source.url,),
        )
        models, book = FakeActivator(), FakeActivator()
        member = await stack.enter_async_context(
            join(
                membership,
                activators={"desired": models, "policy": book},
                capabilities=Capabilities(tier="edge"),
                running=dict,
                link=await stack.enter_async_context(MemoryLink(broker, lost(NODE, "boot"))),
                limits=LIMITS,
            )
        )
        yield Site(hub, member, models, book)


@pytest.fixture
async def site(tmp_path: Path, approving: Approving) -> AsyncIterator[Site]:
    async with opened(tmp_path, approving) as found:
        await found.born()
        yield found


async def test_a_storm_of_one_document_is_applied_once(site: Site) -> None:
    site.hub.set_policy("acme", {"rules": [1]})
    await site.when(lambda: site.applied("policy", 1))
    for _ in range(20):
        site.hub.storm(20)
        await asyncio.sleep(0.01)
    assert site.book.history == [b'{"rules":[1]}']


async def test_documents_in_any_order_end_with_the_newest(site: Site) -> None:
    site.hub.manners.hold = True
    for number in range(1, 9):
        site.hub.set_policy("acme", number)
    site.hub.let_go()
    site.hub.manners.hold = False
    await site.when(lambda: site.applied("policy", 8))
    assert site.book.active == b"8"
    order = [int(body) for body in site.book.history]
    assert order == sorted(order)


async def test_a_lost_document_is_made_up_for_by_the_next_one(site: Site) -> None:
    site.hub.manners.lost = 1.0
    site.hub.set_policy("acme", 1)
    site.hub.manners.lost = 0.0
    site.hub.set_policy("acme", 2)
    await site.when(lambda: site.applied("policy", 2))
    assert site.hub.lost == 1


@pytest.mark.parametrize(
    ("code", "options"),
    [
        ("bad_signature", {"key": "stranger"}),
        ("bad_signature", {"key": "desired"}),
        ("replayed", {"revision": 1}),
        ("expired", {"expires": -1e6}),
        ("expired", {"issued": +1e6}),
        ("wrong_scope", {"scope": "tenant:other"}),
    ],
)
async def test_a_lie_is_refused_with_its_reason_and_changes_nothing(
    site: Site, code: str, options: dict[str, object]
) -> None:
    site.hub.set_policy("acme", 1)
    site.hub.set_policy("acme", 2)
    await site.when(lambda: site.applied("policy", 2))
    given = dict(options)
    scope = str(given.pop("scope", "tenant:acme"))
    name = given.pop("key", None)
    if name is not None:
        given["key"] = site.hub.stranger if name == "stranger" else site.hub.keys[str(name)]
    for field in ("expires", "issued"):
        if field in given:
            given[field] = time.time() + float(str(given[field]))
    site.hub.say(topics.tenant_policy("acme"), site.hub.envelope("policy", scope, 3, **given))  # type: ignore[arg-type]
    await site.when(lambda: site.policy is not None and site.policy.error is not None)
    assert site.policy is not None
    assert site.policy.error is not None
    assert site.policy.error.startswith(code)
    assert site.book.active == b"2"


@pytest.mark.parametrize("how", ["truncated", "unavailable", "mute"])
async def test_a_file_that_comes_badly_is_asked_for_again_and_then_in_force(site: Site, how: str) -> None:
    digest = site.hub.add_file(DATA + how.encode())
    site.models.wanted = (digest,)
    site.hub.source.misbehave(FILES + digest, how)
    site.hub.desire(NODE, {"models": 1}, [digest])
    await site.when(lambda: site.applied("desired", 1))
    assert site.models.prepared[-1][1] == {digest: DATA + how.encode()}
    site.hub.source.insist(how)


@pytest.mark.parametrize("how", ["wrong", "endless"])
async def test_other_bytes_are_never_prepared_and_the_right_ones_are_as_soon_as_they_come(site: Site, how: str) -> None:
    digest = site.hub.add_file(DATA + how.encode())
    site.models.wanted = (digest,)
    site.hub.source.misbehave(FILES + digest, how, times=None)
    site.hub.desire(NODE, {"models": 1}, [digest])
    await site.when(lambda: site.desired is not None and (site.desired.error or "").startswith("digest_mismatch"))
    assert site.models.prepared == []
    site.hub.source.insist(how)
    site.hub.source.behave()
    await site.when(lambda: site.applied("desired", 1))


async def test_events_arrive_once_each_although_acknowledgements_are_lost_or_doubled(site: Site) -> None:
    site.hub.manners.lost_acks = 0.5
    site.hub.manners.copies = 2
    ids = [await site.member.outbox.put("app.test", str(number).encode()) for number in range(50)]
    heard = site.hub.nodes[NODE]
    await site.when(lambda: set(ids) <= set(heard.events))
    assert site.hub.lost_acks, "the fault never fired"
    site.hub.manners.lost_acks = 0.0
    site.hub.restart()
    await site.when(lambda: site.member.outbox.pending == 0, 60.0)
    assert site.member.outbox.ledger().imbalance == {}
    assert heard.malformed == []
