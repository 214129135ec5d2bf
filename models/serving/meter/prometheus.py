"""The registry as Prometheus reads it: text exposition format 0.0.4. Pure.

Dots become underscores, the unit is appended, counters end in `_total`, histograms have classic buckets.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import isinf, isnan

from models.serving.meter.catalogue import Entry
from models.serving.meter.histogram import Snapshot
from models.serving.meter.registry import Family, Number

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_UNITS = {"s": "_seconds", "By": "_bytes"}
_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})


def name_of(entry: Entry) -> str:
    """What Prometheus calls a metric."""
    return entry.name.replace(".", "_") + _UNITS.get(entry.unit, "") + ("_total" if entry.kind == "counter" else "")


def render(families: Iterable[Family]) -> bytes:
    """The whole page, UTF-8."""
    lines: list[str] = []
    for family in families:
        if family.series:
            _family(lines, family)
    # A model's name may hold what UTF-8 cannot: one broken label must not cost the whole scrape.
    return "".join(lines).encode("utf-8", "replace")


def _family(lines: list[str], family: Family) -> None:
    entry = family.entry
    name = name_of(entry)
    text = entry.text.replace("\\", r"\\").replace("\n", r"\n")
    lines.append(f"# HELP {name} {text}\n# TYPE {name} {entry.kind}\n")
    for values, number in family.series:
        labels = ",".join(
            f'{label}="{value.translate(_ESCAPES)}"' for label, value in zip(entry.labels, values, strict=True)
        )
        if isinstance(number, Snapshot):
            _histogram(lines, name, labels, number)
        else:
            lines.append(f"{name}{_braces(labels)} {_number(number)}\n")


def _histogram(lines: list[str], name: str, labels: str, snapshot: Snapshot) -> None:
    before = f"{name}_bucket{{{labels}," if labels else f"{name}_bucket{{"
    for edge, count in zip(snapshot.layout.exported, snapshot.cumulative(), strict=True):
        lines.append(f'{before}le="{_number(edge)}"}} {count}\n')
    count = snapshot.count
    lines.append(f'{before}le="+Inf"}} {count}\n')
    lines.append(f"{name}_sum{_braces(labels)} {_number(snapshot.total)}\n{name}_count{_braces(labels)} {count}\n")


def _braces(labels: str) -> str:
    return f"{{{labels}}}" if labels else ""


def _number(value: Number) -> str:
    if isinstance(value, int):
        return str(value)
    if isnan(value):
        return "NaN"
    if isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return repr(value)
