"""The fixtures as a user's own project loads them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TESTS = """
import socket
import pytest

@pytest.fixture
def server():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"

def test_that_meets_its_fault(chaos_proxy, chaos_fault, server):
    proxy = chaos_proxy(server)
    with proxy.suffering(chaos_fault("reset")):
        with socket.create_connection(proxy.address, 5) as client, pytest.raises(ConnectionResetError):
            client.recv(1)

def test_that_forgot_its_fault(chaos_fault):
    chaos_fault("lag", delay=1.0)
"""


def test_a_users_test_fails_when_its_fault_did_not_fire(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["sync.chaos.fixtures"]\n')
    (tmp_path / "test_mine.py").write_text(TESTS)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=tmp_path,
    )
    assert "2 passed, 1 error" in run.stdout, run.stdout
    assert "NeverFired: lag: nothing passed through while it was on" in run.stdout
