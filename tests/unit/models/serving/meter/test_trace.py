"""Trace context: what may come in, what goes out, and who agrees on which traces are kept."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.serving.meter.trace import RING, Span, Tracer, parse

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GOOD = f"00-{TRACE}-{PARENT}-01"


@pytest.mark.parametrize(
    ("header", "sampled"),
    [
        (GOOD, True),
        (f"00-{TRACE}-{PARENT}-00", False),
        (f"00-{TRACE}-{PARENT}-03", True),
        (f"00-{TRACE}-{PARENT}-02", False),
        (f"00-{TRACE}-{PARENT}-ff", True),
        (f"01-{TRACE}-{PARENT}-01", True),
        (f"cc-{TRACE}-{PARENT}-01-what-comes-later", True),
    ],
)
def test_valid_headers_are_read(header: str, sampled: bool) -> None:
    assert parse(header) == (TRACE, PARENT, sampled)


BAD = {
    "empty": "",
    "short": GOOD[:-1],
    "long": GOOD + "0",
    "version 00 with more": GOOD + "-x",
    "later version, no dash": f"01-{TRACE}-{PARENT}-01x",
    "version ff": f"ff-{TRACE}-{PARENT}-01",
    "upper case": f"00-{TRACE.upper()}-{PARENT}-01",
    "no trace": f"00-{'0' * 32}-{PARENT}-01",
    "no parent": f"00-{TRACE}-{'0' * 16}-01",
    "not hexadecimal": f"00-{'g' * 32}-{PARENT}-01",
    "underscores": f"00-{'4_' * 16}-{PARENT}-01",
    "spaces": f"00-{' ' * 32}-{PARENT}-01",
    "other digits": f"00-{'٤' * 32}-{PARENT}-01",
    "line break": GOOD[:-1] + "\n",
    "flags": f"00-{TRACE}-{PARENT}-0x",
    "dashes": GOOD.replace("-", "_"),
    "something before": f"xxx01-{TRACE}-{PARENT}-01",
    "a megabyte": "0" * 1_000_000,
}


@pytest.mark.parametrize("header", BAD.values(), ids=BAD)
def test_invalid_headers_are_replaced_by_a_new_trace(header: str) -> None:
    assert parse(header) is None
    context = Tracer(rate=0.0, random=Random(1)).join(header)
    assert parse(context.header) == (context.trace, context.span, False)
    assert (context.parent, context.trace == TRACE) == ("", False)


@given(st.text(max_size=80))
def test_no_text_is_an_error(header: str) -> None:
    assert parse(Tracer(rate=0.5).join(header).header) is not None


def test_a_valid_trace_is_continued_under_a_new_span() -> None:
    context = Tracer(rate=0.0).join(GOOD)
    assert (context.trace, context.parent, context.sampled) == (TRACE, PARENT, True)
    assert context.span != PARENT


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.3, 1.0])
def test_tiers_with_the_same_rate_sample_the_same_traces(rate: float) -> None:
    first, second = Tracer(rate=rate, random=Random(1)), Tracer(rate=rate, random=Random(2))
    ids = Random(3)
    headers = [f"00-{ids.getrandbits(128):032x}-{PARENT}-00" for _ in range(5_000)]
    chosen = [first.join(header).sampled for header in headers]
    assert chosen == [second.join(header).sampled for header in headers]
    assert sum(chosen) / len(chosen) == pytest.approx(rate, abs=0.02)


def test_a_trace_that_begins_here_is_one_that_every_tier_would_sample() -> None:
    here, above = Tracer(rate=0.01, random=Random(1)), Tracer(rate=0.01, random=Random(2))
    for _ in range(500):
        context = here.sample()
        assert context.sampled
        assert above.join(f"00-{context.trace}-{context.span}-00").sampled


@pytest.mark.parametrize("rate", [0.01, 0.2, 1.0])
def test_as_many_requests_begin_a_trace_as_the_rate_says(rate: float) -> None:
    tracer = Tracer(rate=rate, random=Random(5))
    begun = 0
    for _ in range(50_000):
        tracer.untraced -= 1
        if tracer.untraced <= 0:
            tracer.sample()
            begun += 1
    assert begun / 50_000 == pytest.approx(rate, rel=0.15)


def test_a_rate_of_zero_begins_none() -> None:
    tracer = Tracer(rate=0.0)
    tracer.untraced -= 10**9
    assert tracer.untraced > 0


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_a_rate_that_is_no_share_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="sampling rate"):
        Tracer(rate=rate)


def test_the_ring_keeps_the_last_spans_and_no_more() -> None:
    tracer = Tracer()
    for number in range(RING + 5):
        tracer.keep(Span(tracer.join(GOOD), number, 0.1, "m", "1", "edge", "local"), wrong=False)
    recent = tracer.recent()
    assert (len(recent), recent[0].start, recent[-1].start) == (RING, 5, RING + 4)
