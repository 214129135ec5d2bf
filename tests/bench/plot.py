"""Figures as a picture: `python tests/bench/plot.py RESULTS.json [PEERS.json] OUT.png`. Needs matplotlib."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from figures import machine_line

BUDGET_US = 35.0
OURS, THEIRS, FLOOR = "#0b6e4f", "#9aa5b1", "#c98a1b"
INK, FAINT = "#1f2933", "#e4e7eb"
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 1}


class Point(NamedTuple):
    """`p50`: microseconds at one connection, None = not asked over a network."""

    name: str
    cpu: float
    p50: float | None
    colour: str


def main() -> int:
    if len(sys.argv) not in (3, 4):
        print(__doc__, file=sys.stderr)
        return 2
    results, *peers = (json.loads(Path(name).read_text()) for name in sys.argv[1:-1])
    draw(results, peers[0] if peers else None, Path(sys.argv[-1]))
    return 0


def draw(results: Mapping[str, Any], peers: Mapping[str, Any] | None, out: Path) -> None:
    """Two panels of points on logarithmic scales: CPU per request, and latency at one connection."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    points = sorted(points_of(results, peers), key=lambda point: point.cpu, reverse=True)
    style = {"font.size": 10, "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK}
    with plt.rc_context(style):
        figure, (left, right) = plt.subplots(1, 2, sharey=True, figsize=(12, 1.9 + 0.36 * len(points)))
        _panel(left, points, [point.cpu for point in points], "µs")
        left.set_title("Server CPU per request, 32 connections", loc="left", fontsize=11, fontweight="bold")
        left.axvline(BUDGET_US, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        left.annotate(
            f"budget {BUDGET_US:g} µs",
            (BUDGET_US, len(points) - 0.45),
            xytext=(4, 0),
            textcoords="offset points",
            fontsize=9,
        )
        _panel(right, points, [point.p50 for point in points], "µs")
        right.set_title("Median latency, one connection", loc="left", fontsize=11, fontweight="bold")
        left.set_yticks(range(len(points)), [point.name for point in points])
        for label, point in zip(left.get_yticklabels(), points, strict=True):
            label.set_fontweight("bold" if point.colour == OURS else "normal")
        figure.suptitle("A 64-128-10 network behind each server", x=0.01, ha="left", fontsize=14, fontweight="bold")
        about = f"{machine_line(results['machine'])}. Medians; left is better; logarithmic scales."
        figure.text(0.01, 0.012, about, fontsize=8, color="#52606d")
        figure.tight_layout(rect=(0, 0.03, 1, 0.98), w_pad=2)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=110, metadata={"Software": None})
        plt.close(figure)


def _panel(axes: Any, points: list[Point], values: list[float | None], unit: str) -> None:
    known = [value for value in values if value is not None]
    left, right = min(known) / 1.4, max(known) * 3.2
    axes.set_xscale("log")
    axes.set_xlim(left, right)
    axes.set_ylim(-0.6, len(points) - 0.1)
    for place, (point, value) in enumerate(zip(points, values, strict=True)):
        if value is None:
            axes.annotate(
                "in process: no network",
                (left, place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
            )
            continue
        axes.scatter(value, place, color=point.colour, s=90, zorder=3)
        text = f"{value:,.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"
        axes.annotate(
            text, (value, place), xytext=(9, 0), textcoords="offset points", va="center", fontsize=9, bbox=PAPER
        )
    axes.grid(visible=True, color=FAINT, zorder=0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.tick_params(length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def points_of(results: Mapping[str, Any], peers: Mapping[str, Any] | None) -> list[Point]:
    table, points = results["table"], []
    for name, row in table.items():
        if name.endswith("cnn"):
            continue
        colour = OURS if name.startswith("tierline") else FLOOR if name.startswith("onnxruntime") else THEIRS
        label = name.removesuffix(", mlp").replace("tierline", "Tierline")
        label = label.replace(", open", ", no token, limits, metrics")
        points.append(Point(label, median(row["cpu_us"]), median(row["p50_us"]) if "p50_us" in row else None, colour))
    for each in (peers or {}).get("table", []):
        if each["model"] == "mlp":
            theirs = each["theirs"]
            name = f"{each['rival']}, {each['protocol']}".replace("batches of 32 within 2 ms", "batching")
            points.append(Point(name, median(theirs["cpu_us"]), median(theirs["p50_us"]), THEIRS))
    return points


if __name__ == "__main__":
    raise SystemExit(main())
