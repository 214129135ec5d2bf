"""Tierline's data plane beside raw onnxruntime and a FastAPI baseline, held against the design's budgets.

Usage: python tests/bench/run.py [--quick] [--only ROW ...] [--json FILE] [--plot FILE]. Every server's answers are checked
against onnxruntime before they are timed; rounds are interleaved; medians are printed with the least and the greatest round.
CPU per request is the steady figure on a busy machine; a busy machine's latencies are worth their ratios only.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# The writer of models is shared with the tests, which are no package; so are the stubs of our own protocol.
sys.path += [str(ROOT), str(ROOT / "tests")]

from costs import Pace, measure_costs, measure_start  # noqa: E402
from figures import Figure, brief, from_json, machine, machine_line, print_figures  # noqa: E402
from launch import FAILURES, Desk, stop_in_order  # noqa: E402
from loads import (  # noqa: E402
    measure_batching,
    measure_half_load,
    measure_isolation,
    measure_overload,
    measure_throughput,
)
from networks import Network, write_networks  # noqa: E402

FULL = Pace(rounds=5, seconds=1.5, swaps=500, cycles=200)
QUICK = Pace(rounds=1, seconds=0.4, swaps=20, cycles=10)
Measure = Callable[[Desk, Path, Mapping[str, Network], Pace], list[Figure]]

# What is measured, the rows it fills, the models it serves. Cold start and memory are stated for two models.
SCENARIOS: list[tuple[Measure | None, tuple[int, ...], tuple[str, ...]]] = [
    (None, (1, 4, 9), ("mlp", "cnn")),
    (measure_throughput, (3,), ("mlp", "cnn")),
    (measure_half_load, (5,), ("mlp", "cnn")),
    (measure_isolation, (6,), ("mlp", "slow")),
    (measure_batching, (7,), ("mlp", "dense", "cnn")),
    (measure_start, (8, 9), ("mlp", "cnn")),
    (measure_overload, (10,), ("mlp", "steady")),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round: does it all still run?")
    parser.add_argument("--only", type=int, nargs="+", metavar="ROW", help="these rows of the table; 10 = overload")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them, PNG; needs matplotlib")
    arguments = parser.parse_args()
    if shutil.which("h2load") is None:
        print("this benchmark needs h2load (Debian, Ubuntu: apt install nghttp2-client)", file=sys.stderr)
        return 2
    results = run(QUICK if arguments.quick else FULL, arguments.only)
    if results["figures"]:
        print_figures([from_json(data) for data in results["figures"]])
    for what, reason in results["left_out"].items():
        print(f"FAILED: {what}: {brief(reason)}")
    print(f"took {results['seconds']:.0f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    if arguments.plot:
        from plot import draw

        draw(results, None, arguments.plot)
    return 1 if results["left_out"] else 0


def run(pace: Pace, only: list[int] | None) -> dict[str, Any]:
    about, begun = machine(), time.monotonic()
    print(machine_line(about), flush=True)
    figures: list[Figure] = []
    table: Any = {}
    left_out: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        desk = Desk(Path(folder))
        for measure, rows, names in SCENARIOS:
            if only and not set(rows) & set(only):
                continue
            print(f"measuring row {', '.join(map(str, rows))} ...", file=sys.stderr, flush=True)
            models = Path(folder) / "-".join(names)
            networks = write_networks(models, names)
            try:
                if measure is None:
                    found, table = measure_costs(desk, models, networks, pace)
                else:
                    found = measure(desk, models, networks, pace)
                figures += found
            except FAILURES as error:
                left_out[f"row {rows[0]}"] = f"{type(error).__name__}: {error}"
    return {
        "machine": about,
        "rounds": pace.rounds,
        "seconds": round(time.monotonic() - begun, 1),
        "figures": [each.as_json() for each in figures],
        "table": table,
        "left_out": left_out,
    }


if __name__ == "__main__":
    stop_in_order()
    raise SystemExit(main())
