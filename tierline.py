"""The front door: `tierline COMMAND`, and `from tierline import Client, AsyncClient`. Both are imported when asked for."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from models.client import AsyncClient, Client

__all__ = ["AsyncClient", "Client", "main"]

# command -> (where it lives, the extra it needs, what it does)
COMMANDS: dict[str, tuple[str, str, str]] = {
    "demo": ("deploy.demo:demo", "demo", "three tiers on this machine, from publishing a model to refusing a bad one"),
    "serve": ("models.cli:serve", "edge", "serve a folder of models, alone: no hub, no broker"),
    "model": ("models.profile_cli:model", "edge", "measure a model: its runs, its batches, where it will run"),
    "token": ("models.token_cli:token", "edge", "make keys, issue bearer tokens and look into them"),
    "broker": ("deploy.cli:broker", "hub", "run an MQTT broker on loopback that lets in whom the hub knows"),
    "hub": ("cloud_hub.cli:hub", "hub", "run the cloud hub"),
    "keys": ("cloud_hub.keys_cli:keys", "hub", "make, rotate and withdraw the keys that nodes believe"),
    "worker": ("cloud_hub.worker:worker", "hub", "run a cloud worker"),
    "edge": ("edge_node.cli:edge", "edge", "run an edge node"),
    "launch": ("deploy.launcher:launch", "edge", "run a node whose own software the hub may upgrade, and take back"),
    "hold": ("edge_node.hold_cli:hold", "edge", "ask an edge node of this machine not to activate updates now"),
    "release": ("edge_node.hold_cli:release", "edge", "end such a hold"),
    "updates": ("edge_node.hold_cli:updates", "edge", "show how the updates of an edge node of this machine stand"),
    "device": ("device_agent.cli:device", "device", "run a device agent on standard input and output"),
    "publish": ("cloud_hub.cli:publish", "hub", "publish a package folder to the hub"),
    "publish-software": (
        "cloud_hub.software_cli:publish_software",
        "hub",
        "publish a version of the nodes' own software",
    ),
    "upgrade": ("cloud_hub.software_cli:upgrade", "hub", "say which nodes run which version of the software"),
    "packages": ("cloud_hub.cli:packages", "hub", "list published packages"),
    "bundle": ("cloud_hub.bundle_cli:bundle", "edge", "carry updates in one file to nodes without a network"),
    "deploy": ("cloud_hub.cli:deploy", "hub", "say which nodes run which package"),
    "nodes": ("cloud_hub.cli:nodes", "hub", "list nodes: what they should run and what they do run"),
    "node-add": ("cloud_hub.cli:node_add", "hub", "make a node known and print its token"),
    "ledger": ("cloud_hub.ledger_cli:ledger", "edge", "whether every event of a node has a known end"),
    "policy": ("cloud_hub.cli:policy", "hub", "show or set a tenant's routing policy"),
    "doctor": (
        "tierline:doctor",
        "device",
        "check a node or a hub of this machine: what is wrong, and what to do",
    ),
    "support-bundle": (
        "tierline:support_bundle",
        "device",
        "write what somebody who helps needs to know into one file",
    ),
    "chaos": ("sync.chaos.cli:chaos", "edge", "cut, slow, break or stop something on purpose, to see what happens"),
}
# tier, or the hub -> (what makes its subject and its table of checks of a path, the extra it needs)
DOCTORS: dict[str, tuple[str, str]] = {
    "device": ("device_agent.doctor:device_doctor", "device"),
    "edge": ("edge_node.doctor:edge_doctor", "edge"),
    "cloud": ("cloud_hub.worker_doctor:worker_doctor", "hub"),
    "hub": ("cloud_hub.doctor:hub_doctor", "hub"),
}
FOUNDATIONS = ("cloud_hub", "edge_node", "device_agent", "sync", "models", "deploy")


def __getattr__(name: str) -> Any:
    # PEP 562: the command line must not pay for what a program imports.
    if name in __all__:
        return getattr(import_module("models.client"), name)
    raise AttributeError(f"module 'tierline' has no attribute {name!r}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 2 = the command line was wrong or something is not installed."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    command, *rest = arguments
    if command in ("--version", "version"):
        from importlib.metadata import version

        print(f"tierline {version('tierline')}")
        return 0
    if command not in COMMANDS:
        print(f"tierline: no command {command!r}{_nearest(command)}\n\n{_usage()}", file=sys.stderr)
        return 2
    # numpy's OpenBLAS starts a thread for every core, and they spin: 80 ms of processor time for nothing.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    return _load(command)(rest)


def doctor(argv: Sequence[str]) -> int:
    """`tierline doctor`; the tables of all tiers meet here alone."""
    from sync.doctor.cli import doctor

    return doctor(argv, DOCTORS)


def support_bundle(argv: Sequence[str]) -> int:
    """`tierline support-bundle`."""
    from sync.doctor.bundle import support_bundle

    return support_bundle(argv, DOCTORS)


def _load(command: str) -> Callable[[Sequence[str]], int]:
    target, extra, _ = COMMANDS[command]
    module, _, attribute = target.partition(":")
    try:
        return cast(Callable[[Sequence[str]], int], getattr(import_module(module), attribute))
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in FOUNDATIONS:
            raise
        raise SystemExit(f"tierline {command} needs '{missing}': pip install 'tierline[{extra}]'") from error


def _nearest(command: str) -> str:
    from difflib import get_close_matches

    matches = get_close_matches(command, COMMANDS, n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def _usage() -> str:
    width = max(len(name) for name in COMMANDS)
    lines = [f"  {name:<{width}}  {text}" for name, (_, _, text) in COMMANDS.items()]
    return "usage: tierline COMMAND [OPTIONS]      (tierline COMMAND --help for one command)\n\n" + "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
