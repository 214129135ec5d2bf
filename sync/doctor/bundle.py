"""`tierline support-bundle`: what somebody who helps needs to know, in one file, without a secret in it.

Two lines of defence: configurations go out by a list of allowed fields, and every text is cleaned of what is known to be
secret and of what looks like it.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import platform
import sys
import tarfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from sync.doctor.check import Skipped
from sync.doctor.cli import Doctors, add_place, find_place, place, title_of
from sync.doctor.machine import software
from sync.doctor.redaction import Redaction
from sync.doctor.render import as_json, summary
from sync.doctor.runner import run_checks

MAX_FILE = 1 << 20
"""Bytes of one file in the bundle."""
MAX_BUNDLE = 16 << 20
"""Bytes of all of them, before they are packed."""
MAX_LINES, MAX_LINE = 2_000, 4_000
"""Of each log: its last lines, and characters of one."""
MAX_TAIL = 8 << 20
"""Bytes that are read of a log's end."""
MAX_LOGS = 10
MAX_PACKAGES = 500
CUT = "\n[cut: the file was longer]\n"


def support_bundle(argv: Sequence[str], doctors: Doctors) -> int:
    """Exit code: 0 = the file is written, 1 = it could not be, 2 = the command line was wrong."""
    parser = argparse.ArgumentParser(
        prog="tierline support-bundle",
        description="Write what somebody who helps needs to know of a node or hub of this machine into one file, no secrets.",
    )
    add_place(parser)
    parser.add_argument(
        "-o", "--out", type=Path, metavar="FILE", help="a new file; default: tierline-NAME-TIME.tar.gz here"
    )
    parser.add_argument(
        "--log", action="append", default=[], type=Path, metavar="FILE", help="a log to put in; may be repeated"
    )
    parser.add_argument(
        "--lines", type=int, default=500, help=f"last lines of each log (default 500, at most {MAX_LINES})"
    )
    parser.add_argument(
        "--bodies", action="store_true", help="put documents' bodies in: names of models and rules of routing"
    )
    options = parser.parse_args(argv)
    logging.basicConfig(handlers=[logging.NullHandler()])
    try:
        tier, path = find_place(options)
        subject, checks = place(tier, path, doctors)
    except (ValueError, OSError) as error:
        print(f"tierline support-bundle: {error}", file=sys.stderr)
        return 2
    results = run_checks(checks, subject)
    title = title_of(tier, subject)
    parts: dict[str, Callable[[], object]] = {
        "doctor.json": lambda: as_json(title, results),
        "versions.json": versions,
        **subject.parts(bodies=options.bodies),
    }
    for number, log in enumerate(options.log[:MAX_LOGS]):
        parts[f"logs/{number}-{_file_name(log.name)}"] = lambda log=log: tail(log, options.lines)  # type: ignore[misc]
    out = options.out or Path(f"tierline-{_file_name(str(title['about']))}-{title['at']}.tar.gz")
    try:
        left_out = write_bundle(out, gather(parts, subject.redaction()), float(str(title["at"])))
    except OSError as error:
        print(f"tierline support-bundle: {out}: {error.strerror or error}", file=sys.stderr)
        return 1
    print(f"{out}: {out.stat().st_size} bytes, mode 0600; {summary(results)}")
    for name, why in left_out.items():
        print(f"left out: {name} ({why})")
    print("Look into it before you send it: tar tzf shows what is in it, and every file is text.")
    return 0


def gather(parts: Mapping[str, Callable[[], object]], redaction: Redaction) -> dict[str, str]:
    """File name -> clean text. A part that fails says why instead."""
    found: dict[str, str] = {}
    for name, make in parts.items():
        try:
            value = make()
        except Skipped as error:
            value = f"not there: {error}\n"
        except Exception as error:  # noqa: BLE001 - what is broken here is what the bundle is made for
            value = f"could not be read: {type(error).__name__}: {error}\n"
        # Cleaned value by value, and once more as it is written: a secret may stand across two of them.
        text = value if isinstance(value, str) else json.dumps(redaction.value(value), indent=2, default=str)
        text = redaction.text(text)
        found[name] = text if len(text) <= MAX_FILE else text[:MAX_FILE] + CUT
    return found


def write_bundle(out: Path, texts: Mapping[str, str], at: float) -> dict[str, str]:
    """Write a new file of mode 0600. Returns what was left out for lack of room, and why. Raises OSError."""
    left_out: dict[str, str] = {}
    size = 0
    folder = out.name.removesuffix(".gz").removesuffix(".tar")
    with (
        os.fdopen(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file,
        tarfile.open(fileobj=file, mode="w:gz") as archive,
    ):
        for name, text in texts.items():
            data = text.encode("utf-8", "replace")
            if size + len(data) > MAX_BUNDLE:
                left_out[name] = f"the bundle would have more than {MAX_BUNDLE >> 20} MiB"
                continue
            size += len(data)
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size, member.mtime, member.mode = len(data), int(at), 0o600
            archive.addfile(member, io.BytesIO(data))
    return left_out


def tail(path: Path, lines: int) -> str:
    """The last lines of a log. Raises OSError."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - MAX_TAIL))
        text = file.read(MAX_TAIL).decode("utf-8", "replace")
    last = deque(text.splitlines(), maxlen=max(1, min(lines, MAX_LINES)))
    kept: deque[str] = deque()
    size = 0
    for line in reversed(last):
        short = line if len(line) <= MAX_LINE else f"{line[:MAX_LINE]}..."
        size += len(short) + 1
        if size > MAX_FILE:
            break
        kept.appendleft(short)
    return "\n".join(kept) + "\n"


def versions() -> dict[str, Any]:
    """What runs here. Names of other programs' packages tell nothing that is secret, and often what is wrong."""
    found = {dist.metadata["Name"]: dist.version for dist in metadata.distributions()}
    return {
        "tierline": software(),
        "python": sys.version,
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "time": time.time(),
        "packages": dict(sorted(found.items(), key=lambda item: str(item[0]).lower())[:MAX_PACKAGES]),
    }


def _file_name(text: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in text)[-60:] or "log"
