"""A report as aligned text, or as JSON for programs."""

from __future__ import annotations

import shutil
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from sync.doctor.check import FAIL, OK, SKIP, WARN, Finding, Result

MARKS = {OK: "ok", WARN: "warn", FAIL: "FAIL", SKIP: "-"}
_COLOURS = {OK: "32", WARN: "33", FAIL: "1;31", SKIP: "2"}
MAX_WIDTH = 110
MIN_WIDTH = 60


def as_json(title: Mapping[str, object], results: Sequence[Result]) -> dict[str, Any]:
    """`title`: about what and when. The same numbers that the text ends with stand under `counts`."""
    counts = Counter(result.finding.status for result in results)
    return {
        **title,
        "counts": {status: counts[status] for status in MARKS},
        "checks": [
            {
                "name": result.name,
                "status": result.finding.status,
                "found": result.finding.found,
                **({"fix": result.finding.fix} if result.finding.fix else {}),
                "seconds": round(result.seconds, 3),
            }
            for result in results
        ],
    }


def from_json(report: Mapping[str, Any]) -> list[Result]:
    """The results in what `as_json` made, perhaps by another release on another machine. Raises KeyError, TypeError."""
    return [
        Result(
            _plain(entry["name"]),
            Finding(_plain(entry["status"]), _plain(entry["found"]), _plain(entry.get("fix", ""))),
            float(entry.get("seconds", 0.0)),
        )
        for entry in report["checks"]
    ]


def as_text(heading: str, results: Sequence[Result], *, colour: bool = False, width: int | None = None) -> str:
    """One line for each check, grouped; under what is not well, what to do."""
    columns = width or min(max(shutil.get_terminal_size((100, 24)).columns, MIN_WIDTH), MAX_WIDTH)
    names = max((len(_word(result)) for result in results), default=0)
    lines = [_painted(heading, "1", colour)]
    group = ""
    for result in results:
        if result.name.partition(".")[0] != group:
            group = result.name.partition(".")[0]
            lines += ["", _painted(group, "1", colour)]
        lines += _lines(result, names, columns, colour)
    return "\n".join([*lines, "", summary(results)])


def summary(results: Sequence[Result]) -> str:
    counts = Counter(result.finding.status for result in results)
    parts = [f"{counts[OK]} ok"]
    parts += [f"{counts[WARN]} warning{'s' * (counts[WARN] != 1)}"] if counts[WARN] else []
    parts += [f"{counts[FAIL]} failed"] if counts[FAIL] else []
    parts += [f"{counts[SKIP]} skipped"] if counts[SKIP] else []
    return ", ".join(parts)


def _plain(value: object) -> str:
    """Without control characters: what another machine says must not steer this one's terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in str(value))


def _lines(result: Result, names: int, columns: int, colour: bool) -> list[str]:
    status, found, fix = result.finding
    mark = _painted(f"{MARKS.get(status, status):<4}", _COLOURS.get(status, "0"), colour)
    indent = 2 + 4 + 2 + names + 2
    first, *more = textwrap.wrap(found, max(columns - indent, 30)) or [""]
    lines = [f"  {mark}  {_word(result):<{names}}  {first}".rstrip()]
    lines += [" " * indent + line for line in more]
    if fix:
        told = textwrap.wrap(fix, max(columns - indent - 5, 30))
        lines += [" " * indent + ("fix: " if index == 0 else "     ") + line for index, line in enumerate(told)]
    return lines


def _word(result: Result) -> str:
    return result.name.partition(".")[2] or result.name


def _painted(text: str, code: str, colour: bool) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if colour else text
