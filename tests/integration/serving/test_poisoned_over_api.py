"""Poisoned files put into the repository of a running server and loaded by its API: refused in words, serving goes on."""

from __future__ import annotations

import http.client
import json
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from onnx_writer import Node, Value, endless_model, mlp_model, scale_model, write_model
from proofs.malformed import request
from proofs.server import Server, serving
from proofs.sockets import answers, exchange

DAMAGED = 6
ANSWER_SECONDS = 0.5
"""A tiny request answered while files are tried in a child: far above its usual millisecond, far below a stall."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    scale_model(tmp_path / "models" / "fine" / "1" / "model.onnx", 3.0)
    with serving(tmp_path / "models", "--verdicts", str(tmp_path / "verdicts")) as started:
        yield started


def load(server: Server, model: str, seconds: float = 60.0) -> tuple[int, str]:
    link = http.client.HTTPConnection(*server.http, timeout=seconds)
    try:
        link.request("POST", f"/v2/repository/models/{model}/load", b"{}")
        answer = link.getresponse()
        return answer.status, answer.read().decode()
    finally:
        link.close()


def check_serving(server: Server) -> None:
    x = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}
    start = time.monotonic()
    (answer,) = answers(exchange(server.http, request("/v2/models/fine/infer", json.dumps({"inputs": [x]}).encode())))
    assert json.loads(answer.body)["outputs"][0]["data"] == [3, 6, 9, 12]
    assert time.monotonic() - start < ANSWER_SECONDS


def index(server: Server) -> dict[str, dict[str, str]]:
    (answer,) = answers(exchange(server.http, request("/v2/repository/index", b"{}")))
    return {each["name"]: each for each in json.loads(answer.body)}


def hungry_model(path: Path) -> Path:
    """Makes a tensor of 64 GB when it is loaded."""
    make = Node("ConstantOfShape", ["count"], ["big"])
    add = Node("Add", ["x", "big"], ["y"])
    x, y = Value("x", "FP32", [1]), Value("y", "FP32", ["n"])
    return write_model(path, [make, add], [x], [y], {"count": np.array([1 << 34], np.int64)})


def test_damaged_files_and_one_that_eats_memory_are_refused_and_harm_nothing(server: Server, tmp_path: Path) -> None:
    rng = random.Random(4)
    folder = tmp_path / "models"
    good = mlp_model(tmp_path / "mlp.onnx").read_bytes()
    hungry_model(folder / "hungry" / "1" / "model.onnx")
    names = ["hungry"]
    for number in range(DAMAGED):
        path = folder / f"damaged{number}" / "1" / "model.onnx"
        path.parent.mkdir(parents=True)
        data = bytearray(good[: rng.randrange(1, len(good))] if number % 2 else good)
        for _ in range(40):
            data[rng.randrange(min(len(data), 400))] = rng.randrange(256)
        path.write_bytes(data)
        names.append(path.parents[1].name)
    level = server.resident()
    for name in names:
        with ThreadPoolExecutor(1) as pool:
            loading = pool.submit(load, server, name)
            while not loading.done():
                check_serving(server)
                time.sleep(0.02)
        status, body = loading.result()
        assert status == 422, body
        assert json.loads(body)["error"].startswith(f"model '{name}'"), body
        found = index(server)[name]
        assert found["state"] == "UNAVAILABLE"
        assert found["reason"]
    assert server.is_alive()
    assert server.resident() - level < 50e6
    assert server.complaints() == []
    check_serving(server)


def test_a_file_that_hangs_holds_up_neither_answers_nor_the_end_of_the_server(server: Server, tmp_path: Path) -> None:
    endless_model(tmp_path / "models" / "endless" / "1" / "model.onnx")
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(load, server, "endless")
        end = time.monotonic() + 2.0
        while time.monotonic() < end:
            check_serving(server)
            time.sleep(0.02)
        assert not loading.done()  # it is still being tried
        start = time.monotonic()
        server.process.terminate()
        assert server.process.wait(20) == 0
        assert time.monotonic() - start < 15
        with pytest.raises((OSError, http.client.HTTPException, AssertionError)):
            assert loading.result()[0] == 200
    children = [each for each in Path("/proc").glob("[0-9]*/cmdline") if b"endless" in each.read_bytes()]
    assert children == []
