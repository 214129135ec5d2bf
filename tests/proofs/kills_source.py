"""A node that does nothing but put events into its outbox: `python tests/proofs/kills_source.py node.toml journal`.

It writes down the id of every event once `put` has returned, which is when the outbox has promised it. A kill between the two
leaves an event nobody counts on, never one that was counted on and not promised.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from device_agent.config import load_agent_config
from sync.member import join
from sync.messages import Capabilities
from sync.testing import FakeActivator

PAUSE_SECONDS = 0.1
BURST = 5
"""Events put at once, so that some are always under way when a process dies."""
KIND = "app.soak"


async def run(config: Path, journal: Path) -> None:
    """Until SIGTERM."""
    done = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, done.set)
    activators = {"policy": FakeActivator(), "desired": FakeActivator()}
    with journal.open("a") as promised:
        async with join(
            load_agent_config(config).node,
            activators=activators,
            capabilities=Capabilities(tier="device"),
            running=dict,
        ) as member:
            count = 0
            while not done.is_set():
                bodies = [f"{os.getpid()}.{count + index}".encode() for index in range(BURST)]
                count += BURST
                ids = await asyncio.gather(*(member.outbox.put(KIND, body) for body in bodies))
                promised.write("".join(f"{id_}\n" for id_ in ids))
                promised.flush()
                await asyncio.sleep(PAUSE_SECONDS)


if __name__ == "__main__":
    asyncio.run(run(Path(sys.argv[1]), Path(sys.argv[2])))
