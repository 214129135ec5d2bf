"""`tierline serve`: a folder of models behind the Open Inference Protocol, alone: no hub, no broker."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from models.errors import PackageError
from models.serving.folder import Models, load_folder
from models.serving.http.server import serve_http
from models.serving.local import Local
from models.serving.plane import DataPlane
from models.serving.process import port_number, run_until_stopped
from models.serving.repository import Repository
from models.serving.rest import RestHandler

TIER = "edge"


def serve(argv: Sequence[str]) -> int:
    """Serve until SIGINT or SIGTERM. Returns the exit code: 2 = wrong folder, address or options."""
    arguments = _parser().parse_args(argv)
    if not (arguments.insecure or _is_loopback(arguments.host)):
        return _refuse(
            f"{arguments.host} can be reached from other machines, and this server has neither TLS nor a token yet: "
            "anyone there could use its models. Use --host 127.0.0.1, or say --insecure if you mean it"
        )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        models, problems = load_folder(arguments.folder)
        for problem in problems:
            print(f"not served: {problem}", file=sys.stderr)
        return run_until_stopped(lambda: _serving(models, arguments.host, arguments.http_port))
    except (PackageError, OSError) as error:
        return _refuse(error.strerror if isinstance(error, OSError) and error.strerror else str(error))


@asynccontextmanager
async def _serving(models: Models, host: str, port: int) -> AsyncIterator[None]:
    repository = Repository()
    local = Local(repository, TIER)
    try:
        repository.install(models)
        handler = RestHandler(DataPlane(local, repository, ready=repository.is_settled))
        async with serve_http(handler, host=host, port=port) as server:
            for name in repository.names():
                known = repository.describe(name, None)
                print(f"{name}  version {', '.join(known.versions)}  {known.platform}")
            print(f"serving at {server.url}", flush=True)
            yield
    finally:
        await local.close()
        await repository.close()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tierline serve", description=__doc__)
    parser.add_argument(
        "folder", type=Path, metavar="DIR", help="models as DIR/<model>/<version>/model.onnx or model.tflite"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument(
        "--http-port", type=port_number, default=8000, help="port to listen on, 0 = any free one (default: 8000)"
    )
    parser.add_argument("--insecure", action="store_true", help="allow an address that other machines can reach")
    return parser


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
