"""`tierline publish-software` and `tierline upgrade`: the nodes' own software, from the command line."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import file_digest
from pathlib import Path
from urllib.parse import quote

from cloud_hub.client import HubClient, HubError
from cloud_hub.command import hub_parser, pair, print_table, speak
from sync.errors import Malformed
from sync.software import Software, Wheel, encode_software, parse_wheel
from sync.version import DISTRIBUTION


def publish_software(argv: Sequence[str]) -> int:
    """Upload wheels and publish them as a version."""
    parser = hub_parser("publish-software", "Upload wheels and publish them as a version of the nodes' own software.")
    parser.add_argument(
        "wheels", nargs="+", type=Path, metavar="WHEEL", help="the project's own, and dependencies' wheels"
    )
    options = parser.parse_args(argv)

    def run(client: HubClient) -> None:
        software = software_of(options.wheels)
        for path, wheel in zip(options.wheels, software.wheels, strict=True):
            if not client.has_blob(wheel.digest):
                client.put_blob(wheel.digest, path)
        client.send("POST", "/api/v1/software", encode_software(software))
        print(f"published software {software.version} ({len(software.wheels)} wheels)")

    return speak("publish-software", options, run)


def upgrade(argv: Sequence[str]) -> int:
    """Say which nodes run which version; without a name, show it."""
    parser = hub_parser("upgrade", "Say which nodes run which version of the software, or show it.")
    parser.add_argument("name", nargs="?", help="of the target; an existing one is replaced")
    parser.add_argument("version", nargs="?")
    parser.add_argument("--tenant", default="*", help="default: every tenant")
    parser.add_argument("--select", action="append", default=[], type=pair, metavar="LABEL=VALUE")
    options = parser.parse_args(argv)
    if (options.name is None) != (options.version is None):
        parser.error("say a name and a version, or neither")

    def run(client: HubClient) -> None:
        if options.name is not None:
            body = {"tenant": options.tenant, "selector": dict(options.select), "version": options.version}
            client.send("PUT", f"/api/v1/software/targets/{quote(options.name, safe='')}", body)
        rows = [
            (each["name"], each["tenant"], " ".join(f"{k}={v}" for k, v in each["selector"].items()), each["version"])
            for each in client.get("/api/v1/software/targets")["items"]
        ]
        print_table(("TARGET", "TENANT", "NODES", "VERSION"), rows)

    return speak("upgrade", options, run)


def software_of(wheels: Sequence[Path]) -> Software:
    """What these files make together. Raises HubError when the project's own wheel is not among them, OSError."""
    found = []
    own = ""
    for path in wheels:
        try:
            distribution, version = parse_wheel(str(path), path.name)
        except Malformed as error:
            raise HubError(str(error)) from error
        if distribution == DISTRIBUTION:
            own = version
        with path.open("rb") as file:
            digest = f"sha256:{file_digest(file, 'sha256').hexdigest()}"
        found.append(Wheel(path.name, digest, path.stat().st_size))
    if not own:
        raise HubError(f"none of the wheels is {DISTRIBUTION}-<version>-...whl")
    return Software(own, tuple(found))
