"""The meter: every request counted once, under labels a caller cannot invent; statistics as Triton has them."""

from __future__ import annotations

import asyncio
from random import Random

import pytest
from meter_fakes import Clock, Index, Scripted, ask, numbers

from models.errors import (
    DeadlineExceeded,
    EngineFailure,
    InvalidRequest,
    NotFound,
    Overloaded,
    TierlineError,
    TooLarge,
)
from models.serving.meter import meter as module
from models.serving.meter.histogram import FOLD
from models.serving.meter.meter import Meter, kind_of
from models.serving.meter.registry import Registry
from models.serving.meter.trace import KEPT_PER_SECOND, Tracer
from models.serving.predictor import InferResponse

INCOMING = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00"
SAMPLED = INCOMING[:-1] + "1"
HERE = ("m", "2", "edge")


class Bench:
    """A meter and everything around it."""

    def __init__(self, registry: Registry, scripted: Scripted, index: Index, clock: Clock) -> None:
        self.registry, self.inner, self.index, self.clock = registry, scripted, index, clock
        self.exported: list[object] = []
        self.tracer = Tracer(rate=0.0, export=self.exported.append, random=Random(1), clock=clock, wall=lambda: 10**18)
        self.meter = Meter(
            scripted, registry, index, tier="edge", tracer=self.tracer, clock=clock, wall=lambda: clock.now + 5_000
        )

    def answer(self, **fields: object) -> None:
        given = {"outputs": {}, "model": "m", "package": "p", "version": "2", "tier": "edge"} | fields
        self.inner.answer = InferResponse(**given)  # type: ignore[arg-type]

    async def fails(self, error: BaseException, **fields: object) -> None:
        self.inner.answer = error
        with pytest.raises(type(error)) as caught:
            await self.meter.infer(ask(**fields))  # type: ignore[arg-type]
        assert caught.value is error

    def stats(self, version: str = "2") -> dict[str, tuple[int, int]]:
        (found,) = self.meter.statistics("m", version)
        return {phase: (each.count, each.ns) for phase, each in found.inference_stats.items() if each.count}


@pytest.fixture
def bench(registry: Registry, scripted: Scripted, index: Index, clock: Clock) -> Bench:
    return Bench(registry, scripted, index, clock)


async def test_an_answer_is_passed_on_as_it_is_and_counted_once(bench: Bench) -> None:
    request = ask(rows=3)
    assert await bench.meter.infer(request) is bench.inner.answer
    assert bench.inner.requests == [request]
    assert bench.inner.requests[0] is request
    found = numbers(bench.registry)
    assert found["inference.request.count"] == {HERE: 1}
    assert found["inference.request.rows"] == {HERE: 3}
    for name in ("e2e", "queue", "compute"):
        assert found[f"inference.request.{name}.duration"] == {HERE: 1}
    assert "inference.request.errors" not in found


@pytest.mark.parametrize("trace", [None, SAMPLED])
def test_an_answer_that_is_ready_at_once_needs_neither_a_task_nor_a_loop(bench: Bench, trace: str | None) -> None:
    with pytest.raises(StopIteration):
        bench.meter.infer(ask(trace=trace)).send(None)


@pytest.mark.parametrize("count", [1, FOLD - 1, FOLD, 2 * FOLD + 1])
async def test_nothing_is_lost_between_the_hot_path_and_the_scrape(bench: Bench, count: int) -> None:
    for _ in range(count):
        await bench.meter.infer(ask(rows=2))
    for _ in range(2):
        found = numbers(bench.registry)
        assert found["inference.request.count"] == {HERE: count}
        assert found["inference.request.rows"] == {HERE: 2 * count}
        assert found["inference.request.e2e.duration"] == {HERE: count}
    assert bench.stats()["success"] == (count, pytest.approx(count * 2_000_000, abs=count))


async def test_durations_are_those_of_the_clock_and_of_the_answer(bench: Bench) -> None:
    await bench.meter.infer(ask())
    totals = {family.entry.name: family.series[0][1] for family in bench.registry.collect() if family.series}
    seconds = [totals[f"inference.request.{name}.duration"].total for name in ("e2e", "queue", "compute")]
    assert seconds == pytest.approx([0.002, 0.0005, 0.001])


async def test_a_model_without_free_rows_counts_one_row_a_request(bench: Bench) -> None:
    bench.answer(model="fixed", version="1")
    await bench.meter.infer(ask("fixed", rows=3))
    assert numbers(bench.registry)["inference.request.rows"] == {("fixed", "1", "edge"): 1}


async def test_an_answer_of_the_tier_above_is_counted_apart(bench: Bench) -> None:
    bench.answer(tier="cloud", version="7", reason="escalated")
    await bench.meter.infer(ask())
    found = numbers(bench.registry)
    assert found["inference.request.count"] == {("m", "7", "cloud"): 1}
    assert found["inference.request.compute.duration"] == {("m", "7", "cloud"): 0}
    assert found["router.decision.count"] == {("m", "escalated"): 1}
    assert all(each.inference_count == 0 for each in bench.meter.statistics("m", None))


async def test_degraded_answers_are_counted(bench: Bench) -> None:
    bench.answer(reason="up_late", degraded=True)
    await bench.meter.infer(ask())
    assert numbers(bench.registry)["inference.request.degraded"] == {("m",): 1}


ERRORS = [
    (NotFound("x"), "not_found"),
    (InvalidRequest("x"), "invalid_request"),
    (TooLarge("x"), "too_large"),
    (Overloaded("x"), "overloaded"),
    (DeadlineExceeded("x"), "deadline_exceeded"),
    (EngineFailure("x"), "engine_failure"),
    (TierlineError("x"), "tierline_error"),
    (type("Odd", (InvalidRequest,), {})("x"), "invalid_request"),
    (asyncio.CancelledError(), "cancelled"),
    (GeneratorExit(), "cancelled"),
    (ZeroDivisionError(), "unexpected"),
]


@pytest.mark.parametrize(("error", "kind"), ERRORS, ids=[kind for _, kind in ERRORS])
async def test_every_error_passes_through_and_is_counted_by_its_class(
    bench: Bench, error: BaseException, kind: str
) -> None:
    assert kind_of(error) == kind
    await bench.fails(error)
    found = numbers(bench.registry)
    assert found["inference.request.errors"] == {("m", kind): 1}
    assert "inference.request.count" not in found
    assert bench.stats()["fail"] == (1, pytest.approx(2_000_000, abs=1))


async def test_names_a_caller_invents_do_not_become_labels(bench: Bench) -> None:
    for number in range(100):
        await bench.fails(NotFound("x"), model=f"invented-{number}")
        await bench.fails(NotFound("x"), version=f"invented-{number}")
    errors = numbers(bench.registry)["inference.request.errors"]
    assert errors == {("other", "not_found"): 100, ("m", "not_found"): 100}
    assert not any(each.inference_stats["fail"].count for each in bench.meter.statistics("m", None))


async def test_a_failure_counts_for_the_version_that_was_asked_for(bench: Bench) -> None:
    await bench.fails(EngineFailure("x"), version="1")
    await bench.fails(EngineFailure("x"))
    assert (bench.stats("1")["fail"][0], bench.stats("2")["fail"][0]) == (1, 1)


async def test_statistics_are_those_of_the_protocol(bench: Bench) -> None:
    await bench.meter.infer(ask(rows=4))
    bench.clock.now += 10.0
    (found,) = bench.meter.statistics("m", "2")
    assert (found.name, found.version, found.inference_count, found.execution_count) == ("m", "2", 4, 1)
    assert found.last_inference == pytest.approx((bench.clock.now + 5_000 - 10.0) * 1e3, abs=1)
    assert bench.stats() == {
        "success": (1, pytest.approx(2_000_000, abs=1)),
        "queue": (1, 500_000),
        "compute_infer": (1, 1_000_000),
    }


async def test_requests_run_together_count_as_one_execution(bench: Bench) -> None:
    bench.answer(timings={"queue": 0.0, "compute": 0.001}, batch=8)
    for rows in (1, 3, 4):
        await bench.meter.infer(ask(rows=rows))
    (found,) = bench.meter.statistics("m", "2")
    assert (found.inference_count, found.execution_count) == (8, 1)
    assert numbers(bench.registry)["inference.batch.size"] == {HERE: 3}


async def test_an_answer_from_the_cache_ran_nothing(bench: Bench) -> None:
    bench.answer(timings={"cache": 0.000_01})
    await bench.meter.infer(ask())
    bench.answer(timings={"cache": 0.000_02, "queue": 0.0, "compute": 0.001})
    await bench.meter.infer(ask())
    (found,) = bench.meter.statistics("m", "2")
    assert (found.inference_count, found.execution_count) == (2, 1)
    assert (bench.stats()["cache_hit"], bench.stats()["cache_miss"]) == ((1, 10_000), (1, 20_000))


async def test_statistics_name_every_version_served_also_those_nobody_asked(bench: Bench) -> None:
    every = bench.meter.statistics(None, None)
    assert [(each.name, each.version) for each in every] == [("fixed", "1"), ("m", "1"), ("m", "2")]
    assert all(each.last_inference == 0 for each in every)
    assert [each.version for each in bench.meter.statistics("m", "1")] == ["1"]
    for model, version in (("unknown", None), ("m", "9")):
        with pytest.raises(NotFound):
            bench.meter.statistics(model, version)


async def test_statistics_given_out_do_not_change_afterwards(bench: Bench) -> None:
    await bench.meter.infer(ask())
    (before,) = bench.meter.statistics("m", "2")
    await bench.meter.infer(ask())
    bench.meter.statistics("m", "2")
    assert before.inference_stats["success"].count == 1


async def test_a_version_that_was_just_replaced_is_still_counted(bench: Bench) -> None:
    bench.answer(version="gone")
    await bench.meter.infer(ask(rows=3))
    assert numbers(bench.registry)["inference.request.rows"] == {("m", "gone", "edge"): 1}


async def test_more_versions_than_are_counted_apart_are_counted_together(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_TRACKS", 3)
    for version in range(6):
        bench.answer(tier="cloud", version=str(version))
        await bench.meter.infer(ask())
    counts = numbers(bench.registry)["inference.request.count"]
    assert (len(counts), counts["other", "other", "other"]) == (4, 3)


# --- traces ----------------------------------------------------------------------------------------------------------------


async def test_a_request_without_a_trace_gets_none(bench: Bench) -> None:
    answer = await bench.meter.infer(ask())
    assert answer.trace is None
    assert bench.inner.requests[0].trace is None
    assert list(bench.tracer.recent()) == []


async def test_an_incoming_trace_goes_on_to_the_next_hop_and_back_to_the_caller(bench: Bench) -> None:
    answer = await bench.meter.infer(ask(trace=SAMPLED, id="7"))
    (passed,) = bench.inner.requests
    assert passed.trace == answer.trace
    assert passed.trace is not None
    assert passed.trace.split("-")[1] == INCOMING.split("-")[1]
    assert passed.trace.split("-")[2] != INCOMING.split("-")[2]
    assert passed.id == "7"
    (span,) = bench.tracer.recent()
    assert (span.context.parent, span.context.header) == ("00f067aa0ba902b7", passed.trace)
    assert (span.model, span.version, span.tier, span.reason, span.error) == ("m", "2", "edge", "local", "")
    assert (span.seconds, span.queue, span.compute) == pytest.approx((0.002, 0.0005, 0.001))
    assert span.start == 10**18 - int(span.seconds * 1e9)
    assert bench.exported == [span]


async def test_a_trace_that_is_not_sampled_is_remembered_but_not_exported(bench: Bench) -> None:
    await bench.meter.infer(ask(trace=INCOMING))
    assert len(bench.tracer.recent()) == 1
    assert bench.exported == []


async def test_a_broken_trace_is_replaced_and_no_error(bench: Bench) -> None:
    answer = await bench.meter.infer(ask(trace="00-zz"))
    assert answer.trace is not None
    assert len(answer.trace) == 55
    assert answer.trace == bench.inner.requests[0].trace


@pytest.mark.parametrize("error", [EngineFailure("x"), DeadlineExceeded("x"), Overloaded("x"), ZeroDivisionError()])
async def test_what_failed_here_is_kept_though_nobody_traced_it(bench: Bench, error: Exception) -> None:
    await bench.fails(error)
    (span,) = bench.tracer.recent()
    assert (span.error, span.model, span.context.parent) == (kind_of(error), "m", "")
    assert bench.exported == [span]


@pytest.mark.parametrize("error", [InvalidRequest("x"), NotFound("x"), asyncio.CancelledError()])
async def test_what_the_caller_did_is_not_kept_unless_traced(bench: Bench, error: BaseException) -> None:
    await bench.fails(error)
    assert list(bench.tracer.recent()) == []
    await bench.fails(error, trace=INCOMING)
    assert [span.error for span in bench.tracer.recent()] == [kind_of(error)]
    assert bench.exported == []


async def test_late_and_degraded_answers_are_kept(bench: Bench) -> None:
    await bench.meter.infer(ask(deadline=bench.clock.now + 0.001))
    bench.answer(degraded=True, reason="up_late")
    await bench.meter.infer(ask(trace=INCOMING))
    assert [span.degraded for span in bench.tracer.recent()] == [False, True]
    assert bench.exported == list(bench.tracer.recent())


async def test_an_overload_does_not_flood_the_traces(bench: Bench) -> None:
    bench.inner.seconds = 0.0
    for _ in range(10 * KEPT_PER_SECOND):
        await bench.fails(Overloaded("x"))
    assert len(bench.exported) == KEPT_PER_SECOND
    bench.clock.now += 1.0
    await bench.fails(Overloaded("x"))
    assert len(bench.exported) == KEPT_PER_SECOND + 1


async def test_sampling_begins_traces_but_shows_them_to_no_caller(
    registry: Registry, scripted: Scripted, index: Index
) -> None:
    tracer = Tracer(rate=1.0)
    meter = Meter(scripted, registry, index, tier="edge", tracer=tracer)
    for _ in range(10):
        assert (await meter.infer(ask())).trace is None
    assert all(str(request.trace).endswith("-01") for request in scripted.requests)
    assert len({span.context.trace for span in tracer.recent()}) == 10


async def test_without_a_tracer_a_trace_is_passed_on_as_it_came(
    registry: Registry, scripted: Scripted, index: Index
) -> None:
    meter = Meter(scripted, registry, index, tier="edge")
    assert (await meter.infer(ask(trace=INCOMING))).trace is None
    assert scripted.requests[0].trace == INCOMING
    scripted.answer = EngineFailure("x")
    with pytest.raises(EngineFailure):
        await meter.infer(ask(deadline=0.0))


async def test_versions_that_are_gone_do_not_pile_up(bench: Bench) -> None:
    for number in range(3, 60):
        bench.index.models["m"] = ((-1, 4), (str(number - 1), str(number)))
        bench.answer(version=str(number))
        await bench.meter.infer(ask())
    shown = {labels[1] for family in bench.registry.collect() for labels, _ in family.series if labels[:1] == ("m",)}
    assert shown == {"58", "59"}
    assert bench.meter.statistics("m", "59")[0].inference_count == 1
