"""`tierline serve` is told to stop while a file that never ends is tried, loaded or asked for."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest
from onnx_writer import endless_model, identity_model

ROOT = Path(__file__).resolve().parents[3]
TELLING = """
import sys
import models.cli as cli

inner = cli.open_session

def telling(engine, file, options, settings):
    print("loading", flush=True)
    return inner(engine, file, options, settings)

cli.open_session = telling
sys.exit(cli.serve(sys.argv[1:]))
"""
STOP_SECONDS = 12.0
T = TypeVar("T")


@contextmanager
def started(folder: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A server that prints `loading` before it loads a file."""
    log = folder.with_suffix(".log")
    with log.open("w") as errors:
        child = subprocess.Popen(
            [sys.executable, "-c", TELLING, str(folder), "--http-port", "0",
             "--verdicts", str(folder.with_suffix(".verdicts")), *options],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True,
        )  # fmt: skip
    try:
        yield child
    finally:
        child.kill()
        child.wait(10)
        assert child.stdout is not None
        child.stdout.close()


def read_until(child: subprocess.Popen[str], text: str) -> str:
    assert child.stdout is not None
    for line in child.stdout:
        if text in line:
            return line.strip()
    raise AssertionError(f"it ended with {child.wait(10)}")


def eventually(find: Callable[[], T]) -> T:
    end = time.monotonic() + 20
    while not (found := find()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def children(child: subprocess.Popen[str]) -> list[int]:
    found = Path(f"/proc/{child.pid}/task").glob("*/children")
    return [int(number) for file in found for number in file.read_text().split()]


def is_gone(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def stop(child: subprocess.Popen[str]) -> None:
    started_here = children(child)
    child.send_signal(signal.SIGTERM)
    assert child.wait(STOP_SECONDS) == 0
    eventually(lambda: all(map(is_gone, started_here)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "models"
    for name in ("hangs", "works"):
        (path / name / "1").mkdir(parents=True)
    identity_model(path / "works" / "1" / "model.onnx")
    return path


def test_while_a_file_is_loaded_at_the_start(folder: Path) -> None:
    endless_model(folder / "hangs" / "1" / "model.onnx")
    with started(folder, "--no-probe") as server:
        read_until(server, "loading")
        stop(server)


def test_while_a_file_is_tried_in_a_child(folder: Path) -> None:
    endless_model(folder / "hangs" / "1" / "model.onnx")
    with started(folder) as server:
        (child,) = eventually(lambda: children(server))
        stop(server)
        assert is_gone(child)


def test_while_a_file_is_loaded_in_a_process_of_its_own(folder: Path) -> None:
    endless_model(folder / "hangs" / "1" / "model.onnx")
    (folder / "hangs" / "model.toml").write_text('isolation = "process"\n')
    with started(folder, "--no-probe") as server:
        eventually(lambda: children(server))
        stop(server)


def test_while_an_operators_load_hangs_and_others_are_served(folder: Path) -> None:
    (folder / "hangs" / "1").rmdir()
    (folder / "hangs").rmdir()
    with started(folder, "--no-probe") as server:
        address = read_until(server, "serving at").rpartition("//")[2]
        (folder / "hangs" / "1").mkdir(parents=True)
        endless_model(folder / "hangs" / "1" / "model.onnx")
        loading = http.client.HTTPConnection(address, timeout=30)
        loading.request("POST", "/v2/repository/models/hangs/load")
        read_until(server, "loading")
        asking = http.client.HTTPConnection(address, timeout=10)
        body = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}
        asking.request("POST", "/v2/models/works/infer", json.dumps(body))
        assert asking.getresponse().status == 200
        asking.close()
        stop(server)
        loading.close()


def test_a_file_under_trial_does_not_outlive_a_killed_server(folder: Path) -> None:
    endless_model(folder / "hangs" / "1" / "model.onnx")
    with started(folder) as server:
        (child,) = eventually(lambda: children(server))
        # It has set itself up once it has read which framework it needs.
        eventually(lambda: "onnxruntime" in Path(f"/proc/{child}/maps").read_text())
        server.kill()
        eventually(lambda: is_gone(child))
