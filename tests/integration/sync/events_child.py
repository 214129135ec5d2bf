"""A node that only has events to tell, as a process: `events_child.py DATA BROKER_URL NODE FIRST COUNT`, token on stdin.

Each number is written to DATA/put.log once `put` has returned, so that whoever kills this process knows what must arrive.
COUNT 0: sends what waits and ends when nothing does.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from sync.channel import LinkOptions
from sync.clock import SystemClock
from sync.control import ControlPlane, new_boot_id
from sync.link import Link
from sync.messages import Capabilities
from sync.outbox import Outbox
from sync.outbox_sender import Sender


async def main(data: Path, url: str, node: str, first: int, count: int, token: str) -> None:
    clock = SystemClock()
    options = LinkOptions(url=url, client_id=node, username=node, password=token, min_delay=0.1, max_delay=1.0)
    async with Outbox(data / "outbox.db", clock=clock) as outbox, Link(options) as link:
        sender = Sender(outbox, link, node, clock)
        control = ControlPlane(
            link,
            node,
            {},
            capabilities=Capabilities(tier="edge"),
            running=dict,
            clock=clock,
            boot=new_boot_id(),
            handlers={"ack": outbox.acknowledge},
            on_hub=sender.hub_started,
        )
        tasks = [asyncio.create_task(sender.run()), asyncio.create_task(control.run())]
        with (data / "put.log").open("a") as log:
            for number in range(first, first + count):
                await outbox.put("app.count", b"%d" % number, priority=number % 10)
                log.write(f"{number}\n")
                log.flush()
                await asyncio.sleep(0.001)
        while outbox.pending or not outbox.starts:
            await asyncio.sleep(0.05)
        print(outbox.resent)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


if __name__ == "__main__":
    folder, broker, name, start, amount = sys.argv[1:]
    asyncio.run(main(Path(folder), broker, name, int(start), int(amount), sys.stdin.readline().strip()))
