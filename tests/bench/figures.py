"""A measured figure with the budget it is held against, and how figures are printed."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

HEADINGS = {
    1: "Tiny MLP, 32 connections: server CPU per request",
    2: "CPU per request of other servers, as a multiple of ours",
    3: "CNN: throughput as a share of onnxruntime in process",
    4: "Added latency at one connection",
    5: "Latency at half load, open loop",
    6: "A fast model beside a saturated slow one",
    7: "Batching",
    8: "Cold start and hot swap",
    9: "Memory",
    10: "Overload, ten times capacity",
}
"""Rows 1 to 9 are those of the design's table of budgets."""


class Figure(NamedTuple):
    """`budget`: the bound that `value` is held against, None = for information. `most`: the bound is an upper one.
    `low`, `high`: the least and the greatest of the rounds."""

    row: int
    what: str
    value: float
    unit: str
    budget: float | None = None
    most: bool = True
    low: float | None = None
    high: float | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        if self.budget is None:
            return None
        return self.value <= self.budget if self.most else self.value >= self.budget

    @property
    def bound(self) -> str:
        return "" if self.budget is None else f"{'<=' if self.most else '>='} {self.budget:g}"

    @property
    def verdict(self) -> str:
        return {None: "", True: "met", False: "MISSED"}[self.met]

    def as_json(self) -> dict[str, Any]:
        return {**self._asdict(), "bound": self.bound, "verdict": self.verdict}


def from_json(data: dict[str, Any]) -> Figure:
    return Figure(**{name: data[name] for name in Figure._fields})


def figure(
    row: int,
    what: str,
    rounds: Sequence[float],
    unit: str,
    budget: float | None = None,
    *,
    most: bool = True,
    note: str = "",
) -> Figure:
    """The median of some rounds, with the least and the greatest."""
    middle, low, high = (_rounded(each) for each in (median(rounds), min(rounds), max(rounds)))
    return Figure(row, what, middle, unit, budget, most, low, high, note)


def _rounded(value: float) -> float:
    """To four digits at most."""
    return float(f"{value:.4g}")


def machine() -> dict[str, Any]:
    """What the figures come from."""
    names = [line.partition(": ")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return {
        "cpu": names[0].strip() if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average": [round(each, 2) for each in os.getloadavg()],
    }


def machine_line(data: dict[str, Any]) -> str:
    loads = " ".join(f"{each:.2f}" for each in data["load_average"])
    what = f"{data['cpu']}, {data['cores']} cores, Linux {data['kernel']}, Python {data['python']}"
    return f"{what}; load average before: {loads}"


def print_figures(figures: Sequence[Figure], say: Callable[[str], None] = print) -> None:
    width = max(len(each.what) for each in figures)
    for row in sorted({each.row for each in figures}):
        say(f"\n{row}. {HEADINGS[row]}")
        for each in figures:
            if each.row == row:
                say(_line(each, width))
    held = [each for each in figures if each.budget is not None]
    missed = [each for each in held if not each.met]
    say(f"\n{len(held) - len(missed)} of {len(held)} budgets met")
    for each in missed:
        say(f"  MISSED: {each.what}: {each.value:g} {each.unit} {each.bound}")


def _line(each: Figure, width: int) -> str:
    spread = f"{each.low:g}..{each.high:g}" if each.low is not None else ""
    measured = f"{each.value:g} {each.unit}".rstrip()
    line = f"   {each.what:<{width}}  {measured:>14}  {spread:>19}  {each.bound:>8} {each.verdict:6} {each.note}"
    return line.rstrip()


def brief(reason: str) -> str:
    """A failure's first line and a traceback's last one; the JSON has it whole."""
    first, *rest = [line for line in reason.splitlines() if line.strip()] or [""]
    return f"{first} ... {rest[-1]}" if rest else first
