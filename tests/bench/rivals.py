"""CPU per request, latency and start of other Python model servers beside ours: `python tests/bench/rivals.py [--venvs DIR]`.

Each is installed from its published package, at the version named in `RIVALS`, into an environment of its own under DIR, and
serves the same file through onnxruntime with one thread. Ours runs beside each of them, rounds in turn, with tokens, limits
and metrics on; none of the others has any of these. One that cannot be installed or started is reported and left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
# The writer of models is shared with the tests, which are no package; so are the stubs of our own protocol.
sys.path += [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
from asking import Question, binary, check, grpc, load_of, text  # noqa: E402
from costs import Pace, milli  # noqa: E402
from figures import Figure, brief, figure, from_json, machine, machine_line, print_figures  # noqa: E402
from launch import FAILURES, Desk, Tierline, free_port, started, stop_in_order  # noqa: E402
from measure import Load, burst, enough, latencies, pss_megabytes  # noqa: E402
from networks import Network, write_networks  # noqa: E402

CONNECTIONS = {"mlp": 32, "cnn": 8}
COLUMNS = ("cpu_us", "rate", "p50_us", "p99_us")
"""CPU and rate at `CONNECTIONS`, latency at one."""
OURS = "tierline"
INSTALL_SECONDS = 900
PEERS = Path(__file__).parent / "peers"
ONNXRUNTIME = "onnxruntime==1.32.0"


class Rival(NamedTuple):
    """`packages`: installed beside onnxruntime. `asks`: its protocols, the one that tells whether it is up first. `budget`: how
    many times our CPU its best protocol takes at least. `options`: more arguments of its service. `python`: the interpreter it
    needs, where it needs a certain one."""

    name: str
    service: str
    packages: tuple[str, ...]
    asks: Mapping[str, Callable[[Network], Question]]
    budget: float | None
    options: tuple[str, ...] = ()
    python: str = sys.executable


class Measured(NamedTuple):
    """One rival's one protocol, one model: its rounds and, of the same rounds, ours over REST and over gRPC (when it is gRPC).
    Each is a column's name -> a value per round."""

    rival: str
    protocol: str
    model: str
    theirs: dict[str, list[float]]
    ours: dict[str, list[float]]
    ours_grpc: dict[str, list[float]]


# --- what each of them speaks --------------------------------------------------------------------------------------------


def litserve_json(network: Network) -> Question:
    body = json.dumps({"x": network.x.ravel().tolist()}).encode()
    return Question(
        "/predict", ("content-type: application/json",), body, lambda _, body: _array(json.loads(body)["y"])
    )


def bentoml_json(network: Network) -> Question:
    body = json.dumps({"x": network.x.tolist()}).encode()
    return Question("/infer", ("content-type: application/json",), body, lambda _, body: _array(json.loads(body)))


def mosec_bytes(network: Network) -> Question:
    headers = ("content-type: application/octet-stream",)
    return Question("/inference", headers, network.x.tobytes(), lambda _, body: np.frombuffer(body, np.float32))


def _array(values: Any) -> Any:
    return np.array(values, np.float32)


RIVALS = (
    Rival(
        "MLServer 1.7.1",
        "mlserver_service.py",
        # uvloop: newer ones have no default event loop, which this release counts on.
        ("mlserver==1.7.1", "uvloop==0.21.0", ONNXRUNTIME),
        {"REST JSON": text, "gRPC": grpc},
        10,
    ),
    Rival(
        "KServe SDK 0.21.0",
        "kserve_service.py",
        ("kserve==0.21.0", ONNXRUNTIME),
        {"REST binary": binary, "gRPC": grpc},
        10,
    ),
    Rival(
        "pytriton 0.7.0",
        "pytriton_service.py",
        # It wants numpy below 2, which later builds of onnxruntime do not take.
        ("nvidia-pytriton==0.7.0", "numpy==1.26.4", "onnxruntime==1.20.1"),
        {"REST binary": binary, "gRPC": grpc},
        10,
        # Its Triton brings the interpreter of Debian 12 and fails beside any other's standard library.
        python="/usr/bin/python3.11",
    ),
    Rival("LitServe 0.2.19", "litserve_service.py", ("litserve==0.2.19", ONNXRUNTIME), {"JSON": litserve_json}, 20),
    Rival("BentoML 1.4.39", "bentoml_service.py", ("bentoml==1.4.39", ONNXRUNTIME), {"JSON": bentoml_json}, 30),
    Rival("mosec 0.9.8", "mosec_service.py", ("mosec==0.9.8", ONNXRUNTIME), {"bytes": mosec_bytes}, None, ("1",)),
    Rival(
        "mosec 0.9.8, batches of 32 within 2 ms",
        "mosec_service.py",
        ("mosec==0.9.8", ONNXRUNTIME),
        {"bytes": mosec_bytes},
        1.2,
        ("32",),
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--venvs", type=Path, default=ROOT / "build" / "peers", metavar="DIR", help="environments, kept"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these servers, by the beginning of their names")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.5, help="of one burst (default: 1.5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    arguments = parser.parse_args()
    if shutil.which("h2load") is None:
        print("this benchmark needs h2load (Debian, Ubuntu: apt install nghttp2-client)", file=sys.stderr)
        return 2
    only = tuple(name.lower() for name in arguments.only or ("",))
    rivals = [rival for rival in RIVALS if rival.name.lower().startswith(only)]
    results = run(rivals, arguments.venvs.resolve(), Pace(arguments.rounds, arguments.seconds))
    if results["figures"]:
        print_figures([from_json(data) for data in results["figures"]])
    for name, reason in results["left_out"].items():
        print(f"left out: {name}: {brief(reason)}")
    print(f"took {results['seconds']:.0f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


def run(rivals: Sequence[Rival], venvs: Path, pace: Pace) -> dict[str, Any]:
    left_out: dict[str, str] = {}
    ready: list[tuple[Rival, Path]] = []
    for rival in rivals:
        try:
            ready.append((rival, install(rival, venvs)))
        except (subprocess.SubprocessError, OSError) as error:
            left_out[rival.name] = f"could not be installed ({error})"
    about, begun = machine(), time.monotonic()
    print(machine_line(about), flush=True)
    measured: list[Measured] = []
    starts: dict[str, dict[str, float]] = {}
    cold: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        desk, models = Desk(Path(folder)), Path(folder) / "models"
        networks = write_networks(models, list(CONNECTIONS))
        for rival, python in ready:
            print(f"measuring {rival.name} ...", file=sys.stderr, flush=True)
            try:
                for network in networks.values():
                    with desk.serve(models, networks["mlp"]) as ours:
                        cold.append(ours.running.cold_seconds)
                        found, start = beside(ours, rival, python, network, Path(folder), pace)
                    measured += found
                    starts.setdefault(rival.name, start)
            except FAILURES as error:
                left_out[rival.name] = f"{type(error).__name__}: {error}"
    if cold:
        starts[OURS] = {"cold_start_s": round(median(cold), 2)}
    return {
        "machine": about,
        "rounds": pace.rounds,
        "seconds": round(time.monotonic() - begun, 1),
        "figures": [each.as_json() for each in figures_of(measured, starts)],
        "table": [each._asdict() for each in measured],
        "starts": starts,
        "left_out": left_out,
    }


def install(rival: Rival, venvs: Path) -> Path:
    """The Python of an environment that has exactly what `rival` names; made when there is none. Raises SubprocessError."""
    name = rival.service.removesuffix("_service.py")
    venv = venvs / f"{name}-{hashlib.sha256(' '.join(rival.packages).encode()).hexdigest()[:8]}"
    python, done = venv / "bin" / "python", venv / "installed"
    if not done.exists():
        print(f"installing {', '.join(rival.packages)}", file=sys.stderr, flush=True)
        # Without a pip of its own: a distribution's Python may lack the module that would put one there.
        _run([rival.python, "-m", "venv", "--clear", "--without-pip", str(venv)])
        pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
        _run([*pip, "install", "--quiet", *rival.packages])
        done.touch()
    return python


def _run(command: Sequence[str]) -> None:
    """Raises SubprocessError or OSError; what the command said is shown only then."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False)
    if done.returncode:
        raise subprocess.SubprocessError(f"{' '.join(command[:4])}: {done.stderr.strip()[-300:]}")


def beside(
    ours: Tierline, rival: Rival, python: Path, network: Network, folder: Path, pace: Pace
) -> tuple[list[Measured], dict[str, Any]]:
    """Rounds of ours and the rival's in turn, for each of its protocols; how it started and what memory it takes."""
    http, rpc = free_port(), free_port()
    own = Path(tempfile.mkdtemp(dir=folder))
    command = [python, PEERS / rival.service, network.name, network.path, str(http), str(rpc), own, *rival.options]
    questions = {protocol: make(network) for protocol, make in rival.asks.items()}
    first = next(iter(questions.values()))
    measured = []
    with started(command, lambda: check(first, network, http), env={"PYTHONWARNINGS": "ignore"}) as running:
        for protocol, question in questions.items():
            load = load_of(question, network, rpc if question.http2 else http)
            sides = [(running.pid, load), (ours.pid, ours.load(binary, network))]
            if question.http2:
                sides.append((ours.pid, ours.load(grpc, network)))
            theirs, rest, *more = _in_turn(sides, network.name, pace)
            measured.append(Measured(rival.name, protocol, network.name, theirs, rest, more[0] if more else {}))
        start = {"cold_start_s": round(running.cold_seconds, 2), "pss_mb": round(pss_megabytes(running.pid), 1)}
    return measured, start


def _in_turn(sides: Sequence[tuple[int, Load]], model: str, pace: Pace) -> list[dict[str, list[float]]]:
    connections = CONNECTIONS[model]
    many = [enough(load, connections=connections, seconds=pace.seconds) for _, load in sides]
    one = [enough(load, connections=1, seconds=pace.seconds / 2) for _, load in sides]
    found: list[dict[str, list[float]]] = [{name: [] for name in COLUMNS} for _ in sides]
    for _ in range(pace.rounds):
        for number, (pid, load) in enumerate(sides):
            closed = burst(pid, load, connections=connections, requests=many[number])
            times = latencies(load, requests=one[number])
            for name, value in zip(COLUMNS, (closed.server_us, closed.rate, *times), strict=True):
                found[number][name].append(round(value, 1))
    return found


# --- what it says --------------------------------------------------------------------------------------------------------


def figures_of(measured: Sequence[Measured], starts: Mapping[str, Mapping[str, float]]) -> list[Figure]:
    """`starts`: of each rival, and of ours under its name."""
    found: list[Figure] = []
    budgets = {rival.name: rival.budget for rival in RIVALS}
    for rival in dict.fromkeys(each.rival for each in measured):
        own = [each for each in measured if each.rival == rival]
        best = min((each for each in own if each.model == "mlp"), key=lambda each: median(each.theirs["cpu_us"]))
        for each in own:
            found.append(_ratio(each, each.ours, "our REST", budgets[rival] if each is best else None))
            if each.ours_grpc:
                found.append(_ratio(each, each.ours_grpc, "our gRPC", None))
        found += _start_figures(rival, starts)
    return found + _grpc_figures(measured)


def _ratio(each: Measured, ours: Mapping[str, list[float]], what: str, budget: float | None) -> Figure:
    ratios = [theirs / mine for theirs, mine in zip(each.theirs["cpu_us"], ours["cpu_us"], strict=True)]
    note = f"{median(each.theirs['cpu_us']):.0f} us, {what} {median(ours['cpu_us']):.1f}"
    return figure(
        2, f"{each.rival}, {each.protocol}, {each.model} / {what}", ratios, "x", budget, most=False, note=note
    )


def _start_figures(rival: str, starts: Mapping[str, Mapping[str, float]]) -> list[Figure]:
    theirs, ours = starts[rival], starts[OURS]
    ratio = theirs["cold_start_s"] / ours["cold_start_s"]
    note = f"{theirs['cold_start_s']} s, ours {ours['cold_start_s']}"
    budget = 5.0 if rival.startswith("MLServer") else None
    return [
        figure(8, f"{rival}: cold start, as a multiple of ours", [ratio], "x", budget, most=False, note=note),
        figure(9, f"{rival}: PSS with one model", [theirs["pss_mb"]], "MB"),
    ]


def _grpc_figures(measured: Sequence[Measured]) -> list[Figure]:
    for each in measured:
        if each.rival.startswith("KServe") and each.ours_grpc and each.model == "mlp":
            budget = median(each.theirs["p50_us"]) / 1e3
            return [
                figure(4, "gRPC, mlp: our p50, beside KServe SDK's", milli(each.ours_grpc["p50_us"]), "ms", budget),
                figure(4, "gRPC, mlp: KServe SDK's p50 in the same rounds", milli(each.theirs["p50_us"]), "ms"),
            ]
    return []


if __name__ == "__main__":
    stop_in_order()
    raise SystemExit(main())
