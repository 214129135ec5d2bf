from __future__ import annotations

import sys
from pathlib import Path

import pytest

from deploy.local import Cluster
from deploy.processes import DeployError, Process, free_port, wait_until


def child(folder: Path, code: str, *, talk: bool = False) -> Process:
    return Process("child", [sys.executable, "-c", code], folder / "child.log", talk=talk)


def test_one_dead_process_does_not_save_the_others_from_being_stopped(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    cluster.processes["first"] = Process(
        "first", [sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "a.log"
    )
    dead = child(tmp_path, "import sys; sys.exit(3)", talk=True)
    cluster.processes["dead"] = dead
    wait_until("it died", lambda: not dead.alive, 10)
    with pytest.raises(DeployError, match="child ended"):
        dead.ask(b"hello " * 100_000)
    cluster.stop()
    assert not cluster.processes["first"].alive


def test_a_process_that_ends_early_is_named_with_the_end_of_its_log(tmp_path: Path) -> None:
    process = child(tmp_path, "import sys; sys.exit('no such model')")
    with pytest.raises(DeployError, match=r"child ended before: it is up(.|\n)*no such model"):
        wait_until("it is up", lambda: False, 10, process)
    process.stop()


def test_waiting_ends(tmp_path: Path) -> None:
    with pytest.raises(DeployError, match=r"not within 0.05 s: the moon is blue"):
        wait_until("the moon is blue", lambda: False, 0.05)


def test_a_process_that_ignores_being_asked_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.processes.STOP_SECONDS", 0.5)
    code = "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    process = child(tmp_path, code)
    wait_until("it is up", lambda: "up" in process.log.read_text(), 10, process)
    process.stop()
    assert process.returncode == -9


def test_a_free_port_is_one() -> None:
    assert 1024 <= free_port() <= 65535
