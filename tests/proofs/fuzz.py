"""Malformed requests over every transport: `python tests/proofs/fuzz.py` sends 12,000 and prints what became of them.

Seeded and bounded. What must hold: the server lives, none is answered with 500, INTERNAL or UNKNOWN, none hangs, refusals say
why in the protocol's form, good requests in between are answered correctly, and memory and descriptors go back to their level.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from onnx_writer import identity_model, sum_model
from proofs import malformed
from proofs.attack import TRANSPORTS, Attack
from proofs.server import Server, serving
from proofs.sockets import (
    HANG_SECONDS,
    Broken,
    Hang,
    answers,
    connect,
    read_to_end,
)

WARM_UP = 0.3
"""Share of the requests after which memory counts as settled: by then every kind has come many times."""
GOOD_EVERY = 200
MEMORY_GROWTH = 0.05
BOMBS = 12
HALF_OPEN = 40
"""Connections that are opened, say half a request, and stay."""
DRIPS = 4
"""Good requests that arrive byte by byte while the others are sent; each must be answered."""
DRIP_SECONDS = 0.01

GRPC_ENDED = ("the gRPC server has ended by itself", "asyncio: Task exception was never retrieved")
"""What the log says when a path that is not text ends grpcio's server (docs/known-flaws.md): counted, no failure of the run."""


def drip(server: Server, problems: list[dict[str, str]]) -> None:
    """A good request, byte by byte."""
    data = malformed.good_http()
    with connect(server.http) as link:
        try:
            for index in range(len(data)):
                link.sendall(data[index : index + 1])
                time.sleep(DRIP_SECONDS)
            link.shutdown(socket.SHUT_WR)
            found = answers(read_to_end(link))
        except (OSError, Hang, Broken) as error:
            found = []
            problems.append({"transport": "tcp", "problem": f"a slow request: {error}", "request": ""})
    if [answer.status for answer in found] != [200]:
        problems.append({"transport": "tcp", "problem": f"a slow request got {found}", "request": ""})


def half_open(server: Server, rng: random.Random) -> list[socket.socket]:
    """Connections that began a request and say nothing more."""
    kept = []
    for index in range(HALF_OPEN):
        link = connect(server.addresses["unix"] if index % 4 == 0 else server.http)
        data = malformed.good_http()
        link.sendall(data[: rng.randrange(len(data))])
        kept.append(link)
    return kept


def write_models(folder: Path) -> None:
    sum_model(folder / "sum" / "1" / "model.onnx")
    sum_model(folder / malformed.VICTIM / "1" / "model.onnx")
    for datatype in ("FP32", "INT8", "BYTES", "BOOL", "FP16"):
        identity_model(folder / f"identity_{datatype}" / "1" / "model.onnx", datatype, ("n", 4))


def run(
    folder: Path, *, seed: int, count: int, bombs: int = BOMBS, measure: bool = True, without: Sequence[str] = ()
) -> dict[str, Any]:
    """`folder`: an empty one to work in. `measure`: also compare memory, which takes some seconds of quiet."""
    write_models(folder / "models")
    start = time.monotonic()
    options = ("--unix", str(folder / "s"), "--verdicts", str(folder / "verdicts"))
    with serving(folder / "models", *options) as server:
        fuzz = Attack(server, seed, without)
        fuzz.check_good()
        descriptors = server.descriptors()
        settled = 0
        open_links = half_open(server, fuzz.rng)
        drips = [threading.Thread(target=drip, args=(server, fuzz.problems)) for _ in range(DRIPS)]
        for thread in drips:
            thread.start()
        first = int(count * WARM_UP)
        every = max((count - first) // max(bombs, 1), 1)
        for number in range(count):
            if number == first and measure:
                settled = server.resident_settled()
            # None before memory was measured: what the first one leaves behind must not pass for the level.
            if bombs and number > first and (number - first) % every == every // 4:
                fuzz.bomb()
            else:
                fuzz.one()
            if not server.is_alive():
                break
            if number % GOOD_EVERY == 0:
                fuzz.check_good()
        for thread in drips:
            thread.join(4 * HANG_SECONDS)
        for link in open_links:
            link.close()
        alive = server.is_alive()
        if alive:
            fuzz.check_good()
        else:
            fuzz.problem("all", f"the server ended with code {server.process.returncode}", b"")
            fuzz.problems += fuzz.latest
        ended = server.resident_settled() if alive and measure else 0
        left = server.descriptors_settled(descriptors) if alive else 0
        said = server.complaints()
        complaints = [line for line in said if not any(each in line for each in GRPC_ENDED)]
        fuzz.close()
    return {
        "seed": seed,
        "seconds": round(time.monotonic() - start, 1),
        "load_average": os.getloadavg()[0],
        "requests": sum(fuzz.sent.values()),
        "by_transport": dict(fuzz.sent),
        "outcomes": {name: dict(counts.most_common()) for name, counts in fuzz.outcomes.items()},
        "good_checks": fuzz.good,
        "slowest_seconds": round(fuzz.slowest, 3),
        "alive": alive,
        "settled_mb": round(settled / 1e6, 1),
        "ended_mb": round(ended / 1e6, 1),
        "growth": round(ended / settled - 1, 4) if settled else None,
        "descriptors": {"before": descriptors, "after": left},
        "grpc_restarts": sum(GRPC_ENDED[0] in line for line in said),
        "complaints": complaints[:20],
        "problems": fuzz.problems,
    }


def verdict(result: dict[str, Any]) -> list[str]:
    """What of the promise does not hold, [] = it holds."""
    broken = [f"{len(result['problems'])} problems"] if result["problems"] else []
    if not result["alive"]:
        broken.append("the server died")
    if result["complaints"]:
        broken.append("the server's log tells of failures that nobody expected")
    if result["slowest_seconds"] > HANG_SECONDS:
        broken.append(f"a request took {result['slowest_seconds']} s")
    if result["growth"] is not None and result["growth"] > MEMORY_GROWTH:
        broken.append(f"memory grew by {result['growth']:.1%}")
    if result["descriptors"]["after"] > result["descriptors"]["before"]:
        broken.append("descriptors were left open")
    return broken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=12_000)
    parser.add_argument("--bombs", type=int, default=BOMBS, help=f"compression bombs among them (default: {BOMBS})")
    parser.add_argument(
        "--without", action="append", default=[], choices=list(TRANSPORTS), help="leave a transport out"
    )
    parser.add_argument("--json", type=Path, help="write the result here as well")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        result = run(
            Path(place),
            seed=arguments.seed,
            count=arguments.count,
            bombs=arguments.bombs,
            without=arguments.without,
        )
    text = json.dumps(result, indent=1)
    if arguments.json is not None:
        arguments.json.write_text(text)
    print(text)
    broken = verdict(result)
    print(
        "; ".join(broken)
        or f"{result['requests']} malformed requests: no death, no hang, no 500; memory {result['growth']:+.1%}"
    )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
