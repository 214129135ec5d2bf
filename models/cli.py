"""`tierline serve`: a folder of models behind the Open Inference Protocol, alone: no hub, no broker."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from models.errors import TierlineError
from models.serving.assembly import MEGABYTE, Listening, Serving, Tls, caching, serving
from models.serving.folder_control import FolderControl, probing
from models.serving.local import Local
from models.serving.process import port_number, run_until_stopped
from models.serving.repository import Repository
from models.serving.sessions import open_session
from models.serving.verdicts import Verdicts

TIER = "edge"


def serve(argv: Sequence[str]) -> int:
    """Serve until SIGINT or SIGTERM. Returns the exit code: 2 = wrong folder, address or options."""
    arguments = _parser().parse_args(argv)
    if (arguments.tls_cert is None) != (arguments.tls_key is None):
        return _refuse("--tls-cert and --tls-key belong together")
    if arguments.client_ca is not None and arguments.tls_cert is None:
        return _refuse("--client-ca needs --tls-cert and --tls-key")
    if not (arguments.insecure or _is_loopback(arguments.host)):
        if arguments.access is None and arguments.client_ca is None:
            return _refuse(
                f"{arguments.host} can be reached from other machines, and nothing says who may use its models. "
                "Say so with --access FILE or --client-ca FILE, use --host 127.0.0.1, or say --insecure if you mean it"
            )
        if arguments.tls_cert is None:
            return _refuse(
                f"{arguments.host} can be reached from other machines, and tokens would travel unencrypted. "
                "Use --tls-cert and --tls-key, or say --insecure if you mean it"
            )
    if arguments.metrics_port is not None and not (arguments.insecure or _is_loopback(arguments.metrics_host)):
        return _refuse(
            f"--metrics-host {arguments.metrics_host} can be reached from other machines, and metrics and traces are open to "
            "whoever reaches them. Use --metrics-host 127.0.0.1, or say --insecure if you mean it"
        )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        return run_until_stopped(lambda: _serving(arguments))
    except (TierlineError, OSError, ImportError, ValueError) as error:
        return _refuse(error.strerror if isinstance(error, OSError) and error.strerror else str(error))


@asynccontextmanager
async def _serving(arguments: argparse.Namespace) -> AsyncIterator[Serving]:
    listening = _listening(arguments)
    budget = None if arguments.memory_budget is None else arguments.memory_budget * MEGABYTE
    repository = Repository(memory_budget=budget)
    control = FolderControl(
        repository,
        arguments.folder,
        poll=arguments.poll,
        probe=None if arguments.no_probe else probing(Verdicts(_verdicts(arguments.verdicts))),
        open_session=open_session,
        batching=not arguments.no_batching,
    )
    local = Local(repository, TIER, threads=arguments.threads, max_waiting=arguments.queue)
    try:
        for problem in await control.start():
            print(f"not served: {problem}", file=sys.stderr)
        async with (
            caching(listening, local, repository) as cache,
            serving(
                listening,
                cache,
                repository,
                tier=TIER,
                node="serve",
                local=local,
                cache=cache,
                ready=control.is_settled,
                control=control,
            ) as served,
        ):
            for what, address in served.addresses.items():
                print(f"serving at {address}" if what != "metrics" else f"metrics at {address}", flush=True)
            yield served
    finally:
        await control.close()
        await local.close()
        await repository.close()


def _listening(arguments: argparse.Namespace) -> Listening:
    tls = None
    if arguments.tls_cert is not None:
        tls = Tls(arguments.tls_cert, arguments.tls_key, arguments.client_ca, client_required=arguments.access is None)
    return Listening(
        host=arguments.host,
        port=arguments.http_port,
        grpc_port=arguments.grpc_port,
        metrics_port=arguments.metrics_port,
        metrics_host=arguments.metrics_host,
        unix=arguments.unix,
        access=arguments.access,
        tls=tls,
        cache_mb=arguments.cache_mb,
        cache_url=arguments.cache_url,
        jobs=None if _is_redis(arguments.jobs) else arguments.jobs and Path(arguments.jobs),
        jobs_url=arguments.jobs if _is_redis(arguments.jobs) else None,
        webhooks=tuple(arguments.webhook),
        webhook_secret_file=arguments.webhook_secret,
        origins=tuple(arguments.origin),
        otlp=arguments.otlp,
        trace_share=arguments.trace_share,
    )


def _is_redis(where: str | None) -> bool:
    return where is not None and where.startswith(("redis://", "rediss://", "unix://"))


def _verdicts(given: Path | None) -> Path:
    """Where it is remembered which files were tried: trying one takes a second, once."""
    if given is not None:
        return given
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tierline" / "verdicts"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tierline serve",
        description="Serve a folder of models over the Open Inference Protocol v2: HTTP, WebSocket, gRPC, Unix socket.",
    )
    parser.add_argument("folder", type=Path, help="FOLDER/<model>/<version>/model.onnx, .tflite, .pt2 or .pt")

    ports = parser.add_argument_group("where it answers")
    ports.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    ports.add_argument("--http-port", type=port_number, default=8000, help="0 = any free one (default: 8000)")
    ports.add_argument("--grpc-port", type=port_number, help="gRPC as well; usual: 8001 (default: off)")
    ports.add_argument("--metrics-port", type=port_number, help="Prometheus metrics; usual: 8002 (default: off)")
    ports.add_argument("--metrics-host", default="127.0.0.1", help="address of that port alone (default: 127.0.0.1)")
    ports.add_argument("--unix", type=Path, metavar="PATH", help="a Unix socket as well, for this user's programs")

    who = parser.add_argument_group("who may use it")
    who.add_argument("--access", type=Path, metavar="FILE", help="tokens, tenants, limits (see docs/access.md)")
    who.add_argument("--tls-cert", type=Path, metavar="FILE", help="certificate chain, PEM")
    who.add_argument("--tls-key", type=Path, metavar="FILE", help="its private key, PEM")
    who.add_argument("--client-ca", type=Path, metavar="FILE", help="who signs clients' certificates, PEM")
    who.add_argument("--origin", action="append", default=[], metavar="URL", help="web page whose scripts may ask")
    who.add_argument("--insecure", action="store_true", help="allow open addresses that other machines can reach")

    models = parser.add_argument_group("models")
    models.add_argument("--poll", type=_positive_seconds, metavar="SECONDS", help="look for changed files this often")
    models.add_argument("--memory-budget", type=_positive, metavar="MB", help="unload what was used least beyond this")
    models.add_argument("--no-batching", action="store_true", help="never run several requests together")
    models.add_argument("--no-probe", action="store_true", help="load files without trying them in a child first")
    models.add_argument("--verdicts", type=Path, metavar="DIR", help="where tried files are remembered")
    models.add_argument(
        "--threads", type=_positive, help="engine threads for long models (default: one per usable core)"
    )
    models.add_argument("--queue", type=_positive, default=256, help="requests that may wait for them (default: 256)")

    beside = parser.add_argument_group("beside inferring")
    beside.add_argument(
        "--cache-mb", type=_positive, default=64, help="results kept of models that opt in (default: 64)"
    )
    beside.add_argument("--cache-url", metavar="URL", help="share them through this Redis or Valkey")
    beside.add_argument("--jobs", metavar="FILE|URL", help="asynchronous inference, kept in this file or Redis")
    beside.add_argument(
        "--webhook", action="append", default=[], metavar="URL", help="targets below it may be told of jobs"
    )
    beside.add_argument("--webhook-secret", type=Path, metavar="FILE", help="signs what webhooks are sent")
    beside.add_argument("--otlp", metavar="URL", help="OpenTelemetry collector for sampled traces")
    beside.add_argument("--trace-share", type=float, default=0.01, help="of requests traced (default: 0.01)")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text[:9]) < 1_000_000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 999999")
    return int(text)


def _positive_seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 86_400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds up to a day")
    return seconds


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _refuse(message: str) -> int:
    print(f"tierline serve: {message}", file=sys.stderr)
    return 2
