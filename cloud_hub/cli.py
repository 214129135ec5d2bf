"""The hub's commands: run it, and speak to a running one.

Each takes its arguments and returns the exit code: 0 done, 1 refused by the hub or out of reach, 2 wrong usage or input.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cloud_hub.client import HubClient, publish_folder
from cloud_hub.command import hub_parser, pair, pairs_text, print_table, reporting, speak
from cloud_hub.fleet_cli import FLEET_COMMANDS
from cloud_hub.identity_cli import IDENTITY_COMMANDS
from models.serving.process import port_number

HUB_COMMANDS = {**IDENTITY_COMMANDS, **FLEET_COMMANDS}
"""Of `tierline hub COMMAND`, to a running hub."""
MAX_POLICY_FILE = 1024 * 1024


def hub(argv: Sequence[str]) -> int:
    """Run the hub, or speak to a running one about identities, settings and deployments."""
    if argv and argv[0] in HUB_COMMANDS:
        return HUB_COMMANDS[argv[0]](argv[1:])
    parser = argparse.ArgumentParser(
        prog="tierline hub",
        description="Run the hub until it is told to stop.",
        epilog=f"Speaking to a running hub: tierline hub {' | '.join(HUB_COMMANDS)}; each has --help.",
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the database, the files and the keys")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen; beyond loopback always with TLS")
    parser.add_argument("--http-port", type=port_number, default=8080, help="0 = chosen by the system (default 8080)")
    parser.add_argument("--broker", default="mqtt://127.0.0.1:1883", metavar="URL")
    parser.add_argument("--broker-password-file", type=Path, metavar="FILE", help="password of the broker user _hub-1")
    parser.add_argument(
        "--public-name",
        action="append",
        default=[],
        metavar="NAME",
        help="host name or address by which nodes reach this hub: goes into its certificate and turns TLS on; may be repeated",
    )
    parser.add_argument(
        "--public-broker",
        action="append",
        default=[],
        metavar="URL",
        help="what nodes are told; default mqtts://NAME:8883",
    )
    parser.add_argument(
        "--public-url",
        action="append",
        default=[],
        metavar="URL",
        help="what nodes are told; default https://NAME:PORT",
    )
    parser.add_argument("--ca-cert", type=Path, metavar="FILE", help="an external authority: its chain, root last, PEM")
    parser.add_argument("--ca-key", type=Path, metavar="FILE", help="and its key")
    if argv and not argv[0].startswith("-"):
        near = get_close_matches(argv[0], HUB_COMMANDS, n=1)
        parser.error(f"no command {argv[0]!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    options = parser.parse_args(argv)
    if (options.ca_cert is None) != (options.ca_key is None):
        parser.error("--ca-cert and --ca-key go together")
    # Here, not above: the commands that only speak to a hub need no server installed.
    try:
        from cloud_hub.server import HubOptions, running_hub
        from models.serving.process import configure_logging, run_until_stopped
    except ModuleNotFoundError as error:
        print(f"tierline hub needs {error.name!r}: pip install 'tierline[hub]'", file=sys.stderr)
        return 2

    configure_logging("hub")
    settings = HubOptions(
        data=options.data,
        host=options.host,
        port=options.http_port,
        broker=options.broker,
        broker_password=options.broker_password_file,
        names=tuple(options.public_name),
        authority=(options.ca_cert, options.ca_key) if options.ca_cert is not None else None,
        public_brokers=tuple(options.public_broker),
        public_urls=tuple(options.public_url),
    )
    return reporting("hub", lambda: run_until_stopped(lambda: running_hub(settings)))


def publish(argv: Sequence[str]) -> int:
    """Upload a package folder and publish it."""
    parser = hub_parser("publish", "Upload a package folder and publish its version.")
    parser.add_argument("folder", type=Path, help="manifest.json, golden.npz and the variant files")
    options = parser.parse_args(argv)

    def run(client: HubClient) -> None:
        reference, uploaded = publish_folder(client, options.folder)
        print(f"published {reference} ({uploaded} files uploaded)")

    return speak("publish", options, run)


def packages(argv: Sequence[str]) -> int:
    """List published versions."""
    options = hub_parser("packages", "List published versions.").parse_args(argv)

    def run(client: HubClient) -> None:
        rows = [
            (f"{entry['package']}/{entry['version']}", ", ".join(entry["engines"]), _share(entry["accuracy"]))
            for entry in client.pages("/api/v1/packages")
        ]
        print_table(("PACKAGE", "VARIANTS", "ACCURACY"), rows)

    return speak("packages", options, run)


def deploy(argv: Sequence[str]) -> int:
    """Say which nodes serve which packages."""
    parser = hub_parser("deploy", "Say which nodes serve which packages under which model names.")
    parser.add_argument("name", help="of the deployment; an existing one is replaced")
    parser.add_argument("--tenant", default="*", help="default: every tenant")
    parser.add_argument("--select", action="append", default=[], type=pair, metavar="LABEL=VALUE")
    parser.add_argument("--model", action="append", required=True, type=pair, metavar="NAME=PACKAGE/VERSION")
    options = parser.parse_args(argv)

    def run(client: HubClient) -> None:
        body = {"tenant": options.tenant, "selector": dict(options.select), "models": dict(options.model)}
        answer = client.send("PUT", f"/api/v1/deployments/{quote(options.name, safe='')}", body)
        print(f"deployment {answer['name']} decides for {answer['progress']['total']} of the nodes known")
        if not answer["nodes"]:
            print("no node known matches: check --tenant and --select", file=sys.stderr)
        print_table(("NODE", "STATE", "REASON"), [(n["node"], n["sync"], n["reason"] or "") for n in answer["nodes"]])

    return speak("deploy", options, run)


def nodes(argv: Sequence[str]) -> int:
    """List nodes, or show one."""
    parser = hub_parser("nodes", "List nodes, or show one.")
    parser.add_argument("id", nargs="?")
    options = parser.parse_args(argv)

    def run(client: HubClient) -> None:
        if options.id:
            _print_node(client.get(f"/api/v1/nodes/{quote(options.id, safe='')}"))
            return
        rows = [
            (n["id"], n["tier"], n["state"] or "never seen", "yes" if n["in_sync"] else "no", pairs_text(n["running"]))
            for n in client.pages("/api/v1/nodes")
        ]
        print_table(("NODE", "TIER", "STATE", "IN SYNC", "RUNNING"), rows)

    return speak("nodes", options, run)


def node_add(argv: Sequence[str]) -> int:
    """Register a node and print its token."""
    parser = hub_parser("node-add", "Register a node. Its token is shown this once.")
    parser.add_argument("id", help="tenant.node")
    parser.add_argument("--tier", required=True, choices=("device", "edge", "cloud"))
    parser.add_argument("--label", action="append", default=[], type=pair, metavar="LABEL=VALUE")
    parser.add_argument("--group", action="append", default=[])
    parser.add_argument(
        "--token-out", type=Path, metavar="FILE", help="a new file for the token, mode 0600; default: print it"
    )
    options = parser.parse_args(argv)

    def run(client: HubClient) -> None:
        body = {"id": options.id, "tier": options.tier, "labels": dict(options.label), "groups": options.group}
        if options.token_out is None:
            print(client.send("POST", "/api/v1/nodes", body)["token"])
            return
        # Made first: a token that could not be written would be lost, and an older one must not be overwritten.
        with os.fdopen(os.open(options.token_out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            try:
                file.write(client.send("POST", "/api/v1/nodes", body)["token"])
            except BaseException:
                options.token_out.unlink()
                raise
        print(f"{options.id} is known; its token is in {options.token_out}")

    return speak("node-add", options, run)


def policy(argv: Sequence[str]) -> int:
    """Set a tenant's routing policy, or show it."""
    parser = hub_parser("policy", "Set a tenant's routing policy, or show it.")
    parser.add_argument("tenant")
    parser.add_argument("file", type=Path, nargs="?", help="JSON; absent = show the policy")
    options = parser.parse_args(argv)
    path = f"/api/v1/policies/{quote(options.tenant, safe='')}"

    def run(client: HubClient) -> None:
        if options.file is None:
            print(json.dumps(client.get(path)["policy"], indent=2))
            return
        with options.file.open("rb") as file:
            body = file.read(MAX_POLICY_FILE)
        answer = client.send("PUT", path, body)
        print(f"policy of {answer['tenant']} is revision {answer['revision']}")

    return speak("policy", options, run)


COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], int]]] = {
    "hub": ("run the hub: management API, files, documents", hub),
    "publish": ("upload a package folder and publish its version", publish),
    "packages": ("list published versions", packages),
    "deploy": ("say which nodes serve which packages", deploy),
    "nodes": ("list nodes, or show one", nodes),
    "node-add": ("register a node and print its token", node_add),
    "policy": ("set a tenant's routing policy, or show it", policy),
}


def main(command: str, argv: Sequence[str]) -> int:
    """Run one of `COMMANDS`."""
    return COMMANDS[command][1](argv)


def _print_node(node: dict[str, Any]) -> None:
    print(f"{node['id']}  tier {node['tier']}  {node['state'] or 'never seen'}  {pairs_text(node['labels'])}")
    rows = [
        (kind, str(entry["revision"]), str(entry["applied"]), entry["sync"], entry["error"] or "")
        for kind, entry in node["documents"].items()
    ]
    print_table(("DOCUMENT", "REVISION", "APPLIED", "STATE", "REASON"), rows)
    names = sorted({**node["desired"], **node["running"]})
    print_table(
        ("MODEL", "DESIRED", "RUNNING"), [(n, node["desired"].get(n, ""), node["running"].get(n, "")) for n in names]
    )


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"
