"""kill -9 at every step of an update: the old or the new version is in force afterwards, and nothing unverified was loaded."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import msgspec
import pytest
from http_fake import HttpFake

from sync.failpoints import POINTS, VARIABLE
from sync.messages import Document
from sync.trust import Keyring, SigningKey, digest_of, encode_keyring, sign

CHILD = Path(__file__).with_name("crash_child.py")
ROOT = Path(__file__).parents[3]
SIGNER = SigningKey.from_bytes(b"\1" * 32)
RING = encode_keyring(Keyring((SIGNER.key("desired"),)))
FILES = {digest_of(data): data for data in (b"version one" * 10_000, b"version two" * 10_000)}
ONE, TWO = (f'["{digest}"]' for digest in FILES)
NOWHERE = "http://127.0.0.1:9"
RECORDED = POINTS.index("updater.recorded")


def document(kind: str, scope: str, revision: int, body: str, digests: tuple[str, ...], key: SigningKey) -> bytes:
    issued = time.time() - 1
    return sign(Document(kind, scope, revision, issued, digests, msgspec.Raw(body.encode())), [key])


class Site(BaseHTTPRequestHandler):
    """The hub's files and keyring; the metadata is played by `crash_child.py`."""

    def do_GET(self) -> None:
        digest = self.path.removeprefix("/blobs/")
        data = b"{}" if self.path.startswith("/tuf/") else RING if digest == digest_of(RING) else FILES[digest]
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        """Silent."""


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    with HttpFake(Site) as server:
        yield server.url


def run(folder: Path, url: str, envelope: str | None = None, failpoints: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(CHILD), str(folder), url, *([str(folder / envelope)] if envelope else [])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), VARIABLE: failpoints}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)


@pytest.fixture(scope="module")
def installed(hub: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A node on which version one is in force, and the envelopes of both versions."""
    folder = tmp_path_factory.mktemp("node")
    (folder / "keyring.json").write_bytes(RING)
    (folder / "files.json").write_bytes(msgspec.json.encode({digest: len(data) for digest, data in FILES.items()}))
    for revision, body in ((1, ONE), (2, TWO)):
        envelope = document("desired", "node:acme.edge-1", revision, body, tuple(msgspec.json.decode(body)), SIGNER)
        (folder / f"v{revision}").write_bytes(envelope)
    done = run(folder, hub, "v1")
    assert done.stdout.strip() == ONE, done.stderr
    return folder


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_any_step_the_old_or_the_new_version_starts_and_the_update_then_completes(
    point: str, installed: Path, hub: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(installed, tmp_path / "node"))
    killed = run(folder, hub, "v2", f"{point}=kill")
    assert killed.returncode == -signal.SIGKILL, killed.stderr

    offline = run(folder, NOWHERE)
    assert offline.stdout.strip() == (TWO if POINTS.index(point) >= RECORDED else ONE), offline.stderr

    healed = run(folder, hub, "v2")
    assert healed.stdout.strip() == TWO, healed.stderr
    assert set((folder / "loaded.log").read_text().split()) <= set(FILES)


def test_a_file_swapped_at_the_source_is_never_loaded(
    installed: Path, hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(installed, tmp_path / "node"))
    (two,) = msgspec.json.decode(TWO)
    monkeypatch.setitem(FILES, two, b"version bad" * 10_000)
    assert run(folder, hub, "v2").stdout.strip() == ONE
    assert two not in (folder / "loaded.log").read_text()
