"""A real server process for clients that nobody here wrote. TIERLINE_CONFORMANCE_URL and
TIERLINE_CONFORMANCE_GRPC_URL point the tests at another one."""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from onnx_writer import ELEMENT_TYPES, identity_model, scale_model, sum_model

ROOT = Path(__file__).parents[2]
START_SECONDS = 30


def write_models(folder: Path) -> None:
    """The models a conformance server must serve: identity_<datatype>, sum, and scale in versions 1 (x2) and 2 (x3)."""
    for datatype in ELEMENT_TYPES:
        identity_model(folder / f"identity_{datatype}" / "1" / "model.onnx", datatype, ("n", 3))
    sum_model(folder / "sum" / "1" / "model.onnx")
    scale_model(folder / "scale" / "1" / "model.onnx", 2.0)
    scale_model(folder / "scale" / "2" / "model.onnx", 3.0)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """host:port of the server."""
    given = os.environ.get("TIERLINE_CONFORMANCE_URL")
    if given:
        yield given.removeprefix("http://")
        return
    with serving(tmp_path_factory.mktemp("models"), "http") as address:
        yield address


@pytest.fixture(scope="module")
def grpc_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """host:port of the gRPC server, in a process of its own: what these tests load and count is theirs."""
    given = os.environ.get("TIERLINE_CONFORMANCE_GRPC_URL")
    if given:
        yield given.removeprefix("grpc://")
        return
    with serving(tmp_path_factory.mktemp("grpc_models"), "grpc", "--grpc-port", "0", "--no-probe") as address:
        yield address


@contextmanager
def serving(folder: Path, scheme: str, *options: str) -> Iterator[str]:
    """A server of the models; where it answers to `scheme`."""
    write_models(folder)
    command = [sys.executable, "-m", "tierline", "serve", str(folder), "--http-port", "0", *options]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        yield _address(process, f"serving at {scheme}://")
    finally:
        process.terminate()
        assert process.wait(START_SECONDS) == 0


def _address(process: subprocess.Popen[str], prefix: str) -> str:
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        assert selector.select(START_SECONDS), "the server printed nothing"
    for line in process.stdout:
        if line.startswith(prefix):
            return line.strip().removeprefix(prefix)
    raise AssertionError(f"the server ended with code {process.wait(START_SECONDS)}")
