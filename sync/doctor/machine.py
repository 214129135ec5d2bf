"""The machine: versions, memory, limits, time, proxies. Good for every tier, the hub's machine too."""

from __future__ import annotations

import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from sync.doctor.check import Check, Finding, Skipped, amount, fail, ok, warn

MIN_PYTHON = (3, 11)
LOW_MEMORY, NO_MEMORY = 128e6, 32e6
"""Bytes that are available: an edge node with two small models takes 120 MB, an agent 85."""
LOW_FILES = 1024
"""Open files of a process: each connection is one; Debian's default for a shell."""
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
PACKAGES = ("numpy", "msgspec", "paho-mqtt", "cryptography", "urllib3", "tuf", "httptools")
COMMAND_SECONDS = 3.0


class Machine(Protocol):
    @property
    def environ(self) -> Mapping[str, str]: ...


def check_python(_subject: object) -> Finding:
    found = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}, tierline {software()}"
    if sys.version_info < MIN_PYTHON:
        return fail(found, "install Python 3.11 or later")
    return ok(found)


def check_packages(_subject: object) -> Finding:
    wanted = {name: _version(name) for name in PACKAGES}
    missing = [name for name, version in wanted.items() if version is None]
    if missing:
        return fail(f"not installed: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    return ok(", ".join(f"{name} {version}" for name, version in wanted.items()))


def check_memory(_subject: object) -> Finding:
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free, total = (int(lines[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    except (OSError, KeyError, ValueError, IndexError):
        raise Skipped("this system does not tell (no /proc/meminfo)") from None
    limit = _limit_of_group()
    where = "" if limit is None else f"; this process may use {amount(limit)}"
    found = f"{amount(free)} of {amount(total)} available{where}"
    left = free if limit is None else min(free, limit)
    if left < NO_MEMORY:
        return fail(found)
    return warn(found) if left < LOW_MEMORY else ok(found)


def check_files(_subject: object) -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return ok("as many files as the system has")
    found = f"{soft} open files allowed here (the node's own service may have another limit)"
    return warn(f"{found}, up to {hard} on request") if soft < LOW_FILES else ok(found)


def check_time_service(_subject: object) -> Finding:
    program = shutil.which("timedatectl")
    if program is None:
        raise Skipped("no timedatectl here: whether the clock is kept by a time service is not known")
    try:
        shown = subprocess.run(
            [program, "show", "--property=NTPSynchronized,NTP"],
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        raise Skipped("timedatectl does not answer") from None
    facts = dict(line.split("=", 1) for line in shown.stdout.splitlines() if "=" in line)
    if "NTPSynchronized" not in facts:
        raise Skipped("timedatectl cannot say (no systemd here)")
    if facts["NTPSynchronized"] == "yes":
        return ok("the clock is kept by a time service")
    return warn("no time service keeps the clock")


def check_proxies(subject: Machine) -> Finding:
    found = {
        name: value
        for name, value in subject.environ.items()
        if name.lower() in PROXIES and value and name.lower() != "no_proxy"
    }
    if not found:
        return ok("no proxy in the environment")
    named = ", ".join(f"{name} = {_host_of(value)}" for name, value in sorted(found.items()))
    return warn(f"{named}: tierline does not use these")


MACHINE: tuple[Check[Any], ...] = (
    Check("machine.python", "Python, system and release", "install Python 3.11 or later", check_python),
    Check("machine.packages", "the packages every tier needs", "pip install tierline again", check_packages),
    Check(
        "machine.memory",
        "memory that is available",
        "stop what else runs here, or serve fewer or smaller models: what is killed for lack of memory is killed at any moment",
        check_memory,
    ),
    Check(
        "machine.files",
        "how many files a process may open",
        "raise it: LimitNOFILE=65536 in the service, or 'ulimit -n 65536' before the start",
        check_files,
    ),
    Check(
        "machine.time",
        "whether a time service keeps the clock",
        "turn one on: 'timedatectl set-ntp true', or install chrony; without network a clock with a battery does",
        check_time_service,
    ),
    Check(
        "machine.proxies",
        "proxies in the environment, which are not used",
        "if the hub is behind a proxy say proxy = 'http://host:port' in [node]; otherwise nothing needs to be done",
        check_proxies,
    ),
)


def software() -> str:
    """This release."""
    return _version("tierline") or "not installed as a package"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _limit_of_group() -> int | None:
    """What the control group allows, None = no limit. Linux: cgroup v2."""
    try:
        text = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        return None if text == "max" else int(text)
    except (OSError, ValueError):
        return None


def _host_of(url: str) -> str:
    """Without user and password."""
    try:
        parts = urlsplit(url if "://" in url else f"//{url}")
        return f"{parts.hostname}:{parts.port}" if parts.port else str(parts.hostname)
    except ValueError:
        return "(no URL)"
