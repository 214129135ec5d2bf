"""`tierline broker`: a broker on loopback that lets in whom the hub knows."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from deploy.broker import Broker, Secure
from deploy.follow import Follower
from deploy.processes import DeployError
from models.serving.process import port_number


def broker(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="tierline broker",
        description="Run an MQTT broker. On 127.0.0.1 it takes passwords, for the hub beside it and for evaluation; with "
        "--public-name it also listens for enrolled nodes, with TLS and certificates. It asks the hub whom to let in, every "
        "two seconds, as soon as the hub answers.",
    )
    parser.add_argument("folder", type=Path, help="where passwords, access list and retained messages are kept")
    parser.add_argument("--port", type=port_number, default=1883, help="default 1883")
    parser.add_argument("--hub", default=os.environ.get("TIERLINE_HUB", "http://127.0.0.1:8080"), metavar="URL")
    parser.add_argument("--token-file", type=Path, default=os.environ.get("TIERLINE_TOKEN_FILE"), metavar="FILE")
    parser.add_argument("--hub-ca", type=Path, metavar="FILE", help="whom an https hub is trusted by: its tls/ca.pem")
    parser.add_argument(
        "--public-name",
        action="append",
        default=[],
        metavar="NAME",
        help="host name or address by which nodes reach this broker; may be repeated",
    )
    parser.add_argument("--tls-port", type=port_number, default=8883, help="for enrolled nodes (default 8883)")
    parser.add_argument("--tls-bind", default="0.0.0.0", metavar="ADDRESS", help="default: every address")  # noqa: S104
    parser.add_argument(
        "--ws-port", type=port_number, help="MQTT over WebSocket with TLS, if mosquitto was built with it"
    )
    options = parser.parse_args(argv)
    if options.token_file is None:
        parser.error("--token-file (or TIERLINE_TOKEN_FILE) must name the hub's admin token; it may not exist yet")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    running: Broker | None = None
    try:
        secure = None
        if options.public_name:
            secure = Secure(tuple(options.public_name), options.tls_port, options.tls_bind, options.ws_port)
        running = Broker(options.folder, options.port, secure)
        follower = Follower(running, options.hub, Path(options.token_file), options.hub_ca)
        if secure is not None:
            follower.wait_for_certificate()
        running.start()
        print(
            f"{running.note}\nlistening on {running.url}\nthe hub's password is in {running.hub_password}", flush=True
        )
        if secure is not None:
            print(f"listening for enrolled nodes on port {secure.port} of {secure.bind}", flush=True)
        follower.follow()
    except KeyboardInterrupt:
        return 0
    except (DeployError, OSError) as error:
        print(f"tierline broker: {error}", file=sys.stderr)
        return 2
    finally:
        if running is not None:
            running.stop()
    return 1


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
