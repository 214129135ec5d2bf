"""Loads, unloads and hot swaps under load: `python tests/proofs/soak.py` makes 200 and 1,000 of them and prints figures.

A real server process is told over the repository API while keep-alive clients ask all the time, over TCP, Unix socket and gRPC,
without and with binary data. What must hold: no request fails or gets an answer that is not the one of a version that was
live while it was under way, and memory grows by less than 2 % after warm-up.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import shutil
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from onnx_writer import scale_model
from proofs.server import Server, serving

CLIENTS = 12
PAUSE_SECONDS = 0.002
"""Between two requests of one client: the machine's cores are shared by clients, server and whoever loads."""
WARM_UP = 0.2
"""Share of the steps after which memory counts as settled."""
GROWTH = 0.02
SETTLE_SECONDS = 3.0
TIMEOUT_SECONDS = 30.0
WIDTH = 64


class Live:
    """Which versions may answer: the one that serves, and during a swap the one that is coming."""

    def __init__(self) -> None:
        self.oldest = self.newest = 1


class Client:
    """One keep-alive connection; `ask` gives the status and, for 200, the factor that it found in the answer."""

    def __init__(self, number: int, server: Server) -> None:
        self.rows = 1 + number % 3
        self.binary = number % 2 == 1
        host, port = server.http
        self.link = http.client.HTTPConnection(host, port, timeout=TIMEOUT_SECONDS)
        if number % 4 == 3:
            self.link.sock = socket.socket(socket.AF_UNIX)
            self.link.sock.settimeout(TIMEOUT_SECONDS)
            self.link.sock.connect(server.addresses["unix"])
        self.x = np.arange(1, self.rows * WIDTH + 1, dtype=np.float32).reshape(self.rows, WIDTH)
        tensor: dict[str, Any] = {"name": "x", "datatype": "FP32", "shape": list(self.x.shape)}
        self.headers: dict[str, str] = {}
        if self.binary:
            tensor["parameters"] = {"binary_data_size": self.x.nbytes}
            head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
            self.body = head + self.x.tobytes()
            self.headers["Inference-Header-Content-Length"] = str(len(head))
        else:
            self.body = json.dumps({"inputs": [tensor | {"data": self.x.ravel().tolist()}]}).encode()

    def ask(self, model: str) -> tuple[int, float, str]:
        """Status, factor and the version that the answer names. Raises OSError, http.client.HTTPException, AssertionError."""
        self.link.request("POST", f"/v2/models/{model}/infer", self.body, self.headers)
        answer = self.link.getresponse()
        data = answer.read()
        if answer.status != 200:
            return answer.status, 0.0, data.decode(errors="replace")
        length = int(answer.headers.get("Inference-Header-Content-Length", len(data)))
        told = json.loads(data[:length])
        (output,) = told["outputs"]
        y = np.frombuffer(data, np.float32, offset=length) if self.binary else np.array(output["data"], np.float32)
        factors = y.reshape(self.x.shape) / self.x
        assert output["shape"] == list(self.x.shape)
        assert np.ptp(factors) < 1e-3 * factors.flat[0], "one answer mixes versions"
        return 200, float(factors.flat[0]), told["model_version"]

    def close(self) -> None:
        self.link.close()


class GrpcClient:
    """As `Client`, over gRPC."""

    def __init__(self, server: Server) -> None:
        import grpc

        from models.serving.grpc import inference_pb2 as pb

        self._pb = pb
        self._error = grpc.RpcError
        self._channel = grpc.insecure_channel(server.addresses["grpc"])
        self._infer = self._channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")

    def ask(self, model: str) -> tuple[int, float, str]:
        request = self._pb.ModelInferRequest(
            model_name=model, raw_input_contents=[struct.pack(f"<{WIDTH}f", *[2.0] * WIDTH)]
        )
        request.inputs.add(name="x", datatype="FP32", shape=[1, WIDTH])
        try:
            data = self._infer(request.SerializeToString(), timeout=TIMEOUT_SECONDS)
        except self._error as error:
            return 404 if error.code().name == "NOT_FOUND" else 500, 0.0, f"{error.code().name} {error.details()}"
        answer = self._pb.ModelInferResponse.FromString(data)
        y = np.frombuffer(answer.raw_output_contents[0], np.float32)
        assert np.ptp(y) == 0, "one answer mixes versions"
        return 200, float(y[0]) / 2, answer.model_version

    def close(self) -> None:
        self._channel.close()


class Load:
    """Clients that ask for model `m` all the time. `may_be_gone`: between unload and load 404 is the right answer."""

    def __init__(self, server: Server, live: Live, clients: int, *, may_be_gone: bool) -> None:
        self._server, self._live, self._may_be_gone = server, live, may_be_gone
        self._stop = threading.Event()
        self._go = threading.Event()
        self._go.set()
        self.answers = self.gone = 0
        self.problems: list[str] = []
        self.versions: set[str] = set()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._go.set()
        for thread in self._threads:
            thread.join(2 * TIMEOUT_SECONDS)

    def quiet_level(self) -> int:
        """The server's resident bytes while nobody asks, its connections open."""
        self._go.clear()
        level = self._server.resident_settled(SETTLE_SECONDS)
        self._go.set()
        return level

    def _ask(self, number: int) -> None:
        client: Client | GrpcClient = GrpcClient(self._server) if number % 6 == 5 else Client(number, self._server)
        while self._go.wait() and not self._stop.is_set():
            oldest = self._live.oldest
            try:
                status, factor, version = client.ask("m")
            except Exception as error:  # noqa: BLE001 - whatever it is, a client was let down
                self._note(f"client {number}: {type(error).__name__}: {error}")
                break
            newest = self._live.newest
            with self._lock:
                if status == 200:
                    self.answers += 1
                    self.versions.add(version)
                    if round(factor) != int(version) or not oldest <= int(version) <= newest:
                        self.problems.append(f"factor {factor} of version {version}, live were {oldest} to {newest}")
                elif status == 404 and self._may_be_gone:
                    self.gone += 1
                else:
                    self.problems.append(f"status {status}: {version[:200]}")
            time.sleep(PAUSE_SECONDS)
        client.close()

    def _note(self, problem: str) -> None:
        with self._lock:
            self.problems.append(problem)


class Control:
    """The repository API."""

    def __init__(self, server: Server) -> None:
        host, port = server.http
        self._link = http.client.HTTPConnection(host, port, timeout=TIMEOUT_SECONDS)

    def say(self, what: str) -> None:
        self._link.request("POST", f"/v2/repository/models/m/{what}", b"{}")
        answer = self._link.getresponse()
        data = answer.read()
        assert answer.status == 200, f"{what}: {answer.status} {data!r}"

    def close(self) -> None:
        self._link.close()


def measure(
    name: str,
    folder: Path,
    count: int,
    clients: int,
    step: Callable[[Control, Path, Live, int], None],
    *,
    may_be_gone: bool,
) -> dict[str, Any]:
    """`count` steps on a server of its own, in `folder`."""
    models = folder / "models"
    write(models, 1)
    scale_model(models / "other" / "1" / "model.onnx")
    # Measuring how many rows pay takes most of a load; batches form all the same.
    (models / "m" / "model.toml").write_text("batching = 8\n")
    live = Live()
    settled = 0
    with serving(models, "--no-probe", "--unix", str(folder / "s")) as server:
        control = Control(server)
        descriptors = server.descriptors()
        start = time.monotonic()
        with Load(server, live, clients, may_be_gone=may_be_gone) as load:
            for number in range(1, count + 1):
                step(control, models, live, number)
                if number == max(int(count * WARM_UP), 1):
                    settled = load.quiet_level()
                if load.problems or not server.is_alive():
                    break
            seconds = time.monotonic() - start
            ended = load.quiet_level()
        control.close()
        left = server.descriptors_settled(descriptors)
        complaints = server.complaints()
        alive = server.is_alive()
    return {
        "what": name,
        "count": count,
        "seconds": round(seconds, 1),
        "clients": clients,
        "answers": load.answers,
        "versions_seen": len(load.versions),
        "not_loaded": load.gone,
        "failed_or_wrong": len(load.problems),
        "settled_mb": round(settled / 1e6, 1),
        "ended_mb": round(ended / 1e6, 1),
        "growth": round(ended / settled - 1, 4),
        "descriptors": {"before": descriptors, "after": left},
        "alive": alive,
        "complaints": complaints[:10],
        "problems": load.problems[:10],
    }


def write(models: Path, version: int) -> None:
    """Version n multiplies by n."""
    scale_model(models / "m" / str(version) / "model.onnx", float(version), WIDTH)


def swap(control: Control, models: Path, live: Live, number: int) -> None:
    """The next version takes over."""
    write(models, number + 1)
    shutil.rmtree(models / "m" / str(number))
    live.newest = number + 1
    control.say("load")
    live.oldest = number + 1


def cycle(control: Control, models: Path, live: Live, number: int) -> None:
    control.say("unload")
    control.say("load")
    time.sleep(5 * PAUSE_SECONDS)  # so that it is asked before it goes again


def run(folder: Path, *, swaps: int, cycles: int, clients: int = CLIENTS) -> list[dict[str, Any]]:
    (folder / "swaps").mkdir()
    (folder / "cycles").mkdir()
    return [
        measure("hot swaps", folder / "swaps", swaps, clients, swap, may_be_gone=False),
        measure("load/unload cycles", folder / "cycles", cycles, clients, cycle, may_be_gone=True),
    ]


def verdict(rows: list[dict[str, Any]], growth: float = GROWTH) -> list[str]:
    """What of the promise does not hold, [] = it holds."""
    broken = []
    for row in rows:
        if row["failed_or_wrong"] or not row["alive"]:
            broken.append(f"{row['what']}: {row['failed_or_wrong']} failed or wrong answers")
        if row["growth"] > growth:
            broken.append(f"{row['what']}: memory grew by {row['growth']:.1%}")
        if row["descriptors"]["after"] > row["descriptors"]["before"]:
            broken.append(f"{row['what']}: descriptors were left open")
        if row["complaints"]:
            broken.append(f"{row['what']}: the server's log tells of failures that nobody expected")
    return broken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--swaps", type=int, default=1000)
    parser.add_argument("--cycles", type=int, default=200)
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--json", type=Path, help="write the result here as well")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        rows = run(Path(place), swaps=arguments.swaps, cycles=arguments.cycles, clients=arguments.clients)
    text = json.dumps({"load_average": os.getloadavg()[0], "rows": rows}, indent=1)
    if arguments.json is not None:
        arguments.json.write_text(text)
    print(text)
    broken = verdict(rows)
    print(
        "; ".join(broken)
        or "no request failed, no answer was wrong: " + ", ".join(f"{row['what']} {row['growth']:+.1%}" for row in rows)
    )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
