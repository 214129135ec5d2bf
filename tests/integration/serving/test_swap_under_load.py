"""Versions come, go and make room for one another while requests are under way: none fails, none gets another's answer."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
from onnx_writer import OnnxWriter

from models.errors import NotFound
from models.serving.folder_control import FolderControl
from models.serving.local import Local
from models.serving.predictor import InferRequest, InferResponse
from models.serving.repository import NotResident, Repository

SWAPS = 1000
CYCLES = 200
ASKERS = 2
SMALL, LARGE = np.ones((1, 4), np.float32), np.ones((20_000, 4), np.float32)
MODEL_MB = 10


async def ask(local: Local, repository: Repository, model: str, x: np.ndarray) -> InferResponse:
    while True:
        try:
            return await local.infer(InferRequest(model=model, inputs={"x": x}))
        except NotResident:
            await repository.resident(model, None, time.monotonic() + 30)


@asynccontextmanager
async def asking(
    local: Local, repository: Repository, model: str, *, may_be_gone: bool
) -> AsyncIterator[dict[str, int]]:
    """Ask all the time, in and out of the event loop. Yields version -> answers so far; every answer was that version's."""
    seen: dict[str, int] = {}
    stop = False

    async def one(x: np.ndarray) -> None:
        while not stop:
            try:
                answer = await ask(local, repository, model, x)
            except NotFound:
                assert may_be_gone
            else:
                assert (answer.outputs["y"] == float(answer.version)).all()
                seen[answer.version] = seen.get(answer.version, 0) + 1
            await asyncio.sleep(0)

    tasks = [asyncio.create_task(one(LARGE if number % 2 else SMALL)) for number in range(ASKERS)]
    try:
        yield seen
    finally:
        stop = True
        await asyncio.gather(*tasks)


async def test_a_thousand_hot_swaps_fail_no_request_and_mix_no_versions(tmp_path: Path, onnx_model: OnnxWriter) -> None:
    def write(version: int) -> None:
        onnx_model("scale", tmp_path / "m" / str(version) / "model.onnx", factor=float(version))

    write(1)
    # Measuring how many rows pay would be most of the time that a thousand loads take.
    (tmp_path / "m" / "model.toml").write_text('batching = "off"')
    repository = Repository(engines=())
    control, local = FolderControl(repository, tmp_path, engines=("onnx",)), Local(repository, "edge")
    await control.start()
    async with asking(local, repository, "m", may_be_gone=False) as seen:
        for version in range(2, SWAPS + 2):
            write(version)
            shutil.rmtree(tmp_path / "m" / str(version - 1))
            await control.load("m")
    assert len(seen) > SWAPS / 2
    assert repository.running() == {"m": f"m/{SWAPS + 1}"}
    assert repository.residency.use().registered == 1
    await local.close()
    await control.close()
    await repository.close()


async def test_two_hundred_loads_and_unloads_under_load(tmp_path: Path, onnx_model: OnnxWriter) -> None:
    onnx_model("scale", tmp_path / "m" / "3" / "model.onnx", factor=3.0)
    repository = Repository(engines=())
    control, local = FolderControl(repository, tmp_path, engines=("onnx",)), Local(repository, "edge")
    await control.start()
    async with asking(local, repository, "m", may_be_gone=True) as seen:
        for _ in range(CYCLES):
            await control.unload("m")
            assert "m" not in repository.names()
            await control.load("m")
            before = seen.get("3", 0)
            while seen.get("3", 0) == before:
                await asyncio.sleep(0)
    assert seen["3"] >= CYCLES
    assert list(repository.draining()) == []
    await local.close()
    await control.close()
    await repository.close()


async def test_more_models_than_memory_all_answer(tmp_path: Path, onnx_model: OnnxWriter) -> None:
    names = [f"m{number}" for number in range(1, 7)]
    for name in names:
        onnx_model("scale", tmp_path / name / name[1:] / "model.onnx", factor=float(name[1:]))
        (tmp_path / name / "model.toml").write_text(f"memory_mb = {MODEL_MB}")
    repository = Repository(engines=(), memory_budget=3 * MODEL_MB * 1_000_000)
    control, local = FolderControl(repository, tmp_path, engines=("onnx",)), Local(repository, "edge")
    assert await control.start() == []

    async def use(name: str, x: np.ndarray) -> None:
        for _ in range(3):
            answer = await ask(local, repository, name, x)
            assert (answer.outputs["y"] == float(name[1:])).all()
            assert repository.residency.use().resident <= 3

    await asyncio.gather(*(use(name, x) for name in names for x in (SMALL, LARGE)))
    use_ = repository.residency.use()
    assert (use_.registered, use_.used <= 3 * MODEL_MB * 1_000_000) == (6, True)
    assert use_.evictions > 3
    await local.close()
    await control.close()
    await repository.close()
