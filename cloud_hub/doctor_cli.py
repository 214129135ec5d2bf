"""`tierline hub doctor NODE`: a node's own doctor, asked through a running hub."""

from __future__ import annotations

import time
from collections.abc import Sequence
from urllib.parse import quote

from cloud_hub.client import HubClient
from cloud_hub.command import hub_parser, speak
from sync.doctor.cli import show
from sync.doctor.redaction import Redaction
from sync.doctor.render import from_json


def doctor(argv: Sequence[str]) -> int:
    """Exit code: 0 = nothing has to be done, 1 = something failed there or the node did not answer, 2 = wrong usage."""
    parser = hub_parser(
        "hub doctor", "Check a node from here: what is wrong there, and what to do about it. Changes nothing."
    )
    parser.add_argument("id", help="tenant.node")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--strict", action="store_true", help="warnings count as failures for the exit code")
    options = parser.parse_args(argv)
    codes: list[int] = []

    def run(client: HubClient) -> None:
        began = time.monotonic()
        report = client.send("POST", f"/api/v1/nodes/{quote(options.id, safe='')}/doctor", {})
        title = {name: report[name] for name in ("about", "tier", "software", "at")}
        codes.append(show(title, from_json(report), time.monotonic() - began, Redaction(), options))

    return speak("hub doctor", options, run) or codes[0]
