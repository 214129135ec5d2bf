"""`tierline broker`: a broker on loopback that lets in whom the hub knows."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import urllib3

from deploy.broker import Broker
from deploy.local import HubApi
from deploy.processes import DeployError
from models.serving.process import port_number

REFRESH_SECONDS = 2.0
"""How often the hub is asked whom it knows: a node that was just added waits at most this long."""


def broker(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="tierline broker",
        description="Run an MQTT broker on 127.0.0.1 for evaluation and for gateways of one machine. It asks the hub whom to "
        "let in, every two seconds, as soon as the hub answers.",
    )
    parser.add_argument("folder", type=Path, help="where passwords, access list and retained messages are kept")
    parser.add_argument("--port", type=port_number, default=1883, help="default 1883")
    parser.add_argument("--hub", default=os.environ.get("TIERLINE_HUB", "http://127.0.0.1:8080"), metavar="URL")
    parser.add_argument("--token-file", type=Path, default=os.environ.get("TIERLINE_TOKEN_FILE"), metavar="FILE")
    options = parser.parse_args(argv)
    if options.token_file is None:
        parser.error("--token-file (or TIERLINE_TOKEN_FILE) must name the hub's admin token; it may not exist yet")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    running: Broker | None = None
    try:
        running = Broker(options.folder, options.port)
        running.start()
        print(
            f"{running.note}\nlistening on {running.url}\nthe hub's password is in {running.hub_password}", flush=True
        )
        _follow(running, options.hub, Path(options.token_file))
    except KeyboardInterrupt:
        return 0
    except (DeployError, OSError) as error:
        print(f"tierline broker: {error}", file=sys.stderr)
        return 2
    finally:
        if running is not None:
            running.stop()
    return 1


def _follow(running: Broker, hub: str, token_file: Path) -> None:
    """Until the broker ends. A hub that is away changes nothing; what keeps it from answering is said once."""
    told = ""
    while running.alive:
        try:
            access = HubApi(hub, token_file.read_text().strip()).call("GET", "/api/v1/broker/access")
            running.admit(access["passwords"], access["acl"])
            trouble = ""
        except (OSError, ValueError, urllib3.exceptions.HTTPError, DeployError) as error:
            trouble = str(error)
        if bool(trouble) != bool(told):
            print(f"waiting for the hub: {trouble}" if trouble else "letting in whom the hub knows", flush=True)
        told = trouble
        time.sleep(REFRESH_SECONDS)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
