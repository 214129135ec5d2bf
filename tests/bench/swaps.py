"""Memory over many swaps and load/unload cycles under load: `python tests/bench/swaps.py` prints JSON and a table.

Growth is counted from the level reached after the first tenth, when allocators and frameworks have settled. Both levels are
the lowest of some readings while requests go on, taken once freed memory has been given back.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from onnx_writer import Node, Value, write_model

from models.errors import TierlineError
from models.serving.folder_control import FolderControl
from models.serving.local import Local
from models.serving.memory import keep_few_arenas, resident_bytes
from models.serving.predictor import InferRequest
from models.serving.repository import TRIM_SECONDS, Repository

WIDTH = 512
ASKERS = 4
SERVED_SECONDS = 0.005
"""Time between a load and the next unload: enough for every asker to be answered."""


def write(folder: Path, version: int) -> None:
    """A dense layer of 1 MB that multiplies by the number of its version."""
    weights = {"w": np.eye(WIDTH, dtype=np.float32) * np.float32(version)}
    x, y = Value("x", "FP32", ["n", WIDTH]), Value("y", "FP32", ["n", WIDTH])
    write_model(folder / "m" / str(version) / "model.onnx", [Node("MatMul", ["x", "w"], ["y"])], [x], [y], weights)


class Traffic:
    """Counts of answers, and of those that failed or were another version's."""

    def __init__(self) -> None:
        self.answers = self.failed = self.wrong = 0


@asynccontextmanager
async def traffic(local: Local, repository: Repository) -> AsyncIterator[Traffic]:
    """Ask for the model, whenever it is served, until the block ends."""
    counts, stop = Traffic(), False
    x = np.ones((8, WIDTH), np.float32)

    async def one() -> None:
        while not stop:
            if repository.has("m", None):
                try:
                    answer = await local.infer(InferRequest(model="m", inputs={"x": x}))
                    counts.answers += 1
                    counts.wrong += not (answer.outputs["y"] == float(answer.version)).all()
                except TierlineError:
                    counts.failed += 1
            await asyncio.sleep(0.001)

    tasks = [asyncio.create_task(one()) for _ in range(ASKERS)]
    try:
        yield counts
    finally:
        stop = True
        await asyncio.gather(*tasks)


async def level() -> int:
    """Resident bytes, the lowest of ten readings."""
    await asyncio.sleep(2 * TRIM_SECONDS)
    readings = []
    for _ in range(10):
        readings.append(resident_bytes())
        await asyncio.sleep(0.02)
    return min(readings)


async def measure(
    name: str, count: int, step: Callable[[FolderControl, Path, int], Awaitable[None]]
) -> dict[str, object]:
    """`count` steps under load in a folder of their own."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write(folder, 1)
        repository = Repository(engines=())
        control, local = FolderControl(repository, folder, engines=("onnx",)), Local(repository, "edge")
        await control.start()
        start = time.monotonic()
        async with traffic(local, repository) as counts:
            settled = 0
            for number in range(1, count + 1):
                await step(control, folder, number)
                if number == max(count // 10, 1):
                    settled = await level()
            seconds = time.monotonic() - start
            ended = await level()
        await local.close()
        await control.close()
        await repository.close()
    return {
        "what": name,
        "count": count,
        "seconds": round(seconds, 2),
        "answers": counts.answers,
        "failed": counts.failed,
        "wrong": counts.wrong,
        "settled_mb": round(settled / 1e6, 1),
        "ended_mb": round(ended / 1e6, 1),
        "growth_percent": round((ended / settled - 1) * 100, 2) if settled else None,
    }


async def swap(control: FolderControl, folder: Path, number: int) -> None:
    write(folder, number + 1)
    shutil.rmtree(folder / "m" / str(number))
    await control.load("m")


async def cycle(control: FolderControl, folder: Path, number: int) -> None:
    await control.unload("m")
    await control.load("m")
    await asyncio.sleep(SERVED_SECONDS)


async def run(swaps: int, cycles: int) -> None:
    keep_few_arenas()  # as every process that serves
    rows = [await measure("hot swaps", swaps, swap), await measure("load/unload cycles", cycles, cycle)]
    print(json.dumps({"load_average": os.getloadavg()[0], "rows": rows}))
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--swaps", type=int, default=1000)
    parser.add_argument("--cycles", type=int, default=200)
    arguments = parser.parse_args()
    asyncio.run(run(arguments.swaps, arguments.cycles))
