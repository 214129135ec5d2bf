"""`tierline hub enrol | revoke | decommission | denied | authority | doctor`: who may come in, said to a running hub."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from urllib.parse import quote

from cloud_hub.client import HubClient
from cloud_hub.command import hub_parser, pair, print_table, speak


def enrol(argv: Sequence[str]) -> int:
    """Print a token that lets one node in, once."""
    parser = hub_parser("hub enrol", "Print a token that lets one node in, once. It is shown this once.")
    parser.add_argument("id", help="tenant.node")
    parser.add_argument("--tier", required=True, choices=("device", "edge", "cloud"))
    parser.add_argument("--label", action="append", default=[], type=pair, metavar="LABEL=VALUE")
    parser.add_argument("--group", action="append", default=[])
    parser.add_argument(
        "--name", action="append", default=[], help="host name or address its certificate may also show"
    )
    parser.add_argument("--hardware", metavar="SERIAL", help="the only machine that may use the token")
    parser.add_argument("--hours", type=float, default=24.0, help="how long the token is good (default 24)")
    options = parser.parse_args(argv)

    def run(client: HubClient) -> None:
        body = {
            "id": options.id,
            "tier": options.tier,
            "labels": dict(options.label),
            "groups": options.group,
            "names": options.name,
            "hardware": options.hardware,
            "seconds": options.hours * 3600,
        }
        print(client.send("POST", "/api/v1/invitations", body)["token"])

    return speak("hub enrol", options, run)


def revoke(argv: Sequence[str]) -> int:
    """Refuse a node from now on."""
    parser = hub_parser("hub revoke", "Refuse a node from now on; its live connection ends within a minute.")
    parser.add_argument("id", help="tenant.node")
    parser.add_argument("--reason", default="revoked")
    options = parser.parse_args(argv)

    def run(client: HubClient) -> None:
        client.send("POST", f"/api/v1/nodes/{quote(options.id, safe='')}/revoke", {"reason": options.reason})
        print(f"{options.id} is refused; to let it in again: tierline hub enrol {options.id}")

    return speak("hub revoke", options, run)


def decommission(argv: Sequence[str]) -> int:
    """Revoke a node and delete what the hub knows of it."""
    parser = hub_parser("hub decommission", "Revoke a node and delete what the hub knows of it.")
    parser.add_argument("id", help="tenant.node")
    options = parser.parse_args(argv)

    def run(client: HubClient) -> None:
        client.send("DELETE", f"/api/v1/nodes/{quote(options.id, safe='')}", b"")
        print(f"{options.id} is forgotten")

    return speak("hub decommission", options, run)


def denied(argv: Sequence[str]) -> int:
    """List ids that are refused."""
    options = hub_parser("hub denied", "List ids that are refused.").parse_args(argv)

    def run(client: HubClient) -> None:
        print_table(("NODE", "REASON"), [(entry["id"], entry["reason"]) for entry in client.get("/api/v1/denied")])

    return speak("hub denied", options, run)


def authority(argv: Sequence[str]) -> int:
    """Show the certificate authorities, or roll over to the next one."""
    parser = hub_parser("hub authority", "Show the certificate authorities, or roll over to the next one.")
    parser.add_argument("action", nargs="?", choices=("show", "next", "switch", "retire"), default="show")
    parser.add_argument("number", nargs="?", type=int, help="of the authority to retire")
    parser.add_argument("--force", action="store_true", help="switch before nodes had time to hear of it")
    options = parser.parse_args(argv)
    if options.action == "retire" and options.number is None:
        parser.error("retire needs the number of an authority")

    def run(client: HubClient) -> None:
        path = "/api/v1/authority"
        if options.action == "show":
            found = client.get(path)
        elif options.action == "retire":
            found = client.send("POST", f"{path}/{options.number}/retire", {})
        else:
            body = {"force": options.force} if options.action == "switch" else {}
            found = client.send("POST", f"{path}/{options.action}", body)
        rows = [
            (str(entry["number"]), "yes" if entry["issuing"] else "", entry["fingerprint"], _day(entry["until"]))
            for entry in found
        ]
        print_table(("AUTHORITY", "ISSUES", "SHA256", "UNTIL"), rows)

    return speak("hub authority", options, run)


def _doctor(argv: Sequence[str]) -> int:
    from cloud_hub.doctor_cli import doctor

    return doctor(argv)


IDENTITY_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "enrol": enrol,
    "revoke": revoke,
    "decommission": decommission,
    "denied": denied,
    "authority": authority,
    "doctor": _doctor,
}


def _day(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).date().isoformat()
