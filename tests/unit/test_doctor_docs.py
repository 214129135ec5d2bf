"""docs/doctor.md lists every check as the tables have it. Run as a script, this file writes the lists anew."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cloud_hub.doctor
import cloud_hub.worker_doctor
import device_agent.doctor
import edge_node.doctor
from sync.doctor.check import Check
from sync.doctor.node import NODE

PAGE = Path(__file__).parents[2] / "docs" / "doctor.md"
BEGIN, END = "<!-- checks -->\n", "<!-- end of checks -->\n"
TABLES: dict[str, Sequence[Check[Any]]] = {
    "Every node": NODE,
    "An edge node, besides": edge_node.doctor.CHECKS[len(NODE) :],
    "A device agent, besides": device_agent.doctor.CHECKS[len(NODE) :],
    "A cloud worker, besides": cloud_hub.worker_doctor.CHECKS[len(NODE) :],
    "The hub": [check for check in cloud_hub.doctor.CHECKS if check.group != "machine"],
}


def lists() -> str:
    lines = []
    for heading, checks in TABLES.items():
        lines += [f"### {heading}", "", "| check | looks at | when it is not well |", "|---|---|---|"]
        lines += [f"| `{each.name}` | {each.what} | {each.fix} |" for each in checks]
        lines.append("")
    return "\n".join(lines)


def test_the_page_lists_every_check_as_it_is() -> None:
    text = PAGE.read_text()
    assert text.split(BEGIN)[1].split(END)[0] == lists(), "run: python tests/unit/test_doctor_docs.py"


def test_the_page_says_how_many_there_are() -> None:
    assert f"{sum(len(checks) for checks in TABLES.values())} checks" in PAGE.read_text()


def test_no_check_holds_what_would_break_the_list() -> None:
    for checks in TABLES.values():
        for each in checks:
            assert "|" not in each.name + each.what + each.fix


if __name__ == "__main__":
    head, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(head + BEGIN + lists() + END + rest.partition(END)[2])
