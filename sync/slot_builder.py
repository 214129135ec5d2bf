"""Builds a slot from verified wheels, in child processes with an end, and tries it before anybody relies on it.

Nothing is fetched and nothing of a wheel is run before its digest was checked: pip is given the very files, offline, by hash.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sync.daemon import NICENESS, in_daemon
from sync.errors import Rejected, StoreFailed, Unavailable
from sync.slots import WHEELS, Slot, Slots
from sync.software import Software, name_of

BUILD_SECONDS = 600.0
PROBE_SECONDS = 120.0
MAX_OUTPUT = 64 * 1024
SHOWN_OUTPUT = 600
"""Characters of a child's last words that go into the report."""
INHERITED = "zz-tierline-base.pth"


@dataclass(frozen=True, slots=True)
class SlotBuilder:
    """`base`: the interpreter slots are made with, which has pip. `inherit`: slots see its packages behind their own.

    `probe`: arguments of `python -m tierline` that must succeed in a new slot.
    """

    slots: Slots
    base: str
    inherit: bool = False
    probe: Sequence[str] = ("--version",)

    async def build(self, name: str, software: Software, blobs: Mapping[str, Path]) -> Slot:
        """A slot that was tried. Raises Rejected with the last words of what failed, StoreFailed, Unavailable after a time."""
        folder, wheels = self.slots.folder(name), self.slots.root / WHEELS
        await asyncio.to_thread(_lay_out, folder, wheels, software, blobs)
        slot = Slot(name, software.version, name_of(software))
        await self._run("making the environment", BUILD_SECONDS, self.base, "-m", "venv", "--without-pip", str(folder))
        python = str(self.slots.python(slot))
        if self.inherit:
            await self._inherit(python)
        await self._run(
            "installing",
            BUILD_SECONDS,
            *(self.base, "-m", "pip", "--python", python, "--isolated", "--no-input", "--disable-pip-version-check"),
            *("install", "--no-index", "--no-deps", "--no-cache-dir", "--only-binary", ":all:", "--require-hashes"),
            *("--requirement", str(wheels / "requirements.txt")),
        )
        said = await self._run("asking its version", PROBE_SECONDS, python, "-m", "tierline", "--version")
        if said.split()[-1:] != [software.version]:
            raise Rejected(f"it says it is {said[:60]!r}, {software.version} was announced")
        await self._run("trying it", PROBE_SECONDS, python, "-m", "tierline", *self.probe)
        # pip does not flush what it writes: after a power cut the switch would be there and the files not.
        await asyncio.to_thread(os.sync)
        await asyncio.to_thread(shutil.rmtree, wheels, ignore_errors=True)
        return slot

    async def _inherit(self, python: str) -> None:
        """Let the slot find what is installed beside the base interpreter, behind its own packages."""
        ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
        theirs = (await self._run("finding packages", PROBE_SECONDS, self.base, "-c", ask)).strip()
        ours = (await self._run("finding packages", PROBE_SECONDS, python, "-c", ask)).strip()
        try:
            (Path(ours) / INHERITED).write_text(theirs + "\n")
        except OSError as error:
            raise StoreFailed(f"{ours}: {error.strerror}") from error

    async def _run(self, what: str, seconds: float, *command: str) -> str:
        """Its standard output. Raises Rejected when it fails, Unavailable when it takes too long."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_"))}
        environment |= {"PYTHONSAFEPATH": "1", "PYTHONNOUSERSITE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            child = _start(command, environment, self.slots.root)
        except OSError as error:
            raise Rejected(f"{what}: {error}") from error
        try:
            output, _ = await in_daemon(lambda: child.communicate(timeout=seconds), "slot")
        except subprocess.TimeoutExpired as error:
            raise Unavailable(f"{what} was not over within {seconds:g} s") from error
        finally:
            if child.poll() is None:
                child.kill()
                await in_daemon(child.wait, "slot")
        text = output[-MAX_OUTPUT:].decode(errors="replace")
        if child.returncode:
            raise Rejected(f"{what} failed with {child.returncode}: {text.strip()[-SHOWN_OUTPUT:]}")
        return text


def _start(command: Sequence[str], environment: Mapping[str, str], folder: Path) -> subprocess.Popen[bytes]:
    """A child that gives way to serving. Not by the event loop, which forks: that stops the loop for as long as it takes to
    copy the page tables of all this process has mapped. Raises OSError."""
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, cwd=folder
    )
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, child.pid, NICENESS)
    return child


def _lay_out(folder: Path, wheels: Path, software: Software, blobs: Mapping[str, Path]) -> None:
    """An empty slot, the wheels under their names, and what pip is to install: these files with these hashes."""
    try:
        for old in (folder, wheels):
            shutil.rmtree(old, ignore_errors=True)
            old.mkdir(parents=True)
        lines = []
        for wheel in software.wheels:
            target = wheels / wheel.name
            try:
                os.link(blobs[wheel.digest], target)
            except OSError:
                shutil.copyfile(blobs[wheel.digest], target)
            lines.append(f"{target.as_uri()} --hash={wheel.digest}\n")
        (wheels / "requirements.txt").write_text("".join(lines))
    except OSError as error:
        raise StoreFailed(f"{folder}: {error.strerror}") from error
