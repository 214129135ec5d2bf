"""`tierline doctor`: what is wrong on this machine, and what to do about it."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from sync.doctor.check import Check, Result, exit_code
from sync.doctor.machine import software
from sync.doctor.redaction import Redaction
from sync.doctor.render import as_json, as_text
from sync.doctor.runner import run_checks, select
from sync.doctor.subject import read_raw

Doctor = Callable[[Path], tuple[Any, Sequence[Check[Any]]]]
"""What is to be looked at below a path, and the table of checks."""
Doctors = Mapping[str, tuple[str, str]]
"""Tier, or `hub` -> (where its `Doctor` lives, as `module:name`, the extra it needs). The front door has it."""

DEFAULT_CONFIG = Path("node.toml")


def doctor(argv: Sequence[str], doctors: Doctors) -> int:
    """Exit code: 0 = nothing has to be done, 1 = something failed, 2 = the command line was wrong."""
    parser = argparse.ArgumentParser(
        prog="tierline doctor",
        description="Check this machine's node or hub: what is wrong, and what to do about it. Changes nothing.",
        epilog="Of a node that runs elsewhere: tierline hub doctor NODE. All checks: docs/doctor.md.",
    )
    add_place(parser)
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="a check or a group; may be repeated"
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--strict", action="store_true", help="warnings count as failures for the exit code")
    options = parser.parse_args(argv)
    logging.basicConfig(handlers=[logging.NullHandler()])  # what is to be said is in the report
    try:
        tier, path = find_place(options)
        subject, table = place(tier, path, doctors)
        checks = select(table, options.only)
    except (ValueError, OSError) as error:
        print(f"tierline doctor: {error}", file=sys.stderr)
        return 2
    began = time.monotonic()
    results = run_checks(checks, subject)
    return show(title_of(tier, subject), results, time.monotonic() - began, subject.redaction(), options)


def add_place(parser: argparse.ArgumentParser) -> None:
    """What is to be looked at."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="of a node; default: node.toml in this folder")
    parser.add_argument("--hub-data", type=Path, metavar="DIR", help="a hub's data folder instead")
    parser.add_argument("--tier", choices=("device", "edge", "cloud"), help="when the configuration does not say")


def find_place(options: argparse.Namespace) -> tuple[str, Path]:
    """(tier or hub, path). Raises ValueError."""
    if options.hub_data is not None and options.config is not None:
        raise ValueError("--config and --hub-data: say one of the two")
    if options.hub_data is not None:
        if not options.hub_data.is_dir():
            raise ValueError(f"--hub-data {options.hub_data}: no such folder")
        return "hub", options.hub_data
    path = options.config or DEFAULT_CONFIG
    if not path.is_file():
        hint = "" if options.config else "; say --config FILE or --hub-data DIR"
        raise ValueError(f"{path}: no such file{hint}")
    node = read_raw(path).get("node")
    said = node.get("tier") if isinstance(node, dict) else None
    return options.tier or (said if said in ("device", "edge", "cloud") else "edge"), path


def place(tier: str, path: Path, doctors: Doctors) -> tuple[Any, Sequence[Check[Any]]]:
    """The subject and the table. Raises SystemExit naming what is not installed."""
    target, extra = doctors[tier]
    module, _, attribute = target.partition(":")
    try:
        make = cast(Doctor, getattr(import_module(module), attribute))
    except ModuleNotFoundError as error:
        raise SystemExit(f"tierline doctor needs {error.name!r}: pip install 'tierline[{extra}]'") from error
    return make(path)


def title_of(tier: str, subject: Any) -> dict[str, object]:
    membership = getattr(subject, "membership", None)
    name = membership.id if membership is not None else str(getattr(subject, "name", tier))
    return {"about": name, "tier": tier, "software": software(), "at": round(time.time())}


def show(
    title: Mapping[str, object],
    results: list[Result],
    took: float,
    redaction: Redaction,
    options: argparse.Namespace,
    out: Callable[[str], None] = print,
) -> int:
    """Print a report and say the exit code."""
    clean = [Result(each.name, each.finding._replace(**_clean(each, redaction)), each.seconds) for each in results]
    if options.json:
        out(json.dumps(as_json(title, clean), indent=2))
    else:
        when = datetime.fromtimestamp(float(str(title["at"])), UTC).strftime("%Y-%m-%d %H:%M UTC")
        heading = f"{title['about']}  ({title['tier']}, tierline {title['software']})  {when}, {took:.1f} s"
        out(as_text(heading, clean, colour=colourful()))
    return exit_code(clean, strict=options.strict)


def colourful() -> bool:
    """Only for people who look at a terminal and did not ask for none: https://no-color.org."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _clean(result: Result, redaction: Redaction) -> dict[str, str]:
    return {"found": redaction.text(result.finding.found), "fix": redaction.text(result.finding.fix)}
