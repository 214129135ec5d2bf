"""`tierline hub settings | deployments`: what the fleet is told, said to a running hub."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cloud_hub.client import HubClient
from cloud_hub.command import hub_parser, pairs_text, print_table, speak

MAX_SETTINGS_FILE = 64 * 1024
"""More than the hub takes: it is the hub that says how much is too much."""


def settings(argv: Sequence[str]) -> int:
    """Show, set or remove how nodes update."""
    parser = hub_parser(
        "hub settings", "How nodes update: show, set or remove a tenant's settings, or those of one node alone."
    )
    parser.add_argument("action", choices=("show", "set", "remove"))
    parser.add_argument("of", metavar="TENANT|NODE", help="a tenant, or one node: tenant.node")
    parser.add_argument("file", type=Path, nargs="?", help="JSON, for set: takes the place of all that was set before")
    options = parser.parse_args(argv)
    if (options.action == "set") != (options.file is not None):
        parser.error("set needs a file" if options.action == "set" else f"{options.action} takes no file")
    # A tenant's name has no dot, a node's has one.
    path = f"/api/v1/settings/{'nodes/' if '.' in options.of else ''}{quote(options.of, safe='')}"

    def run(client: HubClient) -> None:
        if options.action == "show":
            _show(client.get(path)["settings"], options.of)
        elif options.action == "set":
            with options.file.open("rb") as file:
                body = file.read(MAX_SETTINGS_FILE)
            print(f"settings of {options.of} are revision {client.send('PUT', path, body)['revision']}")
        else:
            answer = client.send("DELETE", path, b"")
            print(f"{_in_force(answer['settings'], options.of)} (revision {answer['revision']})")

    return speak("hub settings", options, run)


def _show(found: dict[str, Any], of: str) -> None:
    """As a file that `set` takes; whose they are goes to standard error."""
    if found.pop("of", None) == "tenant" and "." in of:
        print(f"tierline hub settings: {of} has none of its own, its tenant's apply", file=sys.stderr)
    print(json.dumps(found, indent=2))


def _in_force(left: dict[str, Any], of: str) -> str:
    if "." not in of:
        return f"{of} has no settings: the nodes' own apply"
    return f"{of} goes by {'the settings of its tenant' if left.get('of') == 'tenant' else 'its own configuration'}"


def deployments(argv: Sequence[str]) -> int:
    """List deployments, or remove one."""
    parser = hub_parser("hub deployments", "List deployments, or remove one.")
    parser.add_argument("action", nargs="?", choices=("list", "remove"), default="list")
    parser.add_argument("name", nargs="?", help="of the deployment to remove")
    options = parser.parse_args(argv)
    if (options.action == "remove") != (options.name is not None):
        parser.error("remove needs the name of a deployment" if options.action == "remove" else "list takes no name")
    path = "/api/v1/deployments"

    def run(client: HubClient) -> None:
        if options.action == "remove":
            client.send("DELETE", f"{path}/{quote(options.name, safe='')}", b"")
            print(f"deployment {options.name} is gone; nodes stop serving what no other deployment gives them")
            return
        rows = [_row(entry) for entry in client.get(path)["items"]]
        print_table(("DEPLOYMENT", "TENANT", "SELECTOR", "MODELS", "NODES", "IN SYNC", "REFUSED"), rows)

    return speak("hub deployments", options, run)


def _row(entry: dict[str, Any]) -> tuple[str, ...]:
    progress = entry["progress"]
    counts = (str(progress[name]) for name in ("total", "in_sync", "refused"))
    return entry["name"], entry["tenant"], pairs_text(entry["selector"]), pairs_text(entry["models"]), *counts


FLEET_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"settings": settings, "deployments": deployments}
