"""What README.md and three pages tell people to type is typed here, word for word, in the order of the page.

A block tagged `sh` is run by bash, one tagged `python` by this Python; one that begins with `tierline serve` is a server that
runs until the next such block. A block tagged `text` right behind one is what it prints: `...` stands for anything, a
number with a decimal point for any such number. Only ports are changed, to free ones.
"""

from __future__ import annotations

import contextlib
import doctest
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PORTS = ("8000", "8001", "8002", "8443")
SECONDS = 30.0
_BLOCK = re.compile(r"^```(sh|python|toml)\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"`([\w/.-]+\.toml)`:\s*$")

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("bash", "curl", "openssl"))), reason="needs bash, curl and openssl"
)


class Block(NamedTuple):
    """`file`: the name under which the words before a `toml` block have it saved, "" = it is only shown."""

    language: str
    code: str
    prints: str | None
    file: str


def blocks_of(page: str) -> list[Block]:
    return [
        Block(
            found[1],
            found[2],
            found[3],
            name[1] if (name := _FILE.search(page[: found.start()].rstrip() + "\n")) else "",
        )
        for found in _BLOCK.finditer(page)
    ]


class Reader:
    """Somebody who follows a page in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        self._server: subprocess.Popen[str] | None = None
        bin_folder = str(Path(sys.executable).parent)
        self._environment = {
            **os.environ,
            "PATH": os.pathsep.join((bin_folder, os.environ["PATH"])),
            "XDG_CACHE_HOME": str(folder / ".cache"),
            "PYTHONWARNINGS": "error::DeprecationWarning:__main__",
        }
        (folder / "models").symlink_to(ROOT / "models")

    def follow(self, block: Block) -> None:
        code = self._ported(block.code)
        if block.language == "toml":
            if block.file:
                path = self._folder / block.file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(code)
        elif code.startswith("tierline serve"):
            printed = self._serve(code, 1 if block.prints is None else block.prints.count("\n"))
            self._compare(block, printed)
        else:
            command: tuple[str, ...] = ("bash", "-euo", "pipefail", "-c", code)
            if block.language == "python":
                # A folder named `models` beside a script would be taken for ours; -P keeps it out.
                command = (sys.executable, "-P", "-c", code)
            done = subprocess.run(
                command,
                cwd=self._folder,
                env=self._environment,
                capture_output=True,
                text=True,
                timeout=SECONDS,
                check=False,
            )
            assert done.returncode == 0, f"{code}\n{done.stdout}{done.stderr}"
            self._compare(block, done.stdout)

    def stop(self) -> None:
        """End the server; it must end by itself, with no error."""
        server, self._server = self._server, None
        if server is None:
            return
        server.send_signal(signal.SIGINT)
        try:
            _, errors = server.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()
            server.communicate()
            raise
        assert server.returncode == 0, errors
        assert "Traceback" not in errors, errors

    def _serve(self, code: str, lines: int) -> str:
        self.stop()
        port = "" if "--http-port" in code else f" --http-port {self._ports['8000']}"
        self._server = subprocess.Popen(
            ("bash", "-c", f"exec {code.strip()}{port}"),
            cwd=self._folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._server.stdout is not None
        printed = "".join(self._server.stdout.readline() for _ in range(lines))
        if not printed:
            _, errors = self._server.communicate(timeout=SECONDS)
            raise AssertionError(f"{code}\n{errors}")
        return printed

    def _compare(self, block: Block, printed: str) -> None:
        if block.prints is None:
            return
        wanted, printed = (
            re.sub(r"(?<![.\d])\d+\.\d+(?![.\d])(e-?\d+)?", "0.0", each)
            for each in (self._ported(block.prints), printed)
        )
        options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        assert doctest.OutputChecker().check_output(wanted, printed, options), f"{block.code}\n{printed}\nnot\n{wanted}"

    def _ported(self, text: str) -> str:
        return re.sub(rf"\b({'|'.join(PORTS)})\b", lambda found: self._ports[found[1]], text)


def free_ports(number: int) -> list[str]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [str(each.getsockname()[1]) for each in sockets]


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    someone = Reader(tmp_path)
    try:
        yield someone
    finally:
        someone.stop()


PAGES: Mapping[str, str] = {
    "README": (ROOT / "README.md").read_text().partition("## Five minutes\n")[2].partition("\n## ")[0],
    "serving": (ROOT / "docs" / "serving.md").read_text(),
    "jobs": (ROOT / "docs" / "jobs.md").read_text(),
    "access": (ROOT / "docs" / "access.md").read_text(),
}


@pytest.mark.parametrize("page", PAGES)
def test_the_page_can_be_followed_word_for_word(page: str, reader: Reader) -> None:
    blocks = blocks_of(PAGES[page])
    assert len(blocks) >= 4
    for block in blocks:
        reader.follow(block)
