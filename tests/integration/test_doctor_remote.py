"""The hub asks a node's doctor, from the API down to the node's own disk and back."""

from __future__ import annotations

import asyncio
from pathlib import Path

from doctor_nodes import CANARY, NODE, make_node
from hub_in_memory import hub_bench

from edge_node.config import EdgeConfig
from sync.doctor.remote import offer_doctor
from sync.member import join
from sync.messages import Capabilities
from sync.testing import FakeActivator, MemoryLink


async def test_the_hub_gets_a_nodes_report_and_it_holds_no_secret(tmp_path: Path) -> None:
    config = EdgeConfig(node=make_node(tmp_path / "node").node)
    async with hub_bench(tmp_path / "hub") as bench, MemoryLink(bench.broker) as link:
        await bench.add_node(NODE)
        async with join(
            config.node,
            activators={"desired": FakeActivator()},
            capabilities=Capabilities(tier="edge"),
            running=dict,
            clock=bench.clock,
            link=link,
        ) as member:
            offer_doctor(member, "edge_node.doctor", config, dict)
            await asyncio.sleep(0)  # its subscriptions
            report = await bench.call("POST", f"/api/v1/nodes/{NODE}/doctor", 200)
    checks = {check["name"]: check for check in report["checks"]}
    assert report["about"] == NODE
    assert checks["broker.login"]["found"] == "connected"
    assert checks["disk.lock"]["found"].startswith("this node has it (process ")
    assert checks["network.ports"]["status"] == "fail"
    assert "let connections" in checks["network.ports"]["fix"]
    assert len(checks) >= 40
    assert CANARY not in str(report)
