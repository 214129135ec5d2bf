"""`tierline keys`: make, look at, rotate and withdraw the keys that nodes believe; sign a new root, also on another machine.

Whatever changes keys wants the hub stopped: it signs with what it read at its start. Nodes follow by themselves.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from sync.errors import SyncError

ROTATABLE = ("documents", "bins", "targets", "snapshot", "timestamp", "root-1", "root-2", "root-3")


def keys(argv: Sequence[str]) -> int:
    """Returns the exit code: 0 done, 1 refused, 2 wrong usage."""
    options = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except (SyncError, OSError) as error:
        print(f"tierline keys: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tierline keys", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.set_defaults(run=run)
        return made

    def data(made: argparse.ArgumentParser) -> None:
        made.add_argument("--data", type=Path, required=True, help="the hub's data folder")

    made = command("init", _init, "make every key and the first root metadata")
    data(made)
    made.add_argument("--offline", type=Path, metavar="DIR", help="where the three root keys go: a medium that leaves")
    made = command("status", _status, "which keys are here, what expires when, and what should be done")
    data(made)
    made.add_argument("--json", action="store_true", help="for programs")
    made = command("rotate", _rotate, "replace the key of a role; what the old one signed is signed again")
    data(made)
    made.add_argument("role", choices=ROTATABLE)
    made = command("renew-root", _renew_root, "prepare a new root with the same keys and a new expiry")
    data(made)
    made = command("sign", _sign, "add a signature to a prepared root; works on a machine without hub or network")
    made.add_argument("file", type=Path, help="the prepared root, e.g. root-next.json")
    made.add_argument("--root", type=Path, required=True, help="the root in force, e.g. root.json")
    made.add_argument("--key", type=Path, required=True, help="a root key, e.g. root-1.key")
    made = command("install", _install, "put a fully signed root in force")
    data(made)
    made.add_argument("file", type=Path)
    made = command("revoke", _revoke, "withdraw an envelope key: nothing it signs is accepted any more")
    data(made)
    made.add_argument("kid", help="as 'tierline keys status' shows it")
    made = command("reissue", _reissue, "after a restore of the data folder: sign all again above what nodes have seen")
    data(made)
    made = command("export-root", _export_root, "print the root metadata that nodes pin")
    data(made)
    return parser


def _init(options: argparse.Namespace) -> int:
    from cloud_hub import ceremony

    made = ceremony.init(options.data, options.offline)
    print(f"root metadata for nodes to pin: {made}")
    if options.offline is None:
        print("the root keys lie beside the others: move two of them to other machines before you rely on this hub")
    else:
        print(f"root keys: {options.offline}/root-1.key, root-2.key, root-3.key; keep them apart, two of three sign")
    return 0


def _status(options: argparse.Namespace) -> int:
    from cloud_hub import ceremony

    status = ceremony.status(options.data)
    if options.json:
        print(json.dumps(status.as_json()))
        return 0
    for line in status.roles:
        expires = (
            "" if line.expires is None else f"  expires {datetime.fromtimestamp(line.expires, UTC):%Y-%m-%d %H:%M}Z"
        )
        print(f"{line.role:<10} {line.needed} of {len(line.keys)}  here: {', '.join(line.here) or '-'}{expires}")
    for kid, kinds in status.documents:
        print(f"documents  {kid}  {', '.join(kinds)}")
    for problem in status.problems:
        print(f"! {problem}")
    return 0


def _rotate(options: argparse.Namespace) -> int:
    from cloud_hub import ceremony

    return _said(ceremony.rotate(options.data, options.role))


def _renew_root(options: argparse.Namespace) -> int:
    from cloud_hub import ceremony

    return _said(ceremony.renew_root(options.data))


def _sign(options: argparse.Namespace) -> int:
    from cloud_hub import ceremony

    wanted = ceremony.sign(options.file, options.root, options.key)
    print("fully signed" if wanted == 0 else f"signed; {wanted} more signature(s) of root keys are needed")
    return 0


def _install(options: argparse.Namespace) -> int:
    from cloud_hub import ceremony

    return _said(ceremony.install(options.data, options.file))


def _revoke(options: argparse.Namespace) -> int:
    from cloud_hub import ceremony

    return _said(ceremony.revoke(options.data, options.kid))


def _reissue(options: argparse.Namespace) -> int:
    from cloud_hub import ceremony

    return _said(ceremony.reissue(options.data))


def _export_root(options: argparse.Namespace) -> int:
    from cloud_hub.keys import root_path

    sys.stdout.write(root_path(options.data).read_text())
    return 0


def _said(lines: Sequence[str]) -> int:
    print("\n".join(lines))
    return 0
