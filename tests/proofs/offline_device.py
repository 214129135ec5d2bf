"""A device's application for `offline.py`: `offline_device.py node.toml journal`. Each line on standard input is one step.

`ask` answers an image with the SDK and prints the digit; `event` puts an event into the outbox and writes its id to the
journal once it is promised; end of input ends it. One JSON line comes back for each line.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from device_agent import Agent
from models.zoo import digits

ASKED = 20


async def run(config: Path, journal: Path) -> None:
    images, _ = digits.held_out()
    loop = asyncio.get_running_loop()
    async with Agent(config) as agent:
        await agent.wait_for(digits.MODEL, timeout=60)
        while line := (await loop.run_in_executor(None, sys.stdin.readline)).strip():
            if line == "event":
                id_ = await agent.event("offline", {"from": "the device"})
                with journal.open("a") as promised:
                    promised.write(f"{id_}\n")
                answer: object = id_
            else:
                found = [
                    await agent.infer(digits.MODEL, {"image": images[index : index + 1]}, min_confidence=0.0)
                    for index in range(ASKED)
                ]
                answer = [int(each.outputs["probabilities"].argmax()) for each in found]
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    asyncio.run(run(Path(sys.argv[1]), Path(sys.argv[2])))
