"""Where the child that tries files begins: it steps aside for whoever serves before it imports anything, half of its work."""

from __future__ import annotations

import os

NICENESS = 15
"""As `models.serving.cores.LOADING_NICE`, which this file does not import: nothing may be imported before."""


def start() -> None:
    os.nice(NICENESS)
    from models.serving.probe_child import main

    main()
    # Native teardown is skipped: a crash in it would say nothing about the file's answers.
    os._exit(0)


if __name__ == "__main__":
    start()
