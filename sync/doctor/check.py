"""What a check is, and what it answers. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

OK, WARN, FAIL, SKIP = "ok", "warn", "fail", "skip"
STATUSES = (OK, WARN, FAIL, SKIP)
CHECK_SECONDS = 6.0
"""How long a check may take unless it says otherwise: a name that is not resolved, or a port that swallows packets."""

S = TypeVar("S")
T = TypeVar("T")


class Finding(NamedTuple):
    """`found`: one sentence. `fix`: what to do, empty = what the check says in general."""

    status: str
    found: str
    fix: str = ""


class Skipped(Exception):
    """The check does not apply here, or what it needs is not there; the text says why."""


@dataclass(frozen=True, slots=True)
class Check(Generic[S]):
    """`name`: group and word. `what` it looks at. `fix`: what to do when that is not well. `seconds`: most it may take.

    `run` looks at a subject, in a thread of its own; it may raise Skipped, and whatever else it raises is a failure.
    """

    name: str
    what: str
    fix: str
    run: Callable[[S], tuple[str, str, str]]
    seconds: float = CHECK_SECONDS

    @property
    def group(self) -> str:
        return self.name.partition(".")[0]


@dataclass(frozen=True, slots=True)
class Result:
    """A check's answer. `seconds`: how long it took."""

    name: str
    finding: Finding
    seconds: float


def ok(found: str) -> Finding:
    return Finding(OK, found)


def warn(found: str, fix: str = "") -> Finding:
    return Finding(WARN, found, fix)


def fail(found: str, fix: str = "") -> Finding:
    return Finding(FAIL, found, fix)


def needed(value: T | None, why: str) -> T:
    """Raises Skipped when there is none."""
    if value is None:
        raise Skipped(why)
    return value


def exit_code(results: list[Result], *, strict: bool = False) -> int:
    """0 = nothing has to be done, 1 = something failed, or with `strict` deserves a look."""
    bad = (FAIL, WARN) if strict else (FAIL,)
    return int(any(result.finding.status in bad for result in results))


def duration(seconds: float) -> str:
    """As a person says it: 90 s, 12 min, 5.0 h, 3.0 days."""
    size = abs(seconds)
    for unit, length, digits in (("days", 86_400.0, 1), ("h", 3_600.0, 1), ("min", 60.0, 0)):
        if size >= 2 * length:
            return f"{size / length:.{digits}f} {unit}"
    return f"{size:.0f} s" if size >= 1 else f"{size * 1e3:.0f} ms"


def amount(size: float) -> str:
    """Bytes as a person says them."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size:.0f} B"
