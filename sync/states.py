"""The updater as a table: states, what may happen in each, where it leads, how long it may last. Pure; draws itself.

The table is about one document, the newest that was verified. What is not in it cannot happen: `step` refuses.
"""

from __future__ import annotations

from collections.abc import Mapping

FAILURES = {"refused": "refused", "failed": "failed"}
"""`refused`: the document is not to be had here, whatever happens. `failed`: not now; it stays wanted and is tried again."""
NEWER = {"offered": "verifying"}

BEFORE = {"started": "probation", "bad": "rolled_back"}

STATES: Mapping[str, Mapping[str, str]] = {
    "idle": {**NEWER, **BEFORE, "refused": "refused", "failed": "failed"},
    "verifying": {
        **NEWER, "listed": "fetching", "hold": "held", "window": "waiting", "go": "preparing", **BEFORE, **FAILURES,
    },
    "fetching": {**NEWER, "hold": "held", "window": "waiting", "go": "preparing", **BEFORE, **FAILURES},
    "waiting": {
        **NEWER, "window": "waiting", "hold": "held", "go": "preparing", "commit": "committing", **BEFORE, **FAILURES,
    },
    "held": {
        **NEWER, "hold": "held", "window": "waiting", "go": "preparing", "commit": "committing", **BEFORE, **FAILURES,
    },
    "preparing": {**NEWER, "hold": "held", "window": "waiting", "commit": "committing", **BEFORE, **FAILURES},
    "committing": {"committed": "probation", "resumed": "preparing", **BEFORE, **FAILURES},
    "probation": {**NEWER, "good": "applied", "watched": "probation", **BEFORE, **FAILURES},
    "applied": {**NEWER, "good": "applied", "started": "applied", "bad": "rolled_back", **FAILURES},
    "refused": {**NEWER, "good": "applied", "watched": "probation", "bad": "rolled_back", **FAILURES},
    "failed": {**NEWER, "good": "applied", "watched": "probation", **BEFORE, **FAILURES},
    "rolled_back": {**NEWER, "good": "applied", "watched": "probation", "bad": "rolled_back", **FAILURES},
}  # fmt: skip
"""State -> event -> the state it leads to.

`offered`: a newer document. `listed`: its files are approved, its floor and candidate are on the disk. `hold`: the
application asks to wait. `window`: no maintenance window is open. `go`: nothing is in the way of loading it. `commit`:
nothing is in the way of putting it in force. `committed`: it is. `good`: it proved itself, or its probation is over. `bad`: it
was taken back, for good. `started`: a process that starts has put it in force from the disk. `resumed`: the process ended
before the disk said that it is in force. `watched`: it is in force, on probation, and was offered again.
"""

UNDER_WAY = ("verifying", "fetching", "waiting", "held", "preparing", "committing", "probation")
"""Something is happening to the document, which an offer that is refused must not hide."""
RESUMED = ("fetching", "waiting", "held", "preparing")
"""In these a node goes on after a restart; the candidate and its approval are on the disk."""

DEADLINES: Mapping[str, float] = {
    "verifying": 300.0,
    "fetching": 6 * 3600.0,
    "preparing": 900.0,
    "committing": 60.0,
}
"""Seconds a state may last before it has failed and is tried again; settings may change them.

Verifying asks a few small files of every source, each with timeouts of its own. Fetching: 4 GB at 200 kB/s; what came stays
and is continued. Preparing: a probe and a load, each bounded at 10 minutes. Committing is one assignment. `held` is bounded
by the settings' `max_hold_seconds`, `probation` by its `probation_seconds`, `waiting` by the next window.
"""

MIN_DEADLINES: Mapping[str, float] = {
    "verifying": 90.0,
    "fetching": 150.0,
    "preparing": 120.0,
    "committing": 5.0,
}
"""Seconds below which an update may never end, however often it is tried; settings cannot go lower.

Verifying: a source that drips is cut after 60 s, and the next one must get its turn. Fetching: a mirror that is bringing the
file itself is waited for 120 s before its first byte. Preparing: nothing of a try that was cut is kept, and trying a new
version of the software alone may take 120 s. Committing: one assignment, in an event loop that a slow disk or a busy processor
may stall for seconds.
"""


class ImpossibleStep(Exception):
    """A mistake of ours: an event in a state that does not know it."""


def step(state: str, event: str) -> str:
    """The state that follows. Raises ImpossibleStep."""
    try:
        return STATES[state][event]
    except KeyError:
        raise ImpossibleStep(f"{event!r} cannot happen in state {state!r}") from None


COMMON = 8
"""Rows in which one event leads to one state before the diagram says so once, beside that state."""


def mermaid() -> str:
    """The table as a Mermaid state diagram: an arrow per pair of states, and a note for what may happen in most."""
    rows: dict[tuple[str, str], list[str]] = {}
    for state, row in STATES.items():
        for event, following in row.items():
            rows.setdefault((event, following), []).append(state)
    arrows: dict[tuple[str, str], list[str]] = {}
    notes: dict[str, list[str]] = {}
    for (event, following), states in rows.items():
        if len(states) < COMMON:
            for state in states:
                arrows.setdefault((state, following), []).append(event)
        else:
            missing = [state for state in STATES if state not in states]
            words = f"{event}, in any state" + (f" but {', '.join(missing)}" if missing else "")
            notes.setdefault(following, []).append(words)
    lines = ["stateDiagram-v2", "    [*] --> idle"]
    lines += [f"    {state} --> {following}: {', '.join(events)}" for (state, following), events in arrows.items()]
    for state, texts in notes.items():
        lines += [f"    note right of {state}", *(f"        {text}" for text in texts), "    end note"]
    return "\n".join(lines)


def deadlines_table() -> str:
    """State, its deadline and the shortest that settings may give, as Markdown rows."""
    rows = [f"| `{state}` | {seconds:g} s | {MIN_DEADLINES[state]:g} s |" for state, seconds in DEADLINES.items()]
    return "\n".join(["| state | may last | settings: at least |", "|---|---|---|", *rows])


def redraw(page: str) -> str:
    """`page`, Markdown, with its diagram and its table of deadlines as they are here."""
    import re

    page = re.sub(r"```mermaid\n.*?\n```", lambda _: f"```mermaid\n{mermaid()}\n```", page, count=1, flags=re.DOTALL)
    table = r"\| state \| may last \|.*\n(?:\|.*\n)+"
    return re.sub(table, lambda _: deadlines_table() + "\n", page, count=1)


if __name__ == "__main__":
    import sys
    from pathlib import Path

    for name in sys.argv[1:]:
        path = Path(name)
        path.write_text(redraw(path.read_text()))
