"""`tierline chaos` as a script uses it: its lines of JSON and its exit code."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sync.chaos.cli import FIRED, NETWORK, NEVER_FIRED, PROCESS, UNSUPPORTED, WRONG
from sync.chaos.clock_jump import find_libfaketime
from sync.chaos.disk import Unsupported, namespace
from sync.chaos.processes import alive, state_of

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


class Run:
    """One `tierline chaos`; `events` grows while it runs."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "tierline", "chaos", *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.events: list[dict[str, Any]] = []
        self._lines = threading.Thread(target=self._read, daemon=True)
        self._lines.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.events.append(json.loads(line) if line.startswith("{") else {"event": "said", "line": line.strip()})

    def wait_for(self, event: str) -> dict[str, Any]:
        end = time.monotonic() + 20
        while time.monotonic() < end:
            for found in self.events:
                if found["event"] == event:
                    return found
            if self.process.poll() is not None and not self._lines.is_alive():
                break
            time.sleep(0.01)
        raise AssertionError(f"no {event!r} among {self.events}")

    def code(self) -> int:
        code = self.process.wait(20)
        self._lines.join(5)
        return code


@contextmanager
def running(*arguments: str) -> Iterator[Run]:
    run = Run(*arguments)
    try:
        yield run
    finally:
        if run.process.poll() is None:
            run.process.terminate()
            run.process.wait(10)
        for stream in (run.process.stdout, run.process.stderr):
            if stream is not None:
                stream.close()


@contextmanager
def sleeping() -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen(SLEEP)
    try:
        yield child
    finally:
        child.kill()
        child.wait(5)


@contextmanager
def server() -> Iterator[str]:
    """Accepts, says `hello`, and keeps the connection."""
    listener = socket.create_server(("127.0.0.1", 0))
    kept: list[socket.socket] = []

    def accept() -> None:
        while True:
            try:
                kept.append(listener.accept()[0])
                kept[-1].sendall(b"hello")
            except OSError:
                return

    threading.Thread(target=accept, daemon=True).start()
    yield f"127.0.0.1:{listener.getsockname()[1]}"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    for item in kept:
        item.close()


def test_a_fault_that_fired_is_told_and_leaves_with_0() -> None:
    with server() as to, running("lag", "--to", to, "--for", "1s", "--delay", "300ms", "--seed", "1") as run:
        run.wait_for("fault began")
        host, _, port = run.wait_for("listening")["listen"].partition(":")
        with socket.create_connection((host, int(port)), 5) as client:
            began = time.monotonic()
            assert client.recv(5) == b"hello"
            assert time.monotonic() - began > 0.25
            assert run.code() == FIRED
        ended = run.wait_for("fault ended")
    assert ended["fired"] is True
    assert (ended["connections"], ended["bytes"]) == (1, 5)


def test_a_fault_that_nobody_met_leaves_with_3() -> None:
    with running("reset", "--to", "127.0.0.1:9", "--for", "100ms") as run:
        assert run.code() == NEVER_FIRED
        assert "nothing passed through" in run.wait_for("fault never fired")["why"]
        assert run.wait_for("fault ended")["fired"] is False


def test_a_signal_during_the_fault_ends_it_in_order() -> None:
    with server() as to, running("half-open", "--to", to, "--for", "forever") as run:
        host, _, port = run.wait_for("listening")["listen"].partition(":")
        run.wait_for("fault began")
        with socket.create_connection((host, int(port)), 5):
            time.sleep(0.2)
            run.process.send_signal(signal.SIGTERM)
            assert run.code() == FIRED
        assert run.wait_for("fault ended")["fired"] is True


@pytest.mark.parametrize(
    "arguments", [["lag"], ["lag", "--to", "nowhere"], ["lag", "--to", "h:1", "--for", "10"], ["x"]]
)
def test_a_wrong_command_line_leaves_with_2(arguments: list[str]) -> None:
    with running(*arguments) as run:
        assert run.code() == WRONG


def test_a_port_that_is_taken_leaves_with_2() -> None:
    with server() as to, running("lag", "--to", to, "--listen", to) as run:
        assert run.code() == WRONG


def test_a_paused_process_stands_still_and_goes_on() -> None:
    with sleeping() as child, running("pause", "--pid", str(child.pid), "--for", "300ms") as run:
        run.wait_for("fault began")
        assert state_of(child.pid) == "T"
        assert run.code() == FIRED
        assert state_of(child.pid) == "S"


def test_a_killed_process_is_dead_and_one_that_was_dead_does_not_count() -> None:
    with sleeping() as child:
        with running("kill", "--pid", str(child.pid)) as run:
            assert run.code() == FIRED
        assert not alive(child.pid)
        with running("kill", "--pid", str(child.pid)) as run:
            assert run.code() == NEVER_FIRED


def test_a_restarted_command_is_killed_and_comes_back_as_another_process() -> None:
    with running("broker-restart", "--for", "200ms", "--then", "forever", "--", *SLEEP) as run:
        first, second = run.wait_for("command started")["pid"], run.wait_for("fault ended")["pid"]
        assert first != second
        assert alive(second)
        assert not alive(first)
        run.process.send_signal(signal.SIGTERM)
        assert run.code() == FIRED
        assert not alive(second)


def test_a_command_that_does_not_stay_up_is_no_restart() -> None:
    with running("broker-restart", "--after", "5s", "--", "true") as run:
        assert run.code() == NEVER_FIRED


CLOCK = """
import time
from sync.clock import SystemClock
clock = SystemClock()
while True:
    print(round(clock.wall() - START), flush=True)
    time.sleep(0.05)
"""


@pytest.mark.parametrize(
    "how",
    [
        ["--hook"],
        pytest.param(
            [],
            marks=pytest.mark.skipif(
                not find_libfaketime(),
                reason="libfaketime is not installed: only the project's own clock was made to jump",
            ),
        ),
    ],
)
def test_a_clock_jumps_400_days_while_a_command_runs_and_back(how: list[str]) -> None:
    code = CLOCK.replace("START", repr(time.time()))
    arguments = ["clock-jump", *how, "--by", "400d", "--after", "1s", "--for", "1s", "--then", "1s", "--"]
    with running(*arguments, sys.executable, "-c", code) as run:
        assert run.code() == FIRED
        days = [round(int(event["line"]) / 86400) for event in run.events if event["event"] == "said"]
    assert set(days) == {0, 400}
    assert days[0] == days[-1] == 0


def test_a_clock_that_nobody_asks_did_not_jump() -> None:
    with running("clock-jump", "--hook", "--by=-1h", "--for", "200ms", "--", *SLEEP) as run:
        assert run.code() == NEVER_FIRED


WRITER = """
import pathlib, sys, time
path = pathlib.Path(sys.argv[1])
print("found", (path / "there").read_text(), flush=True)
while True:
    try:
        with (path / "log").open("ab", buffering=0) as file:
            file.write(b"x" * 5_000)
        print("written", flush=True)
    except OSError as error:
        print(error.strerror, flush=True)
    time.sleep(0.05)
"""


def possible() -> bool:
    try:
        namespace()
    except Unsupported:
        return False
    return True


@pytest.mark.skipif(not possible(), reason="no file system may be mounted here: a full disk was NOT tested")
def test_a_disk_is_full_for_a_while_and_the_true_folder_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("before")
    arguments = ["--folder", str(tmp_path), "--size", "1M", "--after", "500ms", "--for", "500ms", "--then", "500ms"]
    with running("disk-full", *arguments, "--", sys.executable, "-c", WRITER, str(tmp_path)) as run:
        assert run.code() == FIRED
        said = [event["line"] for event in run.events if event["event"] == "said"]
    assert said[0] == "found before"
    assert said[1] == said[-1] == "written"
    assert os.strerror(28) in said
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_machine_that_allows_no_mount_leaves_with_4(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "unshare").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "unshare").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with running("disk-full", "--folder", str(tmp_path / "data"), "--", "true") as run:
        assert run.code() == UNSUPPORTED


def test_every_fault_explains_itself() -> None:
    for name in (*NETWORK, *PROCESS):
        found = subprocess.run(
            [sys.executable, "-m", "tierline", "chaos", name, "--help"], capture_output=True, timeout=20, check=False
        )
        assert found.returncode == 0
