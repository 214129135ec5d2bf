"""`tierline chaos FAULT ...`: one fault, for a while, with a line of JSON per event.

Exit code: 0 the fault fired and is over; 2 the command line was wrong or something did not start; 3 the fault never fired;
4 this machine cannot do it. A script can therefore not mistake a test without its fault for one that passed.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import FrameType

from sync.chaos import cli_processes as processes
from sync.chaos.disk import Unsupported
from sync.chaos.events import say
from sync.chaos.faults import (
    BlackHole,
    Corrupt,
    Drip,
    Fault,
    HalfOpen,
    Lag,
    LinkCut,
    NeverFired,
    Reset,
)
from sync.chaos.http_faults import Answer503, SlowBody
from sync.chaos.proxy import Proxy, host_port
from sync.chaos.units import FOREVER, seconds, signed_seconds, size

FIRED, WRONG, NEVER_FIRED, UNSUPPORTED = 0, 2, 3, 4

Options = argparse.Namespace
NETWORK: dict[str, tuple[Callable[[Options], Fault], str]] = {
    "link-cut": (lambda given: LinkCut(given.direction), "nothing passes, nobody is told; what was sent arrives later"),
    "lag": (lambda given: Lag(given.delay, given.jitter, given.direction), "everything arrives later"),
    "drip": (lambda given: Drip(given.rate, given.direction), "so many bytes per second and connection"),
    "half-open": (lambda given: HalfOpen(given.direction), "accepts, swallows, never answers"),
    "black-hole": (lambda given: BlackHole(given.accept), "not even the handshake is answered"),
    "reset": (lambda given: Reset(), "connections are reset"),
    "corrupt": (lambda given: Corrupt(given.every, given.direction), "bytes arrive as other bytes"),
    "cloud-503": (lambda given: Answer503(given.share, given.retry_after), "HTTP requests are answered 503"),
    "slow-body": (lambda given: SlowBody(given.rate), "bodies of HTTP answers drip, their heads do not"),
}
PROCESS: dict[str, tuple[Callable[[Options], None], str]] = {
    "pause": (processes.pause, "a process stands still"),
    "kill": (processes.kill, "kill -9 of a process"),
    "broker-restart": (processes.restart, "a command is killed, stays away, and is started again"),
    "clock-jump": (processes.clock_jump, "a command's clock is wrong for a while"),
    "disk-full": (processes.disk_full, "a command's disk is full for a while"),
}


def chaos(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    try:
        if options.fault in NETWORK:
            asyncio.run(_proxy(options))
        else:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, _interrupt)
            PROCESS[options.fault][0](options)
    except NeverFired as error:
        say("fault never fired", fault=options.fault, why=str(error))
        return NEVER_FIRED
    except Unsupported as error:
        say("not possible here", fault=options.fault, why=str(error))
        return UNSUPPORTED
    except KeyboardInterrupt:
        say("interrupted", fault=options.fault)
        return NEVER_FIRED
    except (OSError, ValueError) as error:
        print(f"tierline chaos {options.fault}: {error}", file=sys.stderr)
        return WRONG
    return FIRED


async def _proxy(options: Options) -> None:
    """A signal ends the calm or the fault early. Raises NeverFired, OSError."""
    fault = NETWORK[options.fault][0](options)
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with Proxy(options.to, listen=options.listen, seed=options.seed, tell=_tell) as proxy:
        host, port = proxy.address
        say("listening", listen=f"{host}:{port}", to=options.to, fault=fault.name)
        await _wait(stop, options.after)
        if not stop.is_set():
            await proxy.begin(fault)
            await _wait(stop, options.duration)
            await proxy.end()
        fault.insist()
        await _wait(stop, options.then)


async def _wait(stop: asyncio.Event, duration: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(None if duration == FOREVER else duration):
            await stop.wait()


def _tell(event: Mapping[str, object]) -> None:
    say(**dict(event))  # type: ignore[arg-type]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tierline chaos", description=__doc__)
    commands = parser.add_subparsers(dest="fault", required=True, metavar="FAULT")
    for name, (_, text) in NETWORK.items():
        _network_options(name, commands.add_parser(name, help=text, description=text))
    for name, (_, text) in PROCESS.items():
        _process_options(name, commands.add_parser(name, help=text, description=text))
    return parser


def _network_options(name: str, parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", required=True, type=_address, metavar="HOST:PORT", help="the server behind the proxy")
    parser.add_argument(
        "--listen", default="127.0.0.1:0", type=_address, metavar="HOST:PORT", help="default 127.0.0.1:0, a free port"
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything random; default 0")
    _times(parser)
    if name in ("link-cut", "lag", "drip", "half-open", "corrupt"):
        parser.add_argument(
            "--direction", choices=("both", "up", "down"), default="both", help="up = client to server; default both"
        )
    if name == "lag":
        parser.add_argument("--delay", type=seconds, default=0.2, metavar="TIME", help="default 200ms")
        parser.add_argument(
            "--jitter", type=seconds, default=0.0, metavar="TIME", help="up to that much more; default 0s"
        )
    if name in ("drip", "slow-body"):
        parser.add_argument("--rate", type=float, default=1_000.0, metavar="BYTES", help="per second; default 1000")
    if name == "black-hole":
        parser.add_argument("--accept", action="store_true", help="answer the handshake, and nothing after it")
    if name == "corrupt":
        parser.add_argument("--every", type=int, default=1_000, metavar="BYTES", help="one in so many; default 1000")
    if name == "cloud-503":
        parser.add_argument("--share", type=float, default=1.0, help="of requests, 0 to 1; default 1")
        parser.add_argument("--retry-after", type=int, metavar="SECONDS", help="header of that name; default none")


def _process_options(name: str, parser: argparse.ArgumentParser) -> None:
    _times(parser)
    if name in ("pause", "kill"):
        parser.add_argument("--pid", type=int, required=True, help="of a process of yours")
        return
    parser.add_argument("command", nargs="+", metavar="-- COMMAND", help="the command to run, after --")
    if name == "clock-jump":
        parser.add_argument(
            "--by", type=signed_seconds, required=True, metavar="TIME", help="such as 400d; --by=-2h for back"
        )
        parser.add_argument(
            "--hook", action="store_true", help="use Tierline's own clock hook even where libfaketime is installed"
        )
    if name == "disk-full":
        parser.add_argument(
            "--folder", required=True, help="the command's data; it works on a copy that vanishes at the end"
        )
        parser.add_argument("--size", type=size, default=64 << 20, help="of the disk; default 64M")


def _times(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--after", type=seconds, default=0.0, metavar="TIME", help="calm before; default 0s")
    parser.add_argument(
        "--for", dest="duration", type=seconds, default=10.0, metavar="TIME", help="how long it is on; default 10s"
    )
    parser.add_argument("--then", type=seconds, default=0.0, metavar="TIME", help="calm after, or forever; default 0s")


def _address(text: str) -> str:
    host_port(text)
    return text


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
