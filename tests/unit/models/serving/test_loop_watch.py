"""A run that holds the event loop is ended from outside it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from session_fake import WAIT_SECONDS, FakeSession, loaded

from models.errors import EngineFailure
from models.serving.local import Local
from models.serving.loop_watch import LoopWatch
from models.serving.predictor import InferRequest
from models.serving.repository import Repository


class Endless(FakeSession):
    def __init__(self) -> None:
        super().__init__()
        self.stopped = threading.Event()

    def run(self, inputs: Mapping[str, Any], outputs: Sequence[str]) -> list[Any]:
        if not self.stopped.wait(WAIT_SECONDS):
            raise AssertionError("nobody stopped it")
        raise EngineFailure("the run was stopped")

    def stop(self) -> bool:
        self.stopped.set()
        return True


@pytest.mark.parametrize("gathered", [False, True])
async def test_a_run_that_never_ends_is_stopped_and_its_model_leaves_the_loop(gathered: bool) -> None:
    repository = Repository(engines=())
    local = Local(repository, "edge", threads=1)
    local._watch = local._turn._watch = LoopWatch(limit=0.05)
    made = loaded(Endless(), inline=True)
    if gathered:
        made.seconds = 1e-4  # not cheap: waits for the end of its turn
    repository.install({"m": {"1": made}})
    with pytest.raises(EngineFailure, match="stopped"):
        await asyncio.wait_for(local.infer(InferRequest(model="m", inputs={"x": np.ones((1, 2), np.float32)})), 5)
    assert made.inline_elements == 0
    assert made.in_flight == 0
    await local.close()
    await repository.close()
