"""What engine threads may take of the machine: how many cores there are, and who goes first on one of them."""

from __future__ import annotations

import os
import threading

NICE = 10
"""Added to the nice value of engine threads. Linux (EEVDF, 6.18) lets a thread that wakes up interrupt another only while it
has had less than its share, else at the next tick, up to 4 ms later: beside one busy thread p99 of that wait was 2 to 5 ms
with 5 and 0.5 ms with 10. More gained little, and engine threads must not starve beside a busy loop or a busy application."""


LOADING_NICE = 15
"""Of what loads or tries a version beside those that serve: on a full core engine threads get three times as much. More would
let a load on a busy node take minutes."""


def usable_cores() -> int:
    """More engine threads than these only take turns, and one that is not its turn may hold the interpreter meanwhile."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def give_way(nice: int = NICE, task: int | None = None) -> None:
    """Let the event loop's thread go before the one that calls this (or `task`, a process), and those with a smaller `nice`."""
    try:
        # On Linux a thread has a nice value of its own.
        os.setpriority(os.PRIO_PROCESS, task or threading.get_native_id(), nice)
    except OSError:
        pass  # a system that does not allow it runs them as equals
