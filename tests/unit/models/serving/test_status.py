"""Every error that a server of ours sends arrives as the error it was."""

from __future__ import annotations

import pytest

import models.errors
from models.errors import CallerError, Overloaded, PackageError, TierlineError, TryAgain, Unreachable
from models.serving.exchange import error_response
from models.serving.reply import Reply
from models.serving.status import MAX_RETRY_AFTER_SECONDS, error_of, error_of_code

LEAVES = [
    kind
    for kind in vars(models.errors).values()
    if isinstance(kind, type) and issubclass(kind, TierlineError) and kind not in (TierlineError, CallerError, TryAgain)
]


@pytest.mark.parametrize("kind", LEAVES)
def test_over_http_an_error_stays_what_it_is(kind: type[TierlineError]) -> None:
    sent = error_response(kind("because"))
    assert isinstance(sent.body, bytes)
    got = error_of(Reply(sent.status, {}, sent.body))
    assert str(got) == "because"
    if issubclass(kind, PackageError):
        assert type(got) is PackageError
    elif kind is Unreachable:  # shares 503 with NotReady: the server that said so was reached
        assert isinstance(got, TryAgain)
    else:
        assert type(got) is kind


@pytest.mark.parametrize("kind", LEAVES)
def test_over_grpc_who_must_act_stays_the_same(kind: type[TierlineError]) -> None:
    got = error_of_code(kind.grpc, "because")
    assert str(got) == "because"
    assert isinstance(got, TryAgain) == issubclass(kind, TryAgain)
    assert got.grpc == kind.grpc


@pytest.mark.parametrize(
    ("sent", "seconds"),
    [(b"7", 7.0), (b"99999999", MAX_RETRY_AFTER_SECONDS), (b"", 1.0), (b"-1", 1.0), (b"soon", 1.0), (b"\xff", 1.0)],
)
def test_a_pause_is_believed_within_reason(sent: bytes, seconds: float) -> None:
    error = error_of(Reply(429, {b"retry-after": sent}, b"{}"))
    assert isinstance(error, Overloaded)
    assert error.retry_after == seconds
    coded = error_of_code("RESOURCE_EXHAUSTED", "x", sent.decode("latin-1"))
    assert isinstance(coded, Overloaded)
    assert coded.retry_after == seconds


def test_a_code_that_nobody_knows_is_no_answer() -> None:
    assert type(error_of_code("DATA_LOSS", "")) is Unreachable
    assert type(error_of(Reply(302, {}, b""))) is Unreachable
