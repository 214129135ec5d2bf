"""Rows 3, 5, 6, 7 and overload: servers under load, each on a core of its own and its clients on another."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from statistics import median
from typing import NamedTuple

from arrivals import Outcome, open_loop
from asking import WrongAnswer, binary, check
from costs import Pace
from figures import Figure, figure
from launch import Desk, Tierline
from measure import Load, apart, burst, cores, enough, h2load_command, latencies, on_server_core
from networks import Network, open_session, write_big

HALF_SECONDS = 4.0
ARRIVAL_SECONDS = 0.5
"""Into twice that time; the rest is enough for a new version to be tried, loaded and swapped in."""
LOAD_SECONDS = 20.0
FAST_RATE = 400.0
"""Arrivals of the fast model per second: a few percent of what it could take."""
OVERLOAD = 10
OVERLOAD_DEADLINE_MS = 100
OVERLOAD_SECONDS = 4.0
CLOSED_CONNECTIONS = 8
SLOW_CONNECTIONS = 8
REFUSED = (429, 503)
TOO_LATE = 504


# --- row 3 ---------------------------------------------------------------------------------------------------------------


def measure_throughput(desk: Desk, models: Path, networks: Mapping[str, Network], pace: Pace) -> list[Figure]:
    """Pinned: server and onnxruntime in turn on the same one core, the client on the other. Free: both cores, two engine
    threads, two onnxruntime threads; the cores' time that the client took is taken from what onnxruntime could have had."""
    cnn, found = networks["cnn"], []
    with desk.serve(models, networks["mlp"], "--threads", "2") as ours:
        load = ours.load(binary, cnn)
        for connections in (8, 32):
            requests = enough(load, connections=connections, seconds=pace.seconds)
            pinned, cpu, free = [], [], []
            for _ in range(pace.rounds):
                with on_server_core():
                    alone = inferences(cnn, 1, pace.seconds)
                with apart(ours.pid):
                    served = burst(ours.pid, load, connections=connections, requests=requests)
                pinned.append(served.rate / alone.rate)
                cpu.append(alone.cpu_us / served.server_us)
                alone = inferences(cnn, 2, pace.seconds)
                served = burst(ours.pid, load, connections=connections, requests=requests)
                free.append(served.rate / alone.rate / (1 - served.client_share / 2))
            found.append(figure(3, f"{connections} connections, server on one core", pinned, "", 0.90, most=False))
            found.append(figure(3, f"{connections} connections, CPU of a raw run / of a request", cpu, ""))
            if cores():
                found.append(figure(3, f"{connections} connections, two cores, the client's time taken off", free, ""))
    return found


class Alone(NamedTuple):
    """Runs per second, and CPU microseconds of each."""

    rate: float
    cpu_us: float


def inferences(network: Network, threads: int, seconds: float) -> Alone:
    """onnxruntime alone in this process."""
    sessions = [open_session(network.path) for _ in range(threads)]

    def work(number: int) -> int:
        done, feed = 0, {"x": network.x}
        while time.perf_counter() < ends:
            sessions[number].run(["y"], feed)
            done += 1
        return done

    start, begun = time.perf_counter(), time.process_time()
    ends = start + seconds
    with ThreadPoolExecutor(threads) as pool:
        total = sum(pool.map(work, range(threads)))
    return Alone(total / (time.perf_counter() - start), (time.process_time() - begun) / total * 1e6)


# --- rows 5 and 6 --------------------------------------------------------------------------------------------------------


def measure_half_load(desk: Desk, models: Path, networks: Mapping[str, Network], pace: Pace) -> list[Figure]:
    cnn, mlp = networks["cnn"], networks["mlp"]
    calm, busy = [], []
    with desk.serve(models, mlp, "--poll", "0.2") as ours, apart(ours.pid):
        load = ours.load(binary, cnn)
        requests = enough(load, connections=CLOSED_CONNECTIONS, seconds=pace.seconds)
        capacity = burst(ours.pid, load, connections=CLOSED_CONNECTIONS, requests=requests).rate
        for number in range(pace.rounds):
            calm.append(open_loop(load, rate=capacity / 2, seconds=HALF_SECONDS, seed=number))
            with arriving(models, number + 1) as big:
                busy.append(open_loop(load, rate=capacity / 2, seconds=2 * HALF_SECONDS, seed=number))
                _wait_for(big, ours)
    late = max(outcome.late for outcome in calm) * 1e3
    note = f"{capacity / 2:.0f} of {capacity:.0f}/s; generator late by {late:.2f} ms (p99)"
    return [
        figure(5, "cnn, p99", _tails(calm), "ms", 10, note=note),
        figure(5, "cnn, p50", [outcome.times().p50 / 1e3 for outcome in calm], "ms"),
        figure(5, "cnn, p99 while a version of 100 MB is tried, loaded and swapped in", _tails(busy), "ms", 10),
        _unanswered(5, [*calm, *busy]),
    ]


def _wait_for(network: Network, server: Tierline) -> None:
    """Until a model answers as this version of it does. Raises what the last try raised."""
    question = binary(network).with_headers(f"authorization: Bearer {server.token}")
    ends = time.monotonic() + LOAD_SECONDS
    while True:
        try:
            check(question, network, server.http)
        except (HTTPException, WrongAnswer):
            if time.monotonic() > ends:
                raise
            time.sleep(0.1)
        else:
            return


def _tails(outcomes: list[Outcome]) -> list[float]:
    return [outcome.times().p99 / 1e3 for outcome in outcomes]


@contextmanager
def arriving(models: Path, version: int) -> Iterator[Network]:
    """A new version of `big` that appears in the folder after a while, whole; the one before it goes."""
    big = write_big(models.parent / "arriving", version)
    home = models / "big"
    home.mkdir(exist_ok=True)

    def appear() -> None:
        big.path.parent.rename(home / str(version))

    timer = threading.Timer(ARRIVAL_SECONDS, appear)
    timer.start()
    try:
        yield big
    finally:
        timer.join()
        shutil.rmtree(home / str(version - 1), ignore_errors=True)


def _unanswered(row: int, outcomes: list[Outcome]) -> Figure:
    """Latencies are those of good answers: any other would flatter them."""
    statuses = Counter(reply.status for outcome in outcomes for reply in outcome.replies)
    bad = [outcome.asked - len(outcome.good()) for outcome in outcomes]
    return figure(row, "requests refused, late or failed, per round", bad, "", 0, note=f"statuses {dict(statuses)}")


def measure_isolation(desk: Desk, models: Path, networks: Mapping[str, Network], pace: Pace) -> list[Figure]:
    alone, beside, slow_rates = [], [], []
    with desk.serve(models, networks["mlp"]) as ours, apart(ours.pid):
        fast, slow = ours.load(binary, networks["mlp"]), ours.load(binary, networks["slow"])
        requests = enough(slow, connections=SLOW_CONNECTIONS, seconds=HALF_SECONDS * 3)
        for number in range(pace.rounds):
            alone.append(open_loop(fast, rate=FAST_RATE, seconds=HALF_SECONDS, seed=number))
            with saturated(slow, requests):
                beside.append(open_loop(fast, rate=FAST_RATE, seconds=HALF_SECONDS, seed=number))
        slow_rates.append(burst(ours.pid, slow, connections=SLOW_CONNECTIONS, requests=60).rate)
    ratios = [one.times().p99 / other.times().p99 for one, other in zip(beside, alone, strict=True)]
    return [
        figure(6, "mlp p99 beside slow, as a multiple of p99 alone", ratios, "x", 2),
        figure(6, "mlp p99 alone", _tails(alone), "ms", note=f"{FAST_RATE:.0f}/s"),
        figure(6, "mlp p99 beside slow", _tails(beside), "ms"),
        figure(6, "mlp p50 beside slow", [each.times().p50 / 1e3 for each in beside], "ms"),
        _unanswered(6, [*alone, *beside]),
        figure(6, "slow, runs per second while saturated", slow_rates, "/s"),
    ]


@contextmanager
def saturated(load: Load, requests: int) -> Iterator[None]:
    """Keep a model busy meanwhile. Raises RuntimeError when it was not busy to the end."""
    with tempfile.NamedTemporaryFile() as body:
        body.write(load.body)
        body.flush()
        command = h2load_command(load, Path(body.name), connections=SLOW_CONNECTIONS, requests=requests)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            time.sleep(0.2)
            yield
            if process.poll() is not None:
                raise RuntimeError("the slow model was not saturated all the time")
        finally:
            process.kill()
            process.wait()


# --- row 7 ---------------------------------------------------------------------------------------------------------------


def measure_batching(desk: Desk, models: Path, networks: Mapping[str, Network], pace: Pace) -> list[Figure]:
    mlp, found = networks["mlp"], []
    with desk.serve(models, mlp) as on, desk.serve(models, mlp, "--no-batching") as off:
        for name in ("mlp", "dense", "cnn"):
            network = networks[name]
            pairs = [(server, server.load(binary, network)) for server in (on, off)]
            found += _batching_figures(name, pairs, pace)
    return found


def _batching_figures(name: str, pairs: list[tuple[Tierline, Load]], pace: Pace) -> list[Figure]:
    many = [enough(load, connections=32, seconds=pace.seconds) for _, load in pairs]
    one = enough(pairs[1][1], connections=1, seconds=pace.seconds / 2)
    added, rates, cpu = [], [], []
    for _ in range(pace.rounds):
        lonely = [latencies(load, requests=one).p50 for _, load in pairs]
        added.append((lonely[0] - lonely[1]) / 1e3)
        bursts = []
        for (server, load), requests in zip(pairs, many, strict=True):
            with apart(server.pid):
                bursts.append(burst(server.pid, load, connections=32, requests=requests))
        rates.append(bursts[0].rate / bursts[1].rate)
        cpu.append(bursts[1].server_us / bursts[0].server_us)
    least = {"dense": 1.6, "mlp": 1.0, "cnn": 0.97}[name]
    note = "" if name != "cnn" else "does not pay, so it is off: 1 but for noise"
    return [
        figure(7, f"{name}: p50 added by batching at one connection", added, "ms", 0.1),
        figure(7, f"{name}: throughput at 32 connections, on / off", rates, "x", least, most=False, note=note),
        figure(7, f"{name}: CPU per request at 32 connections, off / on", cpu, "x"),
    ]


# --- overload ------------------------------------------------------------------------------------------------------------


def measure_overload(desk: Desk, models: Path, networks: Mapping[str, Network], pace: Pace) -> list[Figure]:
    with desk.serve(models, networks["mlp"], "--threads", "1") as ours, apart(ours.pid):
        patient = ours.load(binary, networks["steady"])
        load = ours.load(binary, networks["steady"], deadline_ms=OVERLOAD_DEADLINE_MS)
        requests = enough(patient, connections=CLOSED_CONNECTIONS, seconds=pace.seconds)
        rounds = []
        for number in range(pace.rounds):
            peak = burst(ours.pid, patient, connections=CLOSED_CONNECTIONS, requests=requests).rate
            full = open_loop(load, rate=peak, seconds=OVERLOAD_SECONDS, seed=number)
            over = open_loop(load, rate=peak * OVERLOAD, seconds=OVERLOAD_SECONDS, seed=number)
            rounds.append((peak, full, over))
    return _overload_figures(rounds)


def _overload_figures(rounds: list[tuple[float, Outcome, Outcome]]) -> list[Figure]:
    overs = [over for _, _, over in rounds]
    refused = [[reply for reply in over.replies if reply.status in REFUSED] for over in overs]
    goodput = [_goodput(over) / peak for peak, _, over in rounds]
    tails = [over.times().p99 / full.times().p99 for _, full, over in rounds]
    late = max(over.late for over in overs) * 1e3
    statuses = sorted({reply.status for over in overs for reply in over.replies})
    missing = sum(over.asked - len(over.replies) for over in overs)
    note = f"peak {median(peak for peak, _, _ in rounds):.0f}/s, offered ten times that; generator late by {late:.2f} ms (p99)"
    carried = [_share([reply.retry_after for reply in each]) for each in refused]
    quick = [sorted(reply.round_trip for reply in each)[len(each) * 99 // 100] * 1e3 for each in refused if each]
    return [
        figure(
            10,
            "answered well, as a share of the closed-loop peak",
            goodput,
            "",
            0.8,
            most=False,
            note=note,
        ),
        figure(10, "accepted p99, as a multiple of p99 at capacity", tails, "x", 2),
        figure(10, "accepted p99", _tails(overs), "ms", note=f"deadline {OVERLOAD_DEADLINE_MS} ms"),
        figure(10, "share refused", [len(each) / over.asked for each, over in zip(refused, overs, strict=True)], ""),
        figure(10, "refusals with Retry-After", carried, "", 1, most=False),
        figure(10, "time to refuse, p99", quick or [0.0], "ms", note=f"statuses seen: {statuses}"),
        figure(10, "requests without any answer", [missing], "", 0),
        figure(10, "share of the good answers that came after 100 ms", [_overdue(over) for over in overs], ""),
        figure(10, "share dropped later, at their deadline (504)", [_too_late(over) for over in overs], ""),
    ]


def _goodput(outcome: Outcome) -> float:
    return len(outcome.good()) / outcome.seconds


def _overdue(outcome: Outcome) -> float:
    """Of the good answers, those that their client got after the deadline, counted from when they were due."""
    return _share([reply.latency > OVERLOAD_DEADLINE_MS / 1e3 for reply in outcome.good()])


def _too_late(outcome: Outcome) -> float:
    return sum(reply.status == TOO_LATE for reply in outcome.replies) / outcome.asked


def _share(values: list[bool]) -> float:
    return sum(values) / len(values) if values else 1.0
