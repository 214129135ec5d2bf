"""Rows 1, 4, 8 and 9: what a request costs, what it adds, how fast a server starts and how much memory it takes."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import onnxruntime
from asking import binary, check, grpc, text
from figures import Figure, figure
from launch import ROOT, Desk, free_port, started
from measure import Burst, Load, Times, burst, enough, latencies, pss_megabytes, quantiles
from networks import Network, open_session

CONNECTIONS = 32
GUARDED = "tierline REST binary"
SWAPS = ROOT / "tests" / "bench" / "swaps.py"
SWAP_SECONDS = 150


class Pace(NamedTuple):
    """How thoroughly. `seconds`: of one burst. `swaps`, `cycles`: hot swaps and load/unload cycles."""

    rounds: int
    seconds: float
    swaps: int = 0
    cycles: int = 0


class Subject(NamedTuple):
    """A way to ask a running server."""

    name: str
    pid: int
    load: Load
    network: str


def measure_costs(desk: Desk, models: Path, networks: Mapping[str, Network], pace: Pace) -> tuple[list[Figure], Any]:
    """Rows 1, 4 and 9, and a table with everything that was measured for them."""
    mlp, cnn = networks["mlp"], networks["cnn"]
    with ExitStack() as stack:
        ours = stack.enter_context(desk.serve(models, mlp))
        before = pss_megabytes(ours.pid)
        plain = stack.enter_context(desk.serve(models, mlp, guarded=False))
        port = free_port()
        command = [sys.executable, ROOT / "tests" / "bench" / "fastapi_baseline.py", "mlp", mlp.path, str(port)]
        fastapi = stack.enter_context(started(command, lambda: check(text(mlp), mlp, port)))
        subjects = [
            Subject(GUARDED, ours.pid, ours.load(binary, mlp), "mlp"),
            Subject("tierline REST binary, Unix socket", ours.pid, ours.load(binary, mlp, over_unix=True), "mlp"),
            Subject("tierline REST JSON", ours.pid, ours.load(text, mlp), "mlp"),
            Subject("tierline gRPC", ours.pid, ours.load(grpc, mlp), "mlp"),
            Subject("tierline REST binary, open", plain.pid, plain.load(binary, mlp), "mlp"),
            Subject("FastAPI JSON", fastapi.pid, ask_fastapi(mlp, port), "mlp"),
            Subject("tierline REST binary, cnn", ours.pid, ours.load(binary, cnn), "cnn"),
            Subject("tierline gRPC, cnn", ours.pid, ours.load(grpc, cnn), "cnn"),
        ]
        table = measure_subjects(subjects, networks, pace)
        memory = pss_megabytes(ours.pid)
        for subject in subjects:
            table[subject.name]["pss_mb"] = round(pss_megabytes(subject.pid), 1)
        table["FastAPI JSON"]["cold_start_s"] = round(fastapi.cold_seconds, 2)
    return [*_cost_figures(table), *_latency_figures(table), *_memory_figures(before, memory)], table


def ask_fastapi(network: Network, port: int) -> Load:
    question = text(network)
    length = check(question, network, port)
    return Load(f"http://127.0.0.1:{port}{question.path}", question.headers, question.body, answer_bytes=length)


def measure_subjects(subjects: list[Subject], networks: Mapping[str, Network], pace: Pace) -> dict[str, dict[str, Any]]:
    """CPU and rate at 32 connections, latency at one, of every subject in turn; beside it raw onnxruntime."""
    many = {each.name: enough(each.load, connections=CONNECTIONS, seconds=pace.seconds) for each in subjects}
    one = {each.name: enough(each.load, connections=1, seconds=pace.seconds / 2) for each in subjects}
    bursts: dict[str, list[Burst]] = {each.name: [] for each in subjects}
    single: dict[str, list[Times]] = {each.name: [] for each in subjects}
    added: dict[str, list[float]] = {each.name: [] for each in subjects}
    raw: dict[str, list[Times]] = {name: [] for name in networks}
    sessions = {name: (open_session(network.path), network) for name, network in networks.items()}
    for _ in range(pace.rounds):
        for name, (session, network) in sessions.items():
            raw[name].append(run_raw(session, network, pace.seconds / 4))
        for each in subjects:
            bursts[each.name].append(burst(each.pid, each.load, connections=CONNECTIONS, requests=many[each.name]))
            times = latencies(each.load, requests=one[each.name])
            single[each.name].append(times)
            added[each.name].append(times.p50 - raw[each.network][-1].p50)
    table: dict[str, dict[str, Any]] = {
        f"onnxruntime in process, {name}": {"cpu_us": [round(each.p50, 2) for each in rounds]}
        for name, rounds in raw.items()
    }
    for each in subjects:
        table[each.name] = {
            "cpu_us": [round(one.server_us, 2) for one in bursts[each.name]],
            "rate": [round(one.rate) for one in bursts[each.name]],
            "p50_us": [one.p50 for one in single[each.name]],
            "p99_us": [one.p99 for one in single[each.name]],
            "added_us": [round(one, 1) for one in added[each.name]],
        }
    return table


def run_raw(session: onnxruntime.InferenceSession, network: Network, seconds: float) -> Times:
    """Microseconds of one run in this process, which does nothing else."""
    feed, durations, ends = {"x": network.x}, [], time.perf_counter() + seconds
    while (start := time.perf_counter()) < ends:
        session.run(["y"], feed)
        durations.append((time.perf_counter() - start) * 1e6)
    return quantiles(durations)


def _cost_figures(table: Mapping[str, Any]) -> list[Figure]:
    budgets = {GUARDED: 35.0}
    names = [name for name in table if not name.endswith("cnn")]
    found = [figure(1, name, table[name]["cpu_us"], "us", budgets.get(name)) for name in names]
    ratios = [
        theirs / ours for theirs, ours in zip(table["FastAPI JSON"]["cpu_us"], table[GUARDED]["cpu_us"], strict=True)
    ]
    return [*found, figure(1, "FastAPI JSON as a multiple of tierline REST binary", ratios, "x")]


def _latency_figures(table: Mapping[str, Any]) -> list[Figure]:
    cnn = table["tierline REST binary, cnn"]
    return [
        figure(4, "REST binary, mlp: p50 added to the raw run", milli(table[GUARDED]["added_us"]), "ms", 0.15),
        figure(4, "REST binary, 110 KB tensor (cnn): p50 added", milli(cnn["added_us"]), "ms", 0.25),
        figure(4, "REST binary, mlp: p99", milli(table[GUARDED]["p99_us"]), "ms", 0.5),
        figure(4, "gRPC, mlp: p50", milli(table["tierline gRPC"]["p50_us"]), "ms", 0.6),
        figure(4, "gRPC, mlp: p99", milli(table["tierline gRPC"]["p99_us"]), "ms"),
        figure(4, "gRPC, 110 KB tensor (cnn): p50 added", milli(table["tierline gRPC, cnn"]["added_us"]), "ms"),
        figure(4, "REST JSON, mlp: p50", milli(table["tierline REST JSON"]["p50_us"]), "ms"),
        figure(4, "REST binary over a Unix socket, mlp: p50", milli(table[f"{GUARDED}, Unix socket"]["p50_us"]), "ms"),
        figure(4, "FastAPI JSON, mlp: p50", milli(table["FastAPI JSON"]["p50_us"]), "ms"),
    ]


def milli(micros: list[float]) -> list[float]:
    return [each / 1e3 for each in micros]


def _memory_figures(before: float, after: float) -> list[Figure]:
    return [
        figure(9, "PSS with two models, gRPC included, after the load of row 1", [after], "MB", 120),
        figure(9, "PSS of the same before any load", [before], "MB"),
    ]


# --- row 8 ---------------------------------------------------------------------------------------------------------------


def measure_start(desk: Desk, models: Path, networks: Mapping[str, Network], pace: Pace) -> list[Figure]:
    mlp = networks["mlp"]
    again, fresh = [], []
    for number in range(pace.rounds):
        with desk.serve(models, mlp) as ours:
            again.append(ours.running.cold_seconds)
        with desk.serve(models, mlp, verdicts=f"none{number}") as ours:
            fresh.append(ours.running.cold_seconds)
    return [
        figure(8, "process start to first correct answer, two models", again, "s", 1.0),
        figure(8, "the same for files never seen: each is tried in a child", fresh, "s"),
        *_swap_figures(pace),
    ]


def _swap_figures(pace: Pace) -> list[Figure]:
    command = [sys.executable, SWAPS, "--swaps", str(pace.swaps), "--cycles", str(pace.cycles)]
    with tempfile.TemporaryFile("w+") as out:
        subprocess.run(command, cwd=ROOT, stdout=out, check=True, timeout=SWAP_SECONDS)
        out.seek(0)
        rows = json.loads(out.readline())["rows"]
    found = []
    for row in rows:
        what = f"{row['count']} {row['what']} under load"
        bad = row["failed"] + row["wrong"]
        found.append(figure(8, f"{what}: failed or wrong answers", [bad], "", 0, note=f"of {row['answers']}"))
        if row["growth_percent"] is not None:
            found.append(figure(9, f"{what}: growth of RSS", [row["growth_percent"]], "%", 2))
    return found
