"""Where the child that tries files begins: it steps aside for whoever serves before it imports anything, half of its work."""

from __future__ import annotations

import os

NICENESS = 10
"""A tenth of a core's time where requests want all of it. Less would let a busy node never try anything."""


def start() -> None:
    os.nice(NICENESS)
    from models.serving.probe_child import main

    main()
    # Native teardown is skipped: a crash in it would say nothing about the file's answers.
    os._exit(0)


if __name__ == "__main__":
    start()
