"""Tierline's data plane beside a FastAPI baseline and raw onnxruntime, one tiny dense network (64-128-10, FP32).

Usage: python tests/bench/run.py [--json FILE]. Rounds are interleaved and medians are printed; every server's answers are
checked before it is timed. The figures of a busy machine are worth their ratios only.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import onnxruntime

ROOT = Path(__file__).parents[2]
# The model writer is shared with the tests, which are no package.
sys.path.append(str(ROOT / "tests"))

from measure import Load, cpu_per_request, latencies, pss_megabytes  # noqa: E402
from onnx_writer import mlp_model  # noqa: E402

ROUNDS = 3
CONNECTIONS = 32
START_SECONDS = 30.0
PATH = "/v2/models/mlp/infer"


class Subject(NamedTuple):
    """A way to ask a server: its body, and how the answer is read. `requests`: per round, for about two seconds."""

    name: str
    server: str
    headers: list[str]
    body: bytes
    read: Callable[[http.client.HTTPResponse], Any]
    requests: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    arguments = parser.parse_args()
    if shutil.which("h2load") is None:
        print("this benchmark needs h2load (Debian, Ubuntu: apt install nghttp2-client)", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        figures = run(Path(folder))
    print_table(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def run(folder: Path) -> dict[str, Any]:
    model = mlp_model(folder / "models" / "mlp" / "1" / "model.onnx")
    x = np.random.default_rng(1).standard_normal((1, 64)).astype(np.float32)
    raw_us, expected = raw_run(model, x)
    subjects = make_subjects(x)
    ports = {"tierline": free_port(), "fastapi": free_port()}
    commands = {
        "tierline": ["-m", "tierline", "serve", str(folder / "models"), "--http-port", str(ports["tierline"])],
        "fastapi": [str(ROOT / "tests" / "bench" / "fastapi_baseline.py"), str(model), str(ports["fastapi"])],
    }
    with ExitStack() as stack:
        pids, cold = {}, {}
        for name, command in commands.items():
            first = next(subject for subject in subjects if subject.server == name)
            pids[name], cold[name] = stack.enter_context(started(command, ports[name], first, expected))
        for subject in subjects:
            check(ports[subject.server], subject, expected)
        loads = {
            subject.name: Load(f"http://127.0.0.1:{ports[subject.server]}{PATH}", subject.headers, subject.body)
            for subject in subjects
        }
        cpu: dict[str, list[float]] = {subject.name: [] for subject in subjects}
        single: dict[str, list[Any]] = {subject.name: [] for subject in subjects}
        for _ in range(ROUNDS):
            for subject in subjects:
                pid, load = pids[subject.server], loads[subject.name]
                cpu[subject.name].append(cpu_per_request(pid, load, connections=CONNECTIONS, requests=subject.requests))
                single[subject.name].append(latencies(load, requests=subject.requests // 10))
        rows = {
            subject.name: {
                "cpu_us": round(median(cpu[subject.name]), 1),
                "cpu_us_min": round(min(cpu[subject.name]), 1),
                "p50_us": median(times.p50 for times in single[subject.name]),
                "p99_us": median(times.p99 for times in single[subject.name]),
                "added_us": round(median(times.p50 for times in single[subject.name]) - raw_us, 1),
                "cold_start_s": round(cold[subject.server], 2),
                "pss_mb": round(pss_megabytes(pids[subject.server]), 1),
            }
            for subject in subjects
        }
    ratio = rows["fastapi json"]["cpu_us"] / rows["tierline binary"]["cpu_us"]
    return {
        "raw_onnxruntime_us": round(raw_us, 2),
        "connections": CONNECTIONS,
        "rounds": ROUNDS,
        "load_average": os.getloadavg()[0],
        "rows": rows,
        "fastapi_to_tierline": round(ratio, 2),
    }


def raw_run(model: Path, x: Any) -> tuple[float, Any]:
    """CPU microseconds of one in-process run (median of rounds), and its answer."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    feed, rounds, runs = {"x": x}, [], 5_000
    for _ in range(ROUNDS + 1):
        start = time.process_time()
        for _ in range(runs):
            session.run(["y"], feed)
        rounds.append((time.process_time() - start) / runs * 1e6)
    return median(rounds[1:]), session.run(["y"], feed)[0]


def make_subjects(x: Any) -> list[Subject]:
    tensor = {"name": "x", "datatype": "FP32", "shape": list(x.shape)}
    binary = {"inputs": [{**tensor, "parameters": {"binary_data_size": x.nbytes}}]}
    head = json.dumps({**binary, "parameters": {"binary_data_output": True}}).encode()
    text = json.dumps({"inputs": [{**tensor, "data": x.ravel().tolist()}]}).encode()
    octets = ["content-type: application/octet-stream", f"inference-header-content-length: {len(head)}"]
    plain = ["content-type: application/json"]
    return [
        Subject(
            "tierline binary",
            "tierline",
            [*octets, "tierline-deadline-ms: 1000"],
            head + x.tobytes(),
            read_binary,
            30_000,
        ),
        Subject("tierline json", "tierline", [*plain, "tierline-deadline-ms: 1000"], text, read_json, 30_000),
        Subject("fastapi json", "fastapi", plain, text, read_json, 5_000),
    ]


def read_binary(response: http.client.HTTPResponse) -> Any:
    length = int(response.headers["inference-header-content-length"])
    return np.frombuffer(response.read(), np.float32, offset=length)


def read_json(response: http.client.HTTPResponse) -> Any:
    return np.array(json.load(response)["outputs"][0]["data"], np.float32)


def check(port: int, subject: Subject, expected: Any) -> None:
    """One request; raises unless the answer is the model's."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        headers = dict(header.split(": ") for header in subject.headers)
        connection.request("POST", PATH, subject.body, headers)
        got = subject.read(connection.getresponse())
    finally:
        connection.close()
    np.testing.assert_allclose(got, expected.ravel(), rtol=1e-5, atol=1e-6)


@contextmanager
def started(command: list[str], port: int, subject: Subject, expected: Any) -> Iterator[tuple[int, float]]:
    """A server process, and the seconds from its start to its first correct answer."""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        while True:
            try:
                check(port, subject, expected)
                break
            except ConnectionRefusedError:
                if process.poll() is not None or time.monotonic() - start > START_SECONDS:
                    raise
                time.sleep(0.005)
        yield process.pid, time.monotonic() - start
    finally:
        process.terminate()
        process.wait(START_SECONDS)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def print_table(figures: dict[str, Any]) -> None:
    print(f"raw onnxruntime in process: {figures['raw_onnxruntime_us']} us; load average {figures['load_average']:.2f}")
    columns = ["cpu_us", "cpu_us_min", "p50_us", "p99_us", "added_us", "cold_start_s", "pss_mb"]
    print(f"{'':<16}" + "".join(f"{column:>14}" for column in columns))
    for name, row in figures["rows"].items():
        print(f"{name:<16}" + "".join(f"{row[column]:>14}" for column in columns))
    print(f"cpu_us: server CPU per request at {figures['connections']} connections; p50, p99, added: one connection")
    print(f"FastAPI needs {figures['fastapi_to_tierline']} times the CPU of Tierline (binary)")


if __name__ == "__main__":
    raise SystemExit(main())
