"""Files that crash, hang or eat memory, through the real child processes and the real serving core: the node answers on."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_writer import OnnxWriter, endless_model
from tiny_models import DENSE, FORMATS, SCALE, Tiny, write

from models.engines import EngineOptions, Session, get_engine
from models.errors import DeadlineExceeded, TierlineError
from models.serving.isolated import IsolatedSession, IsolationLimits
from models.serving.loaded import Identity, Loaded
from models.serving.local import Local
from models.serving.predictor import InferRequest
from models.serving.probe import ProbeLimits, ProbeRequest, Verdict, file_request, probe_files
from models.serving.repository import Repository
from models.serving.verdicts import Verdicts

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
LIMITS = ProbeLimits(cpu_seconds=20, wall_seconds=20.0)
DAMAGED = {"onnx": 5, "tflite": 5, "torchscript": 1, "export": 1}
"""Damaged files of each format: a child that imports PyTorch takes seconds to start."""


def damage(data: bytes, rng: random.Random) -> bytes:
    """Cut short, bits turned, or a part written over with noise."""
    kind = rng.randrange(3)
    start = rng.randrange(len(data))
    if kind == 0:
        return data[:start]
    broken = bytearray(data)
    for _ in range(8 if kind == 1 else 64):
        place = rng.randrange(len(data)) if kind == 1 else min(start + rng.randrange(64), len(data) - 1)
        broken[place] = rng.randrange(256)
    return bytes(broken)


def request(form: str, tiny: Tiny, folder: Path, change: Callable[[bytes], bytes] = bytes) -> ProbeRequest:
    engine, path, options = write(form, tiny, folder)
    path.write_bytes(change(path.read_bytes()))
    return file_request(path, engine, options=options, limits=LIMITS)


async def test_among_damaged_files_of_every_engine_the_good_ones_are_found(tmp_path: Path) -> None:
    rng = random.Random(20)
    good = [request(form, SCALE, tmp_path / f"good-{form}") for form in FORMATS]
    bad = [
        request(form, DENSE, tmp_path / f"bad-{form}-{index}", lambda data: damage(data, rng))
        for form in FORMATS
        for index in range(DAMAGED[form])
    ]
    mixed = [*good, *bad]
    rng.shuffle(mixed)
    verdicts = Verdicts(tmp_path / "verdicts")
    found = dict(zip((each.path for each in mixed), await verdicts.judge(mixed), strict=True))
    assert [found[each.path] for each in good] == [Verdict(True)] * len(good)
    assert sum(not found[each.path].ok for each in bad) >= len(bad) // 3
    start = time.monotonic()
    kept = [each for each in mixed if found[each.path].final]
    assert await verdicts.judge(kept) == [found[each.path] for each in kept]
    assert time.monotonic() - start < 0.5  # nothing is probed twice
    for each in mixed:
        if found[each.path].ok:
            get_engine(each.variant.engine).load(Path(each.path), each.options).close()


async def test_a_bomb_and_a_hang_hold_up_neither_the_loop_nor_the_other_files(
    tmp_path: Path, onnx_model: OnnxWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.serving.probe.SHARED_SECONDS", 1.0)
    slowest = 0.0

    async def watch() -> None:
        nonlocal slowest
        while True:
            asked = time.monotonic()
            await asyncio.sleep(0.01)
            slowest = max(slowest, time.monotonic() - asked - 0.01)

    hang = file_request(endless_model(tmp_path / "hang.onnx"), "onnx", limits=ProbeLimits(wall_seconds=2.0))
    fine = file_request(onnx_model("mlp"), "onnx", limits=LIMITS)
    watching = asyncio.ensure_future(watch())
    verdicts = await probe_files([hang, fine])
    watching.cancel()
    assert [verdict.ok for verdict in verdicts] == [False, True]
    assert slowest < 0.5


async def serving(sessions: dict[str, Session], seconds: float) -> tuple[Local, Repository]:
    repository = Repository(engines=("onnx",))
    table = {}
    for name, session in sessions.items():
        table[name] = {"1": Loaded(Identity(name, "1", "onnx"), session, max_run_seconds=seconds)}
    repository.install(table)
    return Local(repository, "edge", threads=2), repository


@pytest.fixture(params=["in this process", "isolated"])
async def local(request: Any, onnx_model: OnnxWriter) -> AsyncIterator[Local]:
    """`hang` never ends, `scale` is fine; a run may take 0.5 s."""
    hang, scale = onnx_model("endless"), onnx_model("scale")
    isolated = request.param == "isolated"
    hanging: Session = (
        IsolatedSession(hang, "onnx", limits=IsolationLimits(run_seconds=20))
        if isolated
        else get_engine("onnx").load(hang, EngineOptions())
    )
    made, repository = await serving({"hang": hanging, "scale": get_engine("onnx").load(scale, EngineOptions())}, 0.5)
    yield made
    hanging.stop()
    await made.close()
    await repository.close()


async def test_a_hung_inference_is_terminated_and_its_thread_serves_on(local: Local) -> None:
    hang = InferRequest(model="hang", inputs={"x": np.ones(4, np.float32)})
    fine = InferRequest(model="scale", inputs={"x": np.ones((1, 4), np.float32)})
    hung = [asyncio.ensure_future(local.infer(hang)) for _ in range(3)]
    await asyncio.sleep(0.05)
    start = time.monotonic()
    answer = await asyncio.wait_for(local.infer(fine), 5)
    assert answer.outputs["y"].tolist() == [[2.0] * 4]
    for ended in await asyncio.wait_for(asyncio.gather(*hung, return_exceptions=True), 20):
        assert isinstance(ended, TierlineError), ended
    assert time.monotonic() - start < 15
    for _ in range(5):
        assert (await asyncio.wait_for(local.infer(fine), 5)).outputs["y"].tolist() == [[2.0] * 4]


async def test_a_caller_of_a_hung_model_has_an_answer_by_the_deadline(local: Local) -> None:
    start = time.monotonic()
    request = InferRequest(model="hang", inputs={"x": np.ones(4, np.float32)}, deadline=start + 0.2)
    with pytest.raises(DeadlineExceeded):
        await local.infer(request)
    assert time.monotonic() - start < 1.0
