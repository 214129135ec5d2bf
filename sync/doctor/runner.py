"""Runs checks side by side, each in a daemon thread that is given up on when its time is over."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TypeVar

from sync.doctor.check import FAIL, OK, SKIP, STATUSES, Check, Finding, Result, Skipped
from sync.errors import SyncError

PARALLEL = 6
TOTAL_SECONDS = 40.0
"""How long all checks may take together."""
MAX_TEXT = 600
"""Characters of one sentence: it may quote what somebody else sent."""

S = TypeVar("S")


def run_checks(
    checks: Iterable[Check[S]],
    subject: S,
    *,
    seconds: float = TOTAL_SECONDS,
    parallel: int = PARALLEL,
    monotonic: Callable[[], float] = time.monotonic,
) -> list[Result]:
    """One result for each check, in the table's order, after at most `seconds`. Raises nothing that a check raises."""
    table = tuple(checks)
    end = monotonic() + seconds
    answers: SimpleQueue[tuple[int, Result]] = SimpleQueue()
    waiting = deque(range(len(table)))
    running: dict[int, float] = {}
    results: dict[int, Result] = {}
    while waiting or running:
        now = monotonic()
        if now >= end:
            break
        while waiting and len(running) < parallel:
            index = waiting.popleft()
            running[index] = min(now + table[index].seconds, end)
            _start(index, table[index], subject, answers, monotonic)
        try:
            index, result = answers.get(timeout=max(min(running.values()) - monotonic(), 0.0))
        except Empty:
            now = monotonic()
            for late in [index for index, due in running.items() if due <= now]:
                del running[late]
                results[late] = _gave_up(table[late])
        else:
            if running.pop(index, None) is not None:
                results[index] = result
    for index in running:
        results[index] = _gave_up(table[index])
    for index in waiting:
        results[index] = Result(table[index].name, Finding(SKIP, f"not reached within {seconds:g} s"), 0.0)
    return [results[index] for index in range(len(table))]


def select(checks: Sequence[Check[S]], only: Sequence[str]) -> list[Check[S]]:
    """Those called so or in a group called so; all without any. Raises ValueError naming what is not there."""
    unknown = [name for name in only if not any(name in (check.name, check.group) for check in checks)]
    if unknown:
        groups = ", ".join(dict.fromkeys(check.group for check in checks))
        raise ValueError(f"no check {unknown[0]!r}; groups are {groups}")
    return [check for check in checks if not only or check.name in only or check.group in only]


def _start(
    index: int,
    check: Check[S],
    subject: S,
    answers: SimpleQueue[tuple[int, Result]],
    monotonic: Callable[[], float],
) -> None:
    def run() -> None:
        began = monotonic()
        finding = _ask(check, subject)
        answers.put((index, Result(check.name, finding, monotonic() - began)))

    Thread(target=run, name=f"doctor {check.name}", daemon=True).start()


def _ask(check: Check[S], subject: S) -> Finding:
    try:
        finding = Finding(*check.run(subject))
    except Skipped as skipped:
        return Finding(SKIP, _short(str(skipped)))
    except SyncError as error:
        finding = Finding(FAIL, str(error))
    except Exception as error:  # noqa: BLE001 - one broken check must not hide what the others found
        finding = Finding(FAIL, f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
    if finding.status not in STATUSES:
        return Finding(FAIL, f"the check answered {finding.status!r}", "report this: it is a fault of the check")
    plain = finding.status in (OK, SKIP)
    return Finding(finding.status, _short(finding.found), "" if plain else _short(finding.fix or check.fix))


def _gave_up(check: Check[S]) -> Result:
    return Result(check.name, Finding(FAIL, f"no answer within {check.seconds:g} s", check.fix), check.seconds)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_TEXT else f"{line[: MAX_TEXT - 3]}..."
