"""What a request costs its caller: our client over each transport, `http.client` and `tritonclient`, tiny tensors.

Usage: python tests/bench/client.py [--json FILE]. 64 floats in, 10 out; CPU time of the calling process alone, the server is
another one. Rounds are interleaved, medians are printed, answers are checked before they are timed. A budget of 100 us per
request holds for ours over TCP.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))

from models.client import AsyncClient, Client  # noqa: E402
from models.serving.index import ModelDescription  # noqa: E402
from models.serving.predictor import InferRequest, InferResponse  # noqa: E402
from models.tensor import TensorSpec  # noqa: E402

BUDGET_US = 100.0
REQUESTS = 1_000
"""Of each subject in each round; over gRPC a quarter of it."""
ROUNDS = 5
START_SECONDS = 30.0
WEIGHTS = np.random.default_rng(0).standard_normal((64, 10)).astype(np.float32)
X = np.random.default_rng(1).standard_normal((1, 64)).astype(np.float32)

Ask = Callable[[int], Any]
"""Makes so many requests, one after the other, and returns the last answer."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    parser.add_argument("--serve", type=Path, metavar="SOCKET", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
        return 0
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder) / "socket") as urls, ExitStack() as stack:
        figures = measure(make_subjects(urls, stack))
    print_table(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0 if figures["rows"]["Client http"]["cpu_us"] <= BUDGET_US else 1


def measure(subjects: dict[str, Ask]) -> dict[str, Any]:
    expected = X @ WEIGHTS
    for name, ask in subjects.items():
        if not np.allclose(ask(1), expected, rtol=1e-5, atol=1e-5):
            raise SystemExit(f"{name} got a wrong answer")
    cpu: dict[str, list[float]] = {name: [] for name in subjects}
    wall: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(ROUNDS):
        for name, ask in subjects.items():
            count = REQUESTS // 4 if "grpc" in name else REQUESTS
            begun, start = time.process_time(), time.perf_counter()
            ask(count)
            cpu[name].append((time.process_time() - begun) / count * 1e6)
            wall[name].append((time.perf_counter() - start) / count * 1e6)
    rows = {
        name: {
            "cpu_us": round(median(cpu[name]), 1),
            "cpu_us_min": round(min(cpu[name]), 1),
            "wall_us": round(median(wall[name]), 1),
        }
        for name in subjects
    }
    return {"requests": REQUESTS * ROUNDS, "rounds": ROUNDS, "load_average": os.getloadavg()[0], "rows": rows}


def make_subjects(urls: dict[str, str], stack: ExitStack) -> dict[str, Ask]:
    subjects: dict[str, Ask] = {}
    for scheme, url in urls.items():
        client = stack.enter_context(Client(url))
        subjects[f"Client {scheme}"] = repeated(lambda client=client: client.infer("mlp", {"x": X})["y"])
    for scheme, url in urls.items():
        subjects[f"AsyncClient {scheme}"] = asynchronous(url, stack)
    address = urls["http"].removeprefix("http://")
    subjects["http.client"] = plain(address, stack)
    if find_spec("tritonclient") is not None:
        import tritonclient.http

        subjects["tritonclient http"] = triton(tritonclient.http, address, stack)
        if "grpc" in urls:
            import tritonclient.grpc

            subjects["tritonclient grpc"] = triton(tritonclient.grpc, urls["grpc"].removeprefix("grpc://"), stack)
    return subjects


def repeated(once: Callable[[], Any]) -> Ask:
    def ask(count: int) -> Any:
        for _ in range(count - 1):
            once()
        return once()

    return ask


def asynchronous(url: str, stack: ExitStack) -> Ask:
    runner = stack.enter_context(asyncio.Runner())
    client = AsyncClient(url)

    async def ask(count: int) -> Any:
        for _ in range(count - 1):
            await client.infer("mlp", {"x": X})
        return (await client.infer("mlp", {"x": X}))["y"]

    async def close() -> None:
        await client.close()

    stack.callback(lambda: runner.run(close()))
    return lambda count: runner.run(ask(count))


def plain(address: str, stack: ExitStack) -> Ask:
    """What a careful program does without a client: the same bytes through the standard library."""
    connection = http.client.HTTPConnection(address, timeout=5)
    stack.callback(connection.close)
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 64], "parameters": {"binary_data_size": X.nbytes}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    headers = {"content-type": "application/octet-stream", "inference-header-content-length": str(len(head))}

    def ask() -> Any:
        connection.request("POST", "/v2/models/mlp/infer", head + X.tobytes(), headers)
        response = connection.getresponse()
        body = response.read()
        length = int(response.headers["inference-header-content-length"])
        shape = json.loads(body[:length])["outputs"][0]["shape"]
        return np.frombuffer(body, np.float32, offset=length).reshape(shape)

    return repeated(ask)


def triton(library: Any, address: str, stack: ExitStack) -> Ask:
    client = library.InferenceServerClient(address)
    stack.callback(client.close)

    def ask() -> Any:
        tensor = library.InferInput("x", X.shape, "FP32")
        tensor.set_data_from_numpy(X)
        return client.infer("mlp", [tensor]).as_numpy("y")

    return repeated(ask)


def print_table(figures: dict[str, Any]) -> None:
    print(f"{figures['requests']} requests each; load average {figures['load_average']:.2f}")
    print(f"{'':24}{'CPU us':>9}{'least':>9}{'wall us':>9}{'x ours':>9}")
    ours = figures["rows"]["Client http"]["cpu_us"]
    for name, row in figures["rows"].items():
        ratio = row["cpu_us"] / ours
        print(f"{name:24}{row['cpu_us']:9}{row['cpu_us_min']:9}{row['wall_us']:9}{ratio:9.2f}")
    verdict = "kept" if ours <= BUDGET_US else "MISSED"
    print(f"budget of {BUDGET_US:g} us for Client http: {verdict}")


# --- the server ------------------------------------------------------------------------------------------------------


@contextmanager
def serving(socket: Path) -> Iterator[dict[str, str]]:
    """A server process. Its URLs by scheme."""
    command = [sys.executable, __file__, "--serve", str(socket)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())
    finally:
        process.terminate()
        process.wait(START_SECONDS)


class Dense:
    """One dense layer in numpy: the caller's cost is measured, not the engine's."""

    async def infer(self, request: InferRequest) -> InferResponse:
        return InferResponse(
            outputs={"y": request.inputs["x"] @ WEIGHTS}, model="mlp", package="mlp", version="1", tier="edge"
        )

    def names(self) -> Sequence[str]:
        return ["mlp"]

    def describe(self, model: str, version: str | None) -> ModelDescription:
        x, y = TensorSpec("x", "FP32", (-1, 64)), TensorSpec("y", "FP32", (-1, 10))
        return ModelDescription("mlp", "mlp", ("1",), "numpy_fp32", (x,), (y,))

    def is_ready(self, model: str, version: str | None) -> bool:
        return True


def serve(socket: Path) -> None:
    import uvloop

    from models.serving.http.server import serve_http
    from models.serving.plane import DataPlane
    from models.serving.rest import RestHandler

    async def run() -> None:
        dense = Dense()
        plane = DataPlane(dense, dense, ready=lambda: True)
        async with AsyncExitStack() as stack:
            server = await stack.enter_async_context(serve_http(RestHandler(plane), unix=socket))
            urls = {"http": server.url, "unix": f"unix://{socket}"}
            if find_spec("grpc") is not None:
                from models.serving.grpc.server import serve_grpc

                urls["grpc"] = (await stack.enter_async_context(serve_grpc(plane))).url
            print(json.dumps(urls), flush=True)
            await asyncio.Event().wait()

    uvloop.run(run())


if __name__ == "__main__":
    raise SystemExit(main())
