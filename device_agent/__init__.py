"""The on-device SDK: models run in the application's own process, and escalate to the edge when they should.

    from device_agent import Agent

    async with Agent("agent.toml") as agent:
        answer = await agent.infer("digits", {"image": pixels}, deadline_ms=50)
        print(answer.outputs["probabilities"], answer.tier, answer.confidence)

`BlockingAgent` is the same for applications without an event loop.
"""

from device_agent.shadow import refuse_shadowed_packages

# Before anything of ours is imported: an application's own `models` or `sync` would be picked up in its place.
refuse_shadowed_packages()

from device_agent.agent import Agent, Answer  # noqa: E402
from device_agent.blocking import BlockingAgent  # noqa: E402
from device_agent.config import AgentConfig, load_agent_config  # noqa: E402

__all__ = ["Agent", "AgentConfig", "Answer", "BlockingAgent", "load_agent_config"]
