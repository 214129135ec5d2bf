"""Who is who, and until when: tokens, certificates, local callers, and what changes while a server runs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import pytest
from access_writer import AccessWriter
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from models.errors import Overloaded, Unauthenticated
from models.serving.access import checked, files, settings, tokens
from models.serving.access.checked import FAILURES_AT_ONCE, CheckedAccess
from models.serving.access.keys import kid_of
from models.serving.access.settings import InvalidAccess
from models.serving.access.tokens import CLOCK_SKEW_SECONDS
from models.serving.access.watch import LOOK_SECONDS
from models.serving.caller import Caller, Peer

AWAY = Peer("192.0.2.7", encrypted=True)
PLAIN = Peer("192.0.2.7")
HERE = Peer("127.0.0.1")
SOCKET = Peer("unix")
TENANTS = '[tenants.acme]\nmodels = ["acme-*", "shared"]\n[tenants.other]\n'


class Clocks:
    """A wall clock and a monotonic one that move together."""

    def __init__(self) -> None:
        self.wall = float(int(time.time()))
        self.steady = 100.0

    def move(self, seconds: float) -> None:
        self.wall += seconds
        self.steady += seconds


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


def access_of(writer: AccessWriter, clocks: Clocks, **options: Any) -> CheckedAccess:
    return CheckedAccess(writer.path, clock=lambda: clocks.wall, monotonic=lambda: clocks.steady, **options)


def refused(access: CheckedAccess, peer: Peer, authorization: bytes | None = None) -> str:
    with pytest.raises(Unauthenticated) as error:
        access.identify(peer, authorization)
    return str(error.value)


def test_a_token_says_client_tenant_rights_and_how_long(tmp_path: Path, clocks: Clocks) -> None:
    writer = AccessWriter(tmp_path, TENANTS)
    access = access_of(writer, clocks)
    now = int(clocks.wall)
    caller = access.identify(AWAY, writer.bearer(tenant="acme", models=["a*"], admin=True, iat=now, exp=now + 60))
    assert caller == Caller("c", "acme", True, ("a*",), 100.0 + 60 + CLOCK_SKEW_SECONDS)


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every signature that is looked at."""
    found: list[int] = []
    monkeypatch.setattr(checked, "verify", lambda *given: found.append(1) or tokens.verify(*given))
    return found


def test_a_token_is_verified_once_and_refused_when_it_has_expired(
    tmp_path: Path, clocks: Clocks, verified: list[int]
) -> None:
    writer = AccessWriter(tmp_path)
    access = access_of(writer, clocks)
    now = int(clocks.wall)
    bearer = writer.bearer(iat=now, exp=now + 60)
    assert all(access.identify(AWAY, bearer).client == "c" for _ in range(5))
    assert len(verified) == 1
    clocks.move(60 + CLOCK_SKEW_SECONDS)
    assert "expired" in refused(access, AWAY, bearer)
    assert len(verified) == 1


def test_what_is_remembered_is_bounded_and_the_latest(
    tmp_path: Path, clocks: Clocks, verified: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checked, "MAX_REMEMBERED", 3)
    writer = AccessWriter(tmp_path)
    access = access_of(writer, clocks)
    bearers = [writer.bearer(jti=f"j{number}") for number in range(5)]
    for bearer in bearers:
        access.identify(AWAY, bearer)
    for bearer in bearers[2:]:
        access.identify(AWAY, bearer)
    assert len(access._known) == 3
    assert len(verified) == 5


@pytest.mark.parametrize(
    "header",
    [b"", b"Bearer", b"Bearer ", b"Basic abc", b"Token x", b"bearer\tx", b"Bearer x y", b"Bearer \xff", b"\xff"],
)
def test_a_header_that_is_no_bearer_token_is_refused_even_where_none_is_needed(
    tmp_path: Path, clocks: Clocks, header: bytes
) -> None:
    access = access_of(AccessWriter(tmp_path), clocks)
    assert access.identify(HERE, None) == Caller()
    refused(access, HERE, header)


def test_the_scheme_is_written_in_any_case(tmp_path: Path, clocks: Clocks) -> None:
    writer = AccessWriter(tmp_path)
    assert access_of(writer, clocks).identify(AWAY, b"bEARER   " + writer.token().encode()).client == "c"


def test_a_token_is_not_taken_over_a_connection_that_others_can_read(tmp_path: Path, clocks: Clocks) -> None:
    writer = AccessWriter(tmp_path)
    assert "unencrypted" in refused(access_of(writer, clocks), PLAIN, writer.bearer())
    writer.write("require_tls = false\n")
    assert access_of(writer, clocks).identify(PLAIN, writer.bearer()).client == "c"


@pytest.mark.parametrize(
    ("setting", "listening", "here", "socket"),
    [
        ("", ("127.0.0.1",), True, False),
        ("", ("localhost", "unix"), True, True),
        ("", ("unix",), True, True),
        ("", ("0.0.0.0",), False, False),
        ("", ("::1", "192.0.2.1"), False, False),
        ("", ("0.0.0.0", "unix"), False, False),
        ("open_loopback = true\n", ("0.0.0.0", "unix"), True, True),
        ("open_loopback = true\n", ("0.0.0.0",), True, False),
        ("open_loopback = false\n", ("127.0.0.1", "unix"), False, False),
    ],
)
def test_local_callers_need_no_credential_only_where_that_was_said_or_nobody_else_can_come(
    tmp_path: Path, clocks: Clocks, setting: str, listening: tuple[str, ...], here: bool, socket: bool
) -> None:
    access = access_of(AccessWriter(tmp_path, setting), clocks, listening=listening)
    for peer, is_open in (
        (HERE, here),
        (Peer("::1"), here),
        (SOCKET, socket),
        (PLAIN, False),
        (AWAY, False),
        (Peer(""), False),
        (Peer("::ffff:127.0.0.1"), False),
        (Peer("10.127.0.1"), False),
    ):
        if is_open:
            assert access.identify(peer, None) == Caller()
        else:
            assert "bearer token" in refused(access, peer)


def test_local_callers_are_administrators_only_where_that_was_said(tmp_path: Path, clocks: Clocks) -> None:
    writer = AccessWriter(tmp_path, "loopback_admin = true\n")
    assert access_of(writer, clocks).identify(HERE, None).admin


def test_a_certificate_is_a_client_that_is_listed(tmp_path: Path, clocks: Clocks) -> None:
    writer = AccessWriter(tmp_path, TENANTS + '[clients."acme.n1"]\ntenant = "acme"\nadmin = true\n[clients.stray]\n')
    access = access_of(writer, clocks)
    assert access.identify(Peer("192.0.2.7", "acme.n1", True), None) == Caller("acme.n1", "acme", True)
    assert "no client's" in refused(access, Peer("192.0.2.7", "acme.n2", True))
    assert "names no tenant" in refused(access, Peer("192.0.2.7", "stray", True))
    assert access.identify(Peer("192.0.2.7", "acme.n2", True), writer.bearer(tenant="other")).tenant == "other"


def test_a_certificate_may_name_its_tenant_where_that_was_said(tmp_path: Path, clocks: Clocks) -> None:
    access = access_of(AccessWriter(tmp_path, "tenant_from_certificate = true\n" + TENANTS), clocks)
    assert access.identify(Peer("192.0.2.7", "acme.n2", True), None) == Caller("acme.n2", "acme")
    assert "not known" in refused(access, Peer("192.0.2.7", "ghost.n2", True))
    assert "no client's" in refused(access, Peer("192.0.2.7", "acme", True))


def test_a_token_without_a_tenant_sees_no_tenants_models(tmp_path: Path, clocks: Clocks) -> None:
    writer = AccessWriter(tmp_path, TENANTS + '[clients.mine]\ntenant = "acme"\n')
    access = access_of(writer, clocks)
    assert "no tenant" in refused(access, AWAY, writer.bearer())
    assert "not known" in refused(access, AWAY, writer.bearer(tenant="ghost"))
    assert "not the one" in refused(access, AWAY, writer.bearer(sub="mine", tenant="other"))
    assert access.identify(AWAY, writer.bearer(sub="mine")).tenant == "acme"
    assert access.identify(AWAY, writer.bearer(admin=True)).tenant is None


@pytest.mark.parametrize(
    ("caller", "model", "allowed"),
    [
        (Caller("c", "acme"), "acme-1", True),
        (Caller("c", "acme"), "shared", True),
        (Caller("c", "acme"), "Acme-1", False),
        (Caller("c", "acme"), "other-1", False),
        (Caller("c", "other"), "acme-1", True),
        (Caller("c", "acme", models=("*-1",)), "acme-1", True),
        (Caller("c", "acme", models=("*-1",)), "acme-2", False),
        (Caller("c", "acme", models=("*",)), "other-1", False),
        (Caller("c", "acme", models=()), "acme-1", False),
        (Caller("narrow", "acme"), "acme-1", True),
        (Caller("narrow", "acme"), "acme-2", False),
        (Caller(), "acme-1", True),
    ],
)
def test_a_model_is_seen_by_who_both_the_token_and_the_tenant_allow(
    tmp_path: Path, clocks: Clocks, caller: Caller, model: str, allowed: bool
) -> None:
    access = access_of(AccessWriter(tmp_path, TENANTS + '[clients.narrow]\nmodels = ["acme-1"]\n'), clocks)
    assert access.may_use(caller, model) is allowed


def test_callers_without_a_tenant_are_held_to_the_entry_for_everybody(tmp_path: Path, clocks: Clocks) -> None:
    access = access_of(AccessWriter(tmp_path, '[tenants."*"]\nmodels = ["public-*"]\n'), clocks)
    caller = access.identify(HERE, None)
    assert access.may_use(caller, "public-1")
    assert not access.may_use(caller, "acme-1")


# --- what changes while the server runs ------------------------------------------------------------------------------------


def test_a_revocation_counts_within_a_second_and_is_seen_by_the_revision(tmp_path: Path, clocks: Clocks) -> None:
    writer = AccessWriter(tmp_path)
    access = access_of(writer, clocks)
    bearer, before = writer.bearer(), access.revision
    access.identify(AWAY, bearer)
    writer.revoked.write_text("jti j1\n")
    assert access.revision == before  # not looked at yet: files are not asked for with every request
    clocks.move(LOOK_SECONDS)
    assert access.revision > before
    assert refused(access, AWAY, bearer) == "the token has been revoked"
    assert access.identify(AWAY, writer.bearer(jti="j2")).client == "c"


def test_identifying_alone_sees_a_revocation_too(tmp_path: Path, clocks: Clocks) -> None:
    writer = AccessWriter(tmp_path, "[clients.c]\n")
    access = access_of(writer, clocks)
    bearer = writer.bearer()
    access.identify(AWAY, bearer)
    access.identify(Peer("192.0.2.7", "c", True), None)
    writer.revoked.write_text("sub c\n")
    clocks.move(LOOK_SECONDS)
    assert refused(access, AWAY, bearer) == "the token has been revoked"
    assert "revoked" in refused(access, Peer("192.0.2.7", "c", True))


def test_keys_come_and_go_without_a_restart(tmp_path: Path, clocks: Clocks) -> None:
    writer = AccessWriter(tmp_path)
    access = access_of(writer, clocks)
    second = Ed25519PrivateKey.generate()
    new = writer.bearer(key=second, header={"kid": kid_of(second.public_key())})
    old = writer.bearer()
    assert "not known" in refused(access, AWAY, new)
    assert access.identify(AWAY, old)
    writer.add_key(second)
    clocks.move(LOOK_SECONDS)
    assert access.identify(AWAY, new)
    assert access.identify(AWAY, old)
    (tmp_path / "keys" / f"{writer.kid}.pem").unlink()
    clocks.move(LOOK_SECONDS)
    assert access.identify(AWAY, new)
    assert "not known" in refused(access, AWAY, old)


def test_new_settings_are_in_force_within_a_second(tmp_path: Path, clocks: Clocks) -> None:
    writer = AccessWriter(tmp_path)
    access = access_of(writer, clocks)
    caller, before = access.identify(HERE, None), access.revision
    writer.write('[tenants."*"]\nmodels = []\n')
    clocks.move(LOOK_SECONDS)
    assert access.revision > before
    assert not access.may_use(caller, "m")


def test_a_file_named_later_is_watched_too(tmp_path: Path, clocks: Clocks) -> None:
    writer = AccessWriter(tmp_path)
    access = access_of(writer, clocks)
    bearer = writer.bearer()
    writer.path.write_text('keys = "keys"\nrevoked = "elsewhere.txt"\n')
    (tmp_path / "elsewhere.txt").touch()
    clocks.move(LOOK_SECONDS)
    access.identify(AWAY, bearer)
    (tmp_path / "elsewhere.txt").write_text("jti j1\n")
    clocks.move(LOOK_SECONDS)
    assert "revoked" in refused(access, AWAY, bearer)


def test_files_that_become_unreadable_change_nothing_and_are_tried_again(
    tmp_path: Path, clocks: Clocks, caplog: pytest.LogCaptureFixture
) -> None:
    writer = AccessWriter(tmp_path)
    writer.revoked.write_text("jti gone\n")
    access = access_of(writer, clocks)
    before = access.revision
    text = writer.path.read_text()
    with caplog.at_level(logging.WARNING, "tierline.access"):
        writer.path.write_text("keys = 3")
        for _ in range(3):
            clocks.move(LOOK_SECONDS)
            assert access.revision == before
        assert "revoked" in refused(access, AWAY, writer.bearer(jti="gone"))
        assert len(caplog.records) == 1, "said once, not once a second"
        writer.path.write_text(text)
        writer.revoked.unlink()
        clocks.move(LOOK_SECONDS)
        assert "revoked" in refused(access, AWAY, writer.bearer(jti="gone"))
    writer.revoked.write_text("oops\njti other\n")
    clocks.move(LOOK_SECONDS)
    assert access.revision > before
    assert "revoked" in refused(access, AWAY, writer.bearer(jti="other"))
    assert access.identify(AWAY, writer.bearer(jti="gone"))


def test_a_change_that_could_not_be_read_is_read_when_it_can_be_though_it_changed_no_more(
    tmp_path: Path, clocks: Clocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = AccessWriter(tmp_path)
    access = access_of(writer, clocks)
    bearer = writer.bearer()
    writer.revoked.write_text("jti j1\n")

    plain = Path.open

    def unreadable(path: Path, *given: Any) -> Any:
        if path == writer.revoked:
            raise OSError(24, "Too many open files")
        return plain(path, *given)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", unreadable)
        clocks.move(LOOK_SECONDS)
        assert access.identify(AWAY, bearer)
    clocks.move(LOOK_SECONDS)
    assert "revoked" in refused(access, AWAY, bearer)


def test_a_server_does_not_start_on_files_that_are_not_right(tmp_path: Path) -> None:
    writer = AccessWriter(tmp_path)
    writer.revoked.write_text("oops\n")
    with pytest.raises(InvalidAccess, match="line 1"):
        CheckedAccess(writer.path)
    writer.revoked.unlink()
    with pytest.raises(InvalidAccess, match=r"revoked\.txt"):
        CheckedAccess(writer.path)
    writer.path.write_text('keys = "absent"\n')
    with pytest.raises(InvalidAccess, match="absent"):
        CheckedAccess(writer.path)


def test_without_keys_no_token_is_taken(tmp_path: Path, clocks: Clocks) -> None:
    writer = AccessWriter(tmp_path)
    bearer = writer.bearer()
    writer.path.write_text("")
    access = access_of(writer, clocks)
    assert "not taken" in refused(access, HERE, bearer)
    assert "certificate" in refused(access, AWAY)


def forged(writer: AccessWriter, number: int) -> bytes:
    """A token that names a known key and is signed with another."""
    return writer.bearer(key=Ed25519PrivateKey.generate(), jti=f"f{number}")


def test_an_address_that_sends_forgeries_is_not_verified_without_end(
    tmp_path: Path, clocks: Clocks, verified: list[int]
) -> None:
    writer = AccessWriter(tmp_path)
    access = access_of(writer, clocks)
    good = writer.bearer()
    access.identify(AWAY, good)
    for number in range(FAILURES_AT_ONCE):
        assert "signature" in refused(access, AWAY, forged(writer, number))
    assert len(verified) == FAILURES_AT_ONCE + 1
    assert access.identify(AWAY, good).client == "c", "who was known stays known"
    assert access.identify(Peer("192.0.2.8", encrypted=True), writer.bearer(jti="j2"))
    for bearer in (forged(writer, -1), writer.bearer(jti="j3")):
        with pytest.raises(Overloaded) as caught:
            access.identify(AWAY, bearer)
        assert 0 < caught.value.retry_after <= 1
    assert len(verified) == FAILURES_AT_ONCE + 2
    clocks.move(1.0)
    assert access.identify(AWAY, writer.bearer(jti="j3"))


def test_what_costs_no_signature_holds_up_no_good_token_of_the_same_address(tmp_path: Path, clocks: Clocks) -> None:
    writer = AccessWriter(tmp_path)
    access = access_of(writer, clocks)
    foreign = writer.bearer(header={"kid": "unknown"})
    for _ in range(FAILURES_AT_ONCE + 20):
        refused(access, AWAY, b"Bearer x")
        refused(access, AWAY, foreign)
    assert access.identify(AWAY, writer.bearer()).client == "c"


def test_a_verified_token_needs_no_second_look_at_its_signature_when_files_change(
    tmp_path: Path, clocks: Clocks, verified: list[int]
) -> None:
    writer = AccessWriter(tmp_path)
    access = access_of(writer, clocks)
    good, revoked = writer.bearer(sub="c"), writer.bearer(jti="j2")
    access.identify(AWAY, good)
    access.identify(AWAY, revoked)
    writer.revoked.write_text("jti j2\n")
    writer.write("[clients.c]\nadmin = true\n")
    clocks.move(LOOK_SECONDS)
    for number in range(FAILURES_AT_ONCE):
        refused(access, AWAY, forged(writer, number))
    before = len(verified)
    assert access.identify(AWAY, good).admin, "the new settings count"
    assert refused(access, AWAY, revoked) == "the token has been revoked"
    assert len(verified) == before
    writer.write('audience = "elsewhere"\n')
    clocks.move(LOOK_SECONDS)
    assert "audience" in refused(access, AWAY, good)
    assert len(verified) == before


def test_a_key_that_is_replaced_under_its_name_ends_the_tokens_of_the_old_one(tmp_path: Path, clocks: Clocks) -> None:
    writer = AccessWriter(tmp_path)
    access = access_of(writer, clocks)
    bearer = writer.bearer()
    access.identify(AWAY, bearer)
    writer.add_key(Ed25519PrivateKey.generate()).replace(tmp_path / "keys" / f"{writer.kid}.pem")
    clocks.move(LOOK_SECONDS)
    assert "signature" in refused(access, AWAY, bearer)


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows with every file that is parsed."""
    found: list[str] = []

    def load(plain: Callable[[Path], Any], path: Path) -> Any:
        found.append(path.name)
        return plain(path)

    for name in ("load_settings", "_load_keys", "load_revoked"):
        monkeypatch.setattr(files, name, partial(load, getattr(files, name)))
    return found


def test_only_the_file_that_changed_is_parsed_and_a_broken_one_once(
    tmp_path: Path, clocks: Clocks, parsed: list[str]
) -> None:
    writer = AccessWriter(tmp_path)
    access = access_of(writer, clocks)
    assert parsed == ["access.toml", "keys", "revoked.txt"]

    def looked() -> list[str]:
        parsed.clear()
        for _ in range(3):
            clocks.move(LOOK_SECONDS)
            assert access.revision
        return parsed

    assert looked() == []
    writer.revoked.write_text("jti j1\n")
    assert looked() == ["revoked.txt"]
    writer.write("require_tls = false\n")
    assert looked() == ["access.toml"]
    (tmp_path / "keys" / "broken.pem").write_text("no key")
    assert looked() == ["keys"]
    writer.path.write_text("broken = [")
    assert looked() == ["access.toml"]


def test_a_broken_key_file_keeps_no_revocation_from_counting(tmp_path: Path, clocks: Clocks) -> None:
    writer = AccessWriter(tmp_path)
    access = access_of(writer, clocks)
    bearer = writer.bearer()
    access.identify(AWAY, bearer)
    (tmp_path / "keys" / "broken.pem").write_text("no key")
    writer.path.write_text("broken = [")
    clocks.move(LOOK_SECONDS)
    assert access.identify(AWAY, bearer)
    writer.revoked.write_text("jti j1\n")
    clocks.move(LOOK_SECONDS)
    assert "revoked" in refused(access, AWAY, bearer)


def test_an_access_file_is_no_larger_than_what_is_read_between_two_requests(tmp_path: Path, clocks: Clocks) -> None:
    table = '[clients."gateway-%d"]\ntenant = "t"\n'
    writer = AccessWriter(tmp_path, "".join(table % number for number in range(1500)))
    access_of(writer, clocks)
    writer.path.write_text("#" * (settings.MAX_ACCESS_BYTES + 1))
    with pytest.raises(InvalidAccess, match="more than"):
        access_of(writer, clocks)


def test_local_callers_are_identified_for_good(tmp_path: Path, clocks: Clocks) -> None:
    access = access_of(AccessWriter(tmp_path), clocks)
    assert access.identify(HERE, None).expires == inf
