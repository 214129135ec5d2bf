"""A real edge node, alone with its disk: no broker, no hub. What turns bad is taken back; holds and windows are heeded."""

from __future__ import annotations

import asyncio
import json
import shutil
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from onnx_writer import Node, Value, write_model
from package_writer import Package, desired_body, write_package

from edge_node.config import EdgeConfig
from edge_node.node import EdgeNode, edge_node
from models.manifest import Confidence
from models.serving.assembly import Listening
from models.serving.predictor import InferRequest
from sync.identity import Membership
from sync.messages import Document
from sync.packages import Packages
from sync.settings import Settings
from sync.testing import ROOT, know
from sync.trust import Keyring, SigningKey, digest_of, sign
from sync.windows import Window

SIGNER = SigningKey.from_bytes(b"\1" * 32)
RING = Keyring((SIGNER.key("desired", "policy", "settings"),))
QUALITY = {"answers": 20, "watch_answers": 400, "shadow_answers": 20, "shadow_share": 1.0}
IMAGE = np.array([[0.1, 0.9]], np.float32)
RANDOM = np.random.default_rng(1)
GOLDEN = np.array([[0.6, 0.8], [0.7, 0.9], [0.55, 0.95]], np.float32)
HALF, SMALL, ONE = (np.array(value, np.float32) for value in (0.5, 0.3, 1.0))
MANY = np.array([1_000_000, 1, 1], np.int64)


def kinds() -> dict[str, tuple[list[Node], dict[str, np.ndarray[Any, Any]], Callable[[Any], Any]]]:
    """Name -> what `y` is made of from `x`, its constants, the same in numpy."""
    slow = [Node("Expand", ["x", "many"], ["m"]), Node("Exp", ["m"], ["e"]), Node("Log", ["e"], ["l"])]
    return {
        "good": ([Node("Identity", ["x"], ["y"])], {}, lambda x: x),
        "unsure": ([Node("Mul", ["x", "c"], ["y"])], {"c": SMALL}, lambda x: x * SMALL),
        "nan": (
            [Node("Sub", ["x", "c"], ["d"]), Node("Sqrt", ["d"], ["y"])],
            {"c": HALF},
            lambda x: np.sqrt(x - HALF),
        ),
        "contrary": ([Node("Sub", ["c", "x"], ["y"])], {"c": ONE}, lambda x: ONE - x),
        "slow": (
            [*slow, Node("ReduceMax", ["l"], ["y"], {"axes": [0], "keepdims": 0})],
            {"many": MANY},
            lambda x: x,
        ),
    }


def package(folder: Path, kind: str, version: str) -> Package:
    nodes, weights, compute = kinds()[kind]
    value = [Value(name, "FP32", ["n", 2]) for name in ("x", "y")]
    model = write_model(folder / f"{kind}-{version}" / "model.onnx", nodes, value[:1], value[1:], weights)
    outputs = {"y": compute(GOLDEN)}
    return write_package(
        model, {"x": GOLDEN}, outputs, package="two", version=version, confidence=Confidence("y"), tolerance=1e-3
    )


class Site:
    """One edge node's folder, and documents for it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.revision = folder, 0
        self.sizes: dict[str, int] = {}
        folder.mkdir(exist_ok=True)
        (folder / "root.json").write_bytes(ROOT)
        (folder / "token").write_bytes(b"secret")
        (folder / "token").chmod(0o600)
        know(folder / "data", RING, datetime.now(UTC).timestamp() + 1e6)

        async def require(packages: Packages, digests: Any) -> dict[str, int]:
            return {digest: self.sizes[digest] for digest in digests}

        monkeypatch.setattr(Packages, "require", require)

    def config(self, **updates: Any) -> EdgeConfig:
        node = Membership(
            id="acme.edge-1",
            tier="edge",
            broker="mqtt://127.0.0.1:9",
            root=self.folder / "root.json",
            credential=self.folder / "token",
            data=self.folder / "data",
        )
        settings = Settings(probation_seconds=60.0, quality=QUALITY, **updates)
        return EdgeConfig(node, Listening(port=0), updates=settings)

    def desired(self, node: EdgeNode, kind: str) -> bytes:
        """A document that makes `kind` answer, whose files are on the node."""
        self.revision += 1
        made = package(self.folder, kind, str(self.revision))
        body, blobs = desired_body(two=made)
        for digest, path in blobs.items():
            staged = node.member.store.staging(digest)
            shutil.copyfile(path, staged)
            node.member.store.publish(digest, staged)
            self.sizes[digest] = path.stat().st_size
        assert all(digest_of(path.read_bytes()) == digest for digest, path in blobs.items())
        return self.sign("desired", body, tuple(sorted(blobs)), self.revision)

    def sign(self, kind: str, body: bytes, digests: tuple[str, ...], revision: int) -> bytes:
        issued = datetime.now(UTC).timestamp()
        return sign(Document(kind, "node:acme.edge-1", revision, issued, digests, msgspec.Raw(body)), [SIGNER])

    @asynccontextmanager
    async def running(self, **updates: Any) -> AsyncIterator[EdgeNode]:
        async with edge_node(self.config(**updates)) as node:
            yield node


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    return Site(tmp_path / "edge", monkeypatch)


async def ask(node: EdgeNode, count: int = 1) -> None:
    for _ in range(count):
        # No two alike: the same input again is no second witness.
        image = IMAGE + RANDOM.uniform(-0.05, 0.05, IMAGE.shape).astype(np.float32)
        await node.router.infer(InferRequest(model="two", inputs={"x": image}))


async def until(node: EdgeNode, *states: str, asking: bool = False) -> Any:
    async with asyncio.timeout(20):
        while node.member.updaters["desired"].report.state not in states:
            if asking:
                await ask(node)
            await asyncio.sleep(0.002)
    return node.member.updaters["desired"].report


async def proved(site: Site, node: EdgeNode) -> None:
    """A good version is in force and known by a hundred answers."""
    node.member.updaters["desired"].offer(site.desired(node, "good"))
    await until(node, "probation", "applied")
    await ask(node, 100)
    await until(node, "applied", asking=True)


@pytest.mark.parametrize(
    ("kind", "measure"),
    [
        ("nan", "not finite"),
        ("slow", "run time: 95th percentile"),
        ("unsure", "confidence: stability index"),
        ("contrary", "otherwise than by the previous version"),
    ],
)
async def test_a_version_that_turns_bad_is_taken_back_without_any_hub(site: Site, kind: str, measure: str) -> None:
    async with site.running() as node:
        await proved(site, node)
        node.member.updaters["desired"].offer(site.desired(node, kind))
        await until(node, "probation")
        report = await until(node, "rolled_back", "applied", asking=True)
        assert report.state == "rolled_back"
        assert measure in report.error
        assert (report.applied, report.revision) == (1, 2)
        assert node.repository.running() == {"two": "two/1"}
        answer = await node.router.infer(InferRequest(model="two", inputs={"x": IMAGE}))
        np.testing.assert_array_equal(answer.outputs["y"], IMAGE)
        assert node.repository.replaced("two") is None
        # A better one is welcome afterwards.
        node.member.updaters["desired"].offer(site.desired(node, "good"))
        await until(node, "probation")
        assert (await until(node, "applied", asking=True)).applied == 3
    async with site.running() as node:
        assert node.member.updaters["desired"].report.applied == 3


async def call(node: EdgeNode, method: str, path: str, body: Any = None) -> Any:
    def send() -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(node.server.url + path, data=data, method=method)  # noqa: S310
        with urllib.request.urlopen(request, timeout=5) as answer:  # noqa: S310
            return json.loads(answer.read())

    return await asyncio.to_thread(send)


async def test_a_program_of_this_machine_may_hold_an_update_and_a_restart_does_not_end_the_hold(site: Site) -> None:
    async with site.running() as node:
        await proved(site, node)
        held = await call(node, "POST", "/control/hold", {"reason": "robot in motion", "seconds": 60})
        assert 59 < held["seconds"] <= 60
        node.member.updaters["desired"].offer(site.desired(node, "good"))
        assert (await until(node, "held")).detail == "robot in motion"
        shown = await call(node, "GET", "/control/updates")
        assert shown["documents"]["desired"]["state"] == "held"
        assert [each["id"] for each in shown["holds"]] == [held["id"]]
    async with site.running() as node:
        assert (await until(node, "held")).applied == 1
        assert node.repository.running() == {"two": "two/1"}
        assert await call(node, "POST", "/control/release", {"id": held["id"]}) == {"released": True}
        assert (await until(node, "probation")).applied == 2


async def test_an_update_waits_for_its_window_and_the_hub_can_force_it(site: Site) -> None:
    closed = datetime.now(UTC) + timedelta(hours=6)
    async with site.running() as node:
        await proved(site, node)
    async with site.running(windows=(Window(start=f"{closed:%H:%M}", minutes=60),)) as node:
        node.member.updaters["desired"].offer(site.desired(node, "good"))
        report = await until(node, "waiting")
        assert (report.applied, report.detail) == (1, "no maintenance window is open")
        node.member.updaters["settings"].offer(site.sign("settings", b'{"force": 2}', (), 1))
        assert (await until(node, "probation")).applied == 2
