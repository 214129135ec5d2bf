"""The metadata child: what it costs, how it dies, and that nothing of python-tuf gets into a serving process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sync import tuf_process
from sync.errors import Absent, Unavailable
from sync.testing import FakeClock
from sync.tuf_messages import Ask
from sync.tuf_process import TufProcess
from tests.integration.sync.update_site import GOOD, Site

CODE = """
import sys
import sync.member, sync.packages, sync.tuf_process, edge_node.node, device_agent
found = sorted(name for name in sys.modules if name.partition(".")[0] in ("tuf", "securesystemslib"))
sys.exit(f"imported: {found}" if found else 0)
"""


def test_a_serving_process_never_imports_python_tuf() -> None:
    subprocess.run([sys.executable, "-c", CODE], check=True, timeout=60)


@pytest.fixture
def site(tmp_path: Path):
    made = Site(tmp_path, FakeClock())
    yield made
    made.stop()


@pytest.fixture
def process():
    made = TufProcess(seconds=30)
    yield made
    made.close()
    assert made.pid is None


def question(site: Site) -> Ask:
    names = ("keys/documents.json", f"sha256/{GOOD.removeprefix('sha256:')}")
    return Ask(root=site.root, folder=str(site.node / "tuf"), now=site.clock.wall(), floors={}, kept={}, names=names)


def test_a_child_answers_dies_and_is_started_again(site: Site, process: TufProcess) -> None:
    def get(path: str, limit: int) -> bytes:
        data = site.repository.read(path)
        if data is None:
            raise Absent(path)
        return data

    first = process.ask(question(site), get)
    assert (first.code, set(first.files)) == ("", set(question(site).names))
    child = process.pid
    assert process.ask(question(site), get).code == ""
    assert process.pid == child  # still the same one
    assert child is not None
    os.kill(child, signal.SIGKILL)
    while process.pid is not None:
        time.sleep(0.001)
    assert process.ask(question(site), get).code == ""
    assert process.pid not in (None, child)


def test_a_source_that_is_away_is_told_and_the_child_goes_on(site: Site, process: TufProcess) -> None:
    def away(path: str, limit: int) -> bytes:
        raise Unavailable("nobody there")

    for _ in range(2):
        answer = process.ask(question(site), away)
        assert (answer.code, "nobody there" in answer.text) == ("unavailable", True)


def test_a_question_that_takes_too_long_ends_in_an_error_and_no_child_is_left(site: Site, tmp_path: Path) -> None:
    process = TufProcess(seconds=0.05)
    with pytest.raises(Unavailable):
        process.ask(question(site), lambda path, limit: time.sleep(0.1) or b"")
    process.close()
    assert process.pid is None


def test_two_processes_never_share_one_folder(site: Site, process: TufProcess) -> None:
    other = TufProcess()

    def nested(path: str, limit: int) -> bytes:
        found.append(other.ask(question(site), nested).code)
        raise Unavailable("enough")

    found: list[str] = []
    process.ask(question(site), nested)
    other.close()
    assert found == ["store_failed"]


def test_a_child_that_talks_nonsense_is_an_error(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuf_process.sys, "executable", "/bin/echo")
    process = TufProcess()
    with pytest.raises(Unavailable):
        process.ask(question(site), lambda path, limit: b"")
    process.close()
