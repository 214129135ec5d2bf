"""The launcher starts what the disk says, and goes back by itself: without network, without anybody's answer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from deploy import launcher
from deploy.launcher import Launcher
from sync.slots import Slot, Slots, SlotState, switched

BASE = SlotState()
PYTHON = sys.executable


class Site:
    """Slots whose interpreters are scripts: what they do is the version's behaviour, `log` tells who was started."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.slots = folder, Slots(folder / "slots")
        self.said: list[str] = []

    def slot(self, name: str, version: str, does: str) -> Slot:
        path = self.slots.folder(name) / "bin" / "python"
        path.parent.mkdir(parents=True)
        text = f'#!/bin/sh\necho "{version}" "$@" >> {self.folder}/log\n{does}\n'
        path.write_text(text)
        path.chmod(0o755)
        return Slot(name, version, f"sha256:{version}")

    def run(self, trial_seconds: float = 30.0) -> int:
        node = Launcher(self.slots, ["edge", "node.toml"], trial_seconds=trial_seconds, say=self.said.append)
        return node.run()

    @property
    def log(self) -> list[str]:
        path = self.folder / "log"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setattr(launcher, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(launcher, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(launcher.signal, "signal", lambda *_: None)
    site = Site(tmp_path)
    base = tmp_path / "base"
    base.write_text(f'#!/bin/sh\necho base "$@" >> {tmp_path}/log\n')
    base.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(base))
    return site


def test_without_slots_it_starts_what_was_installed_by_hand(site: Site) -> None:
    assert site.run() == 0
    assert site.log == ["base -m tierline edge node.toml"]


def test_a_version_that_ends_at_once_is_tried_three_times_then_the_one_before(site: Site) -> None:
    old, bad = site.slot("a", "1.0", "exit 0"), site.slot("b", "1.1", "exit 3")
    site.slots.write(switched(SlotState(current=old), bad, connected=True, served=True))
    assert site.run() == 0
    assert [line.split()[0] for line in site.log] == ["1.1", "1.1", "1.1", "1.0"]
    assert site.slots.read().current == old
    assert any("went back to 1.0 in slot a: 1.1: it ended 3 times" in said for said in site.said)


def test_the_count_of_starts_survives_the_launcher_itself(site: Site) -> None:
    bad = site.slot("a", "1.1", 'kill -9 "$PPID"; exit 3')
    site.slots.write(switched(BASE, bad, connected=True, served=True))
    code = (
        "import sys; sys.path[:0] = {path!r}; from deploy.launcher import Launcher; from sync.slots import Slots;"
        "from pathlib import Path; raise SystemExit(Launcher(Slots(Path({root!r})), ['edge']).run())"
    )
    script = code.format(path=[str(Path(launcher.__file__).parents[1])], root=str(site.slots.root))
    for starts in (1, 2, 3):
        subprocess.run([PYTHON, "-c", script], check=False, timeout=20)
        assert len(site.log) == starts
    assert site.run() == 0
    assert site.log[-1].startswith("base ")


def test_a_version_that_runs_but_never_proves_itself_is_ended_and_taken_back(site: Site) -> None:
    site.slots.write(switched(BASE, site.slot("a", "1.1", "exec sleep 60"), connected=True, served=True))
    assert site.run(trial_seconds=0.3) == 0
    assert [line.split()[0] for line in site.log] == ["1.1", "base"]
    assert "not proved itself within 0.3 s" in site.slots.read().given_up["sha256:1.1"]


def test_one_that_only_lacked_the_broker_may_be_tried_again(site: Site) -> None:
    mark = f'sed -i s/healthy.:false/healthy\\":true/ {site.slots.root}/slots.json; exec sleep 60'
    site.slots.write(switched(BASE, site.slot("a", "1.1", mark), connected=True, served=True))
    assert site.run(trial_seconds=1.0) == 0
    state = site.slots.read()
    assert (state.given_up, state.tries) == ({}, {"sha256:1.1": 1})


def test_a_version_that_proved_itself_in_time_is_left_alone(site: Site) -> None:
    mark = f'sed -i s/confirmed.:false/confirmed\\":true/ {site.slots.root}/slots.json; sleep 1; exit 0'
    site.slots.write(switched(BASE, site.slot("a", "1.1", mark), connected=True, served=True))
    site.run(trial_seconds=0.5)
    assert site.slots.read().current is not None
    assert site.slots.read().confirmed


def test_a_node_that_switched_is_started_again_from_the_new_slot_whatever_its_code(site: Site) -> None:
    new = site.slot("b", "1.1", "exit 0")
    after = {"format": 1, "current": {"name": new.name, "version": new.version, "software": new.software}}
    (site.folder / "after.json").write_text(json.dumps(after))
    old = site.slot("a", "1.0", f"cp {site.folder}/after.json {site.slots.root}/slots.json; exit 0")
    site.slots.write(SlotState(current=old))
    assert site.run() == 0
    assert [line.split()[0] for line in site.log] == ["1.0", "1.1"]


@pytest.mark.parametrize("text", [b"{", b'{"format":9}'])
def test_a_file_of_slots_that_cannot_be_read_still_starts_something(site: Site, text: bytes) -> None:
    site.slots.root.mkdir()
    (site.slots.root / "slots.json").write_bytes(text)
    assert site.run() == 0
    assert site.log == ["base -m tierline edge node.toml"]
    assert (site.slots.root / "slots.json").read_bytes() == text


def test_a_slot_that_is_gone_falls_back(site: Site) -> None:
    site.slots.write(SlotState(current=Slot("a", "1.0", "sha256:gone")))
    assert site.run() == 0
    assert site.log == ["base -m tierline edge node.toml"]


def test_what_lies_on_the_shells_path_does_not_stand_in_for_a_slot(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    slot = site.slot("a", "1.0", f"env > {site.folder}/env; exit 0")
    site.slots.write(SlotState(current=slot))
    assert site.run() == 0
    seen = (site.folder / "env").read_text()
    assert "PYTHONPATH=" not in seen
    assert "PYTHONSAFEPATH=1" in seen
    assert f"TIERLINE_SLOTS={site.slots.root}" in seen
