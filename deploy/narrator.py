"""Telling a person what happens: plain sentences, a live line while something takes time, a table at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TextIO


class Narrator:
    """Writes to `out`. On a terminal the progress line is rewritten in place; in a log it is left out."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stdout
        self._live = self._out.isatty()
        self._began = time.monotonic()
        self._width = 0

    @property
    def seconds(self) -> float:
        """Seconds since the story began."""
        return time.monotonic() - self._began

    def chapter(self, title: str) -> None:
        self._line("")
        self._line(f"[{self.seconds:5.1f} s] {title}")

    def say(self, text: str) -> None:
        for line in text.splitlines():
            self._line(f"    {line}")

    def progress(self, text: str) -> None:
        """What is going on right now. Gone with the next line."""
        if self._live:
            shown = f"    {text}"
            self._out.write("\r" + shown.ljust(self._width))
            self._out.flush()
            self._width = len(shown)

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """First column to the left, numbers to the right."""
        widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
        for row in (head, ["-" * width for width in widths], *rows):
            cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
            cells[0] = row[0].ljust(widths[0])
            self._line("    " + "  ".join(cells))

    def _line(self, text: str) -> None:
        if self._width:
            self._out.write("\r" + " " * self._width + "\r")
            self._width = 0
        self._out.write(text + "\n")
        self._out.flush()
