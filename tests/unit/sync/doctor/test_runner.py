from __future__ import annotations

import threading
import time

import pytest

from sync.doctor.check import Check, Finding, Skipped, exit_code, fail, ok, warn
from sync.doctor.runner import MAX_TEXT, run_checks, select
from sync.errors import StoreFailed


def check(name: str, run: object, seconds: float = 5.0) -> Check[None]:
    return Check(name, "what", "do this", run, seconds)  # type: ignore[arg-type]


def test_results_come_in_the_order_of_the_table_whatever_ends_first() -> None:
    gate = threading.Event()

    def slow(_: None) -> Finding:
        gate.wait(5)
        return ok("slow")

    def fast(_: None) -> Finding:
        gate.set()
        return ok("fast")

    results = run_checks([check("a.slow", slow), check("a.fast", fast)], None)
    assert [result.finding.found for result in results] == ["slow", "fast"]


def test_a_check_that_hangs_is_given_up_on_and_holds_up_nothing() -> None:
    gate = threading.Event()
    hanging = [check(f"a.{n}", lambda _: gate.wait(30), 0.05) for n in range(3)]
    began = time.monotonic()
    results = run_checks([*hanging, check("a.last", lambda _: ok("done"))], None, parallel=1)
    gate.set()
    assert time.monotonic() - began < 3
    assert [result.finding.status for result in results] == ["fail", "fail", "fail", "ok"]
    assert "no answer within 0.05 s" in results[0].finding.found


def test_all_of_it_together_is_bounded_too() -> None:
    gate = threading.Event()
    checks = [check(f"a.{n}", lambda _: gate.wait(30)) for n in range(4)]
    results = run_checks(checks, None, parallel=2, seconds=0.1)
    gate.set()
    assert [result.finding.status for result in results] == ["fail", "fail", "skip", "skip"]


@pytest.mark.parametrize(
    ("error", "status", "found"),
    [
        (Skipped("not here"), "skip", "not here"),
        (StoreFailed("the disk is gone"), "fail", "the disk is gone"),
        (KeyError("x"), "fail", "KeyError: 'x'"),
    ],
)
def test_what_a_check_raises_becomes_its_finding(error: Exception, status: str, found: str) -> None:
    def run(_: None) -> Finding:
        raise error

    finding = run_checks([check("a.b", run)], None)[0].finding
    assert (finding.status, finding.found) == (status, found)
    assert finding.fix == ("do this" if status == "fail" else "")


def test_a_plain_tuple_will_do_and_a_long_sentence_is_cut() -> None:
    finding = run_checks([check("a.b", lambda _: ("warn", "x\n" * 4000, ""))], None)[0].finding
    assert finding.status == "warn"
    assert len(finding.found) == MAX_TEXT
    assert finding.fix == "do this"


def test_checks_are_chosen_by_name_or_group_and_a_typo_is_named() -> None:
    table = [check("a.b", ok), check("a.c", ok), check("d.e", ok)]
    assert [each.name for each in select(table, ["a"])] == ["a.b", "a.c"]
    assert [each.name for each in select(table, ["d.e"])] == ["d.e"]
    with pytest.raises(ValueError, match="no check 'x'; groups are a, d"):
        select(table, ["x"])


@pytest.mark.parametrize(
    ("finding", "code", "strict"), [(ok("x"), 0, 0), (warn("x"), 0, 1), (fail("x"), 1, 1), (Finding("skip", "x"), 0, 0)]
)
def test_the_exit_code_is_that_of_the_worst_finding(finding: Finding, code: int, strict: int) -> None:
    results = run_checks([check("a.b", lambda _: finding)], None)
    assert exit_code(results) == code
    assert exit_code(results, strict=True) == strict
