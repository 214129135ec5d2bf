"""`tierline model profile`: what a model costs here, where it will run, and whether batching pays, with the reason."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from math import isfinite
from pathlib import Path

from models.errors import PackageError
from models.serving.folder import load_folder
from models.serving.loaded import INLINE_SECONDS, Loaded


def model(argv: Sequence[str]) -> int:
    """`tierline model profile FOLDER [MODEL]`. Returns the exit code: 2 = wrong folder, model or options."""
    parser = argparse.ArgumentParser(prog="tierline model", description="Look into models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    profile = commands.add_parser("profile", help="measure a model: its runs, its batches, where it will run")
    profile.add_argument("folder", type=Path, help="folder of models: FOLDER/<model>/<version>/model.onnx")
    profile.add_argument("model", nargs="?", help="this model only (default: all of them)")
    profile.add_argument("--json", action="store_true", help="one JSON object per version instead of text")
    arguments = parser.parse_args(argv)
    try:
        models, problems = load_folder(arguments.folder)
    except (PackageError, OSError) as error:
        return _refuse(str(error))
    for problem in problems:
        print(f"not measured: {problem}", file=sys.stderr)
    if arguments.model is not None and arguments.model not in models:
        return _refuse(f"{arguments.folder} has no model '{arguments.model}'; it has {', '.join(sorted(models))}")
    for name in sorted(models) if arguments.model is None else [arguments.model]:
        for version, loaded in models[name].items():
            facts = describe(name, version, loaded)
            print(json.dumps(facts) if arguments.json else as_text(facts))
            loaded.session.close()
    return 0


def describe(name: str, version: str, loaded: Loaded) -> dict[str, object]:
    """What was measured when the version was loaded. `runs`: rows -> microseconds of one run, in all and per row."""
    rows_inline = loaded.inline_elements // loaded.row_elements if loaded.row_elements else 0
    return {
        "model": name,
        "version": version,
        "platform": loaded.identity.platform,
        "row_us": round(loaded.seconds * 1e6, 1) if isfinite(loaded.seconds) else None,
        "runs_in": "event loop" if rows_inline else "engine threads",
        "event_loop_rows": rows_inline,
        "batch_rows": loaded.batching.rows,
        "batching": loaded.batching.reason,
        "runs": {
            str(rows): [round(seconds * 1e6, 1), round(seconds / rows * 1e6, 2)]
            for rows, seconds in loaded.batching.times.items()
        },
    }


def as_text(facts: dict[str, object]) -> str:
    took = (
        f"{facts['row_us']} us for one row" if facts["row_us"] is not None else "not measured: blank inputs are refused"
    )
    where = (
        f"the event loop, up to {facts['event_loop_rows']} rows ({INLINE_SECONDS * 1e3:g} ms); more go to engine threads"
        if facts["event_loop_rows"]
        else "engine threads"
    )
    batching = f"up to {facts['batch_rows']} rows" if facts["batch_rows"] != 1 else "off"
    lines = [
        f"{facts['model']} version {facts['version']} ({facts['platform']})",
        f"  a run     {took}",
        f"  runs in   {where}",
        f"  batching  {batching}: {facts['batching']}",
    ]
    runs = facts["runs"]
    assert isinstance(runs, dict)
    if runs:
        lines.append("      rows     us per run   us per row")
        lines += [f"    {rows:>6} {whole:>14} {each:>12}" for rows, (whole, each) in runs.items()]
    return "\n".join(lines)


def _refuse(message: str) -> int:
    print(f"tierline model: {message}", file=sys.stderr)
    return 2
