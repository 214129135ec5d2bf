"""What becomes of a process that is told to stop, in processes of its own: `run_until_stopped` may end them."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[4]
PRELUDE = """
import asyncio, sys, threading
from contextlib import asynccontextmanager
from models.serving import process

process.THREAD_SECONDS, process.STOP_SECONDS = 0.3, 0.5
never = threading.Event()

def hang():
    print("begun", flush=True)
    never.wait(60)
"""
AT_REST = """
@asynccontextmanager
async def start():
    await asyncio.to_thread(int)
    print("begun", flush=True)
    yield
    print("left", flush=True)
"""
ENTERING = """
@asynccontextmanager
async def start():
    try:
        print("begun", flush=True)
        await asyncio.sleep(60)
        yield
    finally:
        print("left", flush=True)
"""
HANGING_WHILE_ENTERING = """
@asynccontextmanager
async def start():
    try:
        await asyncio.to_thread(hang)
        yield
    finally:
        print("left", flush=True)
"""
HANGING_BEHIND = """
@asynccontextmanager
async def start():
    asyncio.get_running_loop().run_in_executor(None, hang)
    yield
    print("left", flush=True)
"""
NEVER_CLOSED = """
@asynccontextmanager
async def start():
    print("begun", flush=True)
    yield
    await asyncio.sleep(60)
"""
BLOCKED_LOOP = """
@asynccontextmanager
async def start():
    print("begun", flush=True)
    yield
    never.wait(60)
"""
FAILING = """
@asynccontextmanager
async def start():
    asyncio.get_running_loop().run_in_executor(None, hang)
    raise OSError("the port is taken")
    yield
"""
RUN = "\nsys.exit(process.run_until_stopped(start))\n"


def begin(body: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + body + RUN],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def end(child: subprocess.Popen[str]) -> tuple[str, str, float]:
    """What it printed, what it logged, and the seconds that it took to end; killed if it does not."""
    start = time.monotonic()
    try:
        out, errors = child.communicate(timeout=15)
    finally:
        child.kill()
    return out, errors, time.monotonic() - start


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("body", "status", "left", "logged"),
    [
        pytest.param(AT_REST, 0, True, "", id="at rest"),
        pytest.param(ENTERING, 0, True, "", id="entering"),
        pytest.param(HANGING_WHILE_ENTERING, 0, True, "tierline-work_0", id="a thread hangs while entering"),
        pytest.param(HANGING_BEHIND, 0, True, "tierline-work_0", id="a thread hangs behind what runs"),
        pytest.param(NEVER_CLOSED, 1, False, "not everything was closed", id="never closed"),
        pytest.param(BLOCKED_LOOP, 1, False, "not everything was closed", id="closing blocks the loop"),
    ],
)
def test_a_signal_ends_the_process_whatever_hangs(
    body: str, status: int, left: bool, logged: str, number: signal.Signals
) -> None:
    child = begin(body)
    assert child.stdout is not None
    assert child.stdout.readline() == "begun\n"
    child.send_signal(number)
    out, errors, seconds = end(child)
    assert (child.returncode, "left" in out) == (status, left), errors
    assert logged in errors
    assert bool(errors) == bool(logged), "what ends by itself is not warned of"
    assert seconds < 5


def test_a_start_that_fails_is_told_although_a_thread_hangs() -> None:
    child = begin(FAILING)
    _, errors, seconds = end(child)
    assert child.returncode == 1
    assert "the port is taken" in errors
    assert seconds < 10
