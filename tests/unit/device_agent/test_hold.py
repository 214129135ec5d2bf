"""An application asks for a quiet moment; leaving the block gives it back whatever happened inside."""

from __future__ import annotations

from pathlib import Path

import pytest

from device_agent.agent import Agent
from device_agent.blocking import BlockingAgent
from device_agent.config import AgentConfig
from models.errors import InvalidRequest, NotReady
from sync.identity import Membership
from sync.testing import ROOT, know
from tests.unit.sync.conftest import RING


@pytest.fixture
def config(tmp_path: Path) -> AgentConfig:
    (tmp_path / "root.json").write_bytes(ROOT)
    (tmp_path / "token").write_bytes(b"secret")
    (tmp_path / "token").chmod(0o600)
    know(tmp_path / "data", RING, 4e9)
    node = Membership(
        id="acme.phone-1",
        tier="device",
        broker="mqtt://127.0.0.1:9",
        root=tmp_path / "root.json",
        credential=tmp_path / "token",
        data=tmp_path / "data",
    )
    return AgentConfig(node)


async def test_a_hold_lasts_for_the_block_and_is_given_back_after_an_error(config: AgentConfig) -> None:
    async with Agent(config) as agent:
        holds = agent._member.holds

        async def work() -> None:
            async with agent.hold("robot in motion", timeout=30):
                assert holds.current().reason == "robot in motion"
                raise OSError("the robot fell")

        with pytest.raises(OSError, match="fell"):
            await work()
        assert holds.current() is None


async def test_a_hold_without_reason_or_agent_is_refused(config: AgentConfig) -> None:
    agent = Agent(config)
    with pytest.raises(NotReady):
        async with agent.hold("robot in motion"):
            pass
    async with agent:
        with pytest.raises(InvalidRequest, match="reason"):
            async with agent.hold(""):
                pass


def test_a_blocking_application_holds_in_a_with_block(config: AgentConfig) -> None:
    with BlockingAgent(config) as agent:
        with agent.hold("robot in motion"):
            assert agent._agent._member.holds.current() is not None
        assert agent._agent._member.holds.current() is None
