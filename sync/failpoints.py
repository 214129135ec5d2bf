"""Named places where a test can stop the program dead. They do nothing unless the environment arms them.

`TIERLINE_FAILPOINTS=updater.fetched=kill,updater.prepared=pause:0.5` arms two: `kill` is SIGKILL to this process, `error`
raises, `pause:<seconds>` blocks the thread. An unknown name or action is an error, so that a test cannot pass by a typo.
"""

from __future__ import annotations

import os
import signal
import time
from functools import cache

VARIABLE = "TIERLINE_FAILPOINTS"
POINTS = (
    "updater.verified",
    "updater.floor",
    "updater.fetched",
    "updater.preparing",
    "updater.prepared",
    "updater.committing",
    "updater.recorded",
    "updater.committed",
    "updater.reported",
)
"""In the order in which an update passes them."""
DETOURS = ("updater.waiting", "updater.rolling_back", "updater.rolled_back")
"""Passed only by an update that must wait, or is taken back."""


class FailpointReached(Exception):
    """Raised by a point that is armed with `error`."""


def reach(point: str) -> None:
    """Do what the environment armed `point` with; nothing, almost always."""
    action = _armed(os.environ.get(VARIABLE, "")).get(point)
    if action is None:
        return
    verb, _, argument = action.partition(":")
    if verb == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif verb == "pause":
        time.sleep(float(argument))
    else:
        raise FailpointReached(point)


@cache
def _armed(setting: str) -> dict[str, str]:
    armed: dict[str, str] = {}
    for item in filter(None, setting.split(",")):
        point, _, action = item.partition("=")
        if point not in POINTS + DETOURS or action.partition(":")[0] not in ("kill", "error", "pause"):
            raise ValueError(f"{VARIABLE}: {item!r} is not <point>=kill, error or pause:<seconds>")
        armed[point] = action
    return armed
