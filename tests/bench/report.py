"""Figures as the markdown of docs/benchmarks.md: `python tests/bench/report.py RESULTS.json [PEERS.json] [--into FILE]`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from figures import HEADINGS, Figure, brief, from_json, machine_line

BEGIN = "<!-- figures begin -->"
END = "<!-- figures end -->"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="what run.py and rivals.py wrote with --json")
    parser.add_argument("--into", type=Path, metavar="FILE", help=f"put them there, between {BEGIN} and {END}")
    arguments = parser.parse_args()
    text = "\n".join("\n".join(lines(json.loads(path.read_text()))) for path in arguments.results).rstrip() + "\n"
    if arguments.into is None:
        print(text, end="")
        return 0
    before, begun, rest = arguments.into.read_text().partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not begun or not ended:
        print(f"{arguments.into} has no {BEGIN} ... {END}", file=sys.stderr)
        return 2
    arguments.into.write_text(f"{before}{BEGIN}\n{text}{END}{after}")
    return 0


def lines(results: Mapping[str, Any]) -> list[str]:
    figures = [from_json(data) for data in results["figures"]]
    held = [each for each in figures if each.budget is not None]
    what = f"{results['rounds']} rounds, {results['seconds']:.0f} s"
    found = [f"{machine_line(results['machine'])}; {what}.", ""]
    found += [f"{sum(bool(each.met) for each in held)} of {len(held)} budgets met.", ""]
    for row in sorted({each.row for each in figures}):
        found += [f"**{_name(row)}**", "", *_table([each for each in figures if each.row == row]), ""]
    found += [f"Left out: {name}: {brief(reason)}" for name, reason in results.get("left_out", {}).items()]
    return found


def _name(row: int) -> str:
    return HEADINGS[row] if row > 9 else f"Row {row}. {HEADINGS[row]}"


def _table(figures: Sequence[Figure]) -> list[str]:
    head = ["| what | median | rounds | budget | |", "|---|---:|---:|---:|---|"]
    return head + [
        f"| {_what(each)} | {_value(each)} | {_spread(each)} | {each.bound} | {_verdict(each)} |" for each in figures
    ]


def _what(each: Figure) -> str:
    return f"{each.what} ({each.note})" if each.note else each.what


def _value(each: Figure) -> str:
    return f"{each.value:g} {each.unit}".rstrip()


def _spread(each: Figure) -> str:
    return "" if each.low is None or each.low == each.high else f"{each.low:g} .. {each.high:g}"


def _verdict(each: Figure) -> str:
    return f"**{each.verdict}**" if each.met is False else each.verdict


if __name__ == "__main__":
    raise SystemExit(main())
