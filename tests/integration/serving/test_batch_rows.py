"""Rows belong to their requests: many arrive at once, are run together, and each gets the answer to its own input."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx_writer import mlp_model
from proofs.server import Server, serving
from proofs.sockets import answers, read_to_end

CONNECTIONS = 32
ROUNDS = 8
WIDTH = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mlp_model(tmp_path_factory.mktemp("models") / "mlp" / "1" / "model.onnx")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    folder = model.parents[2]
    with serving(folder, "--no-probe", "--unix", str(folder.parent / "rows.sock")) as started:
        yield started


def infer(x: np.ndarray[Any, Any], request_id: str, *, binary: bool) -> bytes:
    tensor: dict[str, Any] = {"name": "x", "datatype": "FP32", "shape": list(x.shape)}
    if binary:
        tensor["parameters"] = {"binary_data_size": x.nbytes}
        head = json.dumps({"id": request_id, "inputs": [tensor]}).encode()
        body, extra = head + x.tobytes(), f"Inference-Header-Content-Length: {len(head)}\r\n"
    else:
        body, extra = json.dumps({"id": request_id, "inputs": [tensor | {"data": x.ravel().tolist()}]}).encode(), ""
    return (
        f"POST /v2/models/mlp/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n{extra}\r\n".encode()
        + body
    )


def counts(server: Server) -> tuple[int, int]:
    """Inferences and executions so far."""
    link = http.client.HTTPConnection(*server.http, timeout=10)
    link.request("GET", "/v2/models/mlp/stats")
    (stats,) = json.loads(link.getresponse().read())["model_stats"]
    link.close()
    return stats["inference_count"], stats["execution_count"]


def connections(server: Server) -> list[socket.socket]:
    links = []
    for number in range(CONNECTIONS):
        link = socket.socket(socket.AF_UNIX if number % 2 else socket.AF_INET)
        link.settimeout(20)
        link.connect(server.addresses["unix"] if number % 2 else server.http)
        links.append(link)
    return links


def test_rows_that_are_run_together_come_back_to_the_requests_they_came_with(server: Server, model: Path) -> None:
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(5)
    before = counts(server)
    rows = 0
    for round_number in range(ROUNDS):
        inputs = [rng.standard_normal((int(rng.integers(1, 4)), WIDTH)).astype(np.float32) for _ in range(CONNECTIONS)]
        links = connections(server)
        # Stopped, the server finds all of them waiting at once when it goes on.
        os.kill(server.pid, signal.SIGSTOP)
        try:
            for number, (link, x) in enumerate(zip(links, inputs, strict=True)):
                link.sendall(infer(x, f"{round_number}.{number}", binary=number % 3 > 0))
        finally:
            os.kill(server.pid, signal.SIGCONT)
        for number, (link, x) in enumerate(zip(links, inputs, strict=True)):
            link.shutdown(socket.SHUT_WR)
            (answer,) = answers(read_to_end(link, 20))
            link.close()
            assert answer.status == 200, answer.body
            told = json.loads(answer.body)
            (output,) = told["outputs"]
            assert told["id"] == f"{round_number}.{number}"
            (wanted,) = session.run(None, {"x": x})
            assert output["shape"] == list(wanted.shape)
            np.testing.assert_allclose(np.reshape(output["data"], output["shape"]), wanted, rtol=1e-4, atol=1e-6)
            rows += len(x)
    inferences, executions = (now - then for now, then in zip(counts(server), before, strict=True))
    assert inferences == rows
    # Batches really formed, or the comparison would prove nothing.
    assert executions < ROUNDS * CONNECTIONS / 2
