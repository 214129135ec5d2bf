"""The authority is made once, rolls over without losing anybody, and signs for every name it is reached by."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509

from cloud_hub.authority import LEAD_SECONDS, Authority, open_authority
from cloud_hub.certificate_parts import fingerprint, new_key, private_pem
from cloud_hub.certificates import HubCertificates
from cloud_hub.errors import Conflict
from models.errors import NotFound
from sync.credentials import trusting
from sync.errors import InvalidConfig, Malformed
from sync.testing import FakeClock

NOW = time.time()


def handshake(folder: Path, server: Authority, trusted: str, name: str = "127.0.0.1") -> None:
    """A TLS connection to a server of `server`'s, by somebody who trusts `trusted`. Raises ssl.SSLError."""
    key = new_key()
    (folder / "s.crt").write_bytes(server.issue_server(key.public_key(), ("127.0.0.1", "::1", "hub.test"), NOW).chain)
    (folder / "s.key").write_bytes(private_pem(key))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "s.crt", folder / "s.key")
    ours, theirs = socket.socketpair()

    def serve() -> None:
        try:
            context.wrap_socket(theirs, server_side=True).close()
        except OSError:
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        trusting(trusted)().wrap_socket(ours, server_hostname=name).close()
    finally:
        ours.close()
        thread.join()


def test_it_is_made_once_and_found_again(tmp_path: Path) -> None:
    first = open_authority(tmp_path / "ca", NOW)
    again = open_authority(tmp_path / "ca", NOW + 100)
    assert first.bundle() == again.bundle()
    assert stat.S_IMODE((tmp_path / "ca" / "1" / "key.pem").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "ca").stat().st_mode) == 0o700


def test_two_that_race_end_up_with_one(tmp_path: Path) -> None:
    """The second rename fails: an authority in place is never written over."""
    open_authority(tmp_path / "ca", NOW)
    staged = tmp_path / "ca" / ".1.new"
    staged.mkdir()
    (staged / "key.pem").write_text("of the slower one")
    with pytest.raises(OSError):
        os.rename(staged, tmp_path / "ca" / "1")


def test_one_whose_files_are_gone_is_not_made_anew(tmp_path: Path) -> None:
    open_authority(tmp_path / "ca", NOW)
    (tmp_path / "ca" / "1").rename(tmp_path / "lost")
    with pytest.raises(InvalidConfig, match="backup"):
        open_authority(tmp_path / "ca", NOW)
    assert not (tmp_path / "ca" / "1").exists()


@pytest.mark.parametrize("name", ["127.0.0.1", "::1", "hub.test"])
def test_servers_are_good_under_each_of_their_names(tmp_path: Path, name: str) -> None:
    authority = open_authority(tmp_path / "ca", NOW)
    handshake(tmp_path, authority, authority.bundle().decode(), name)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(tmp_path, authority, authority.bundle().decode(), "elsewhere.test")


def test_two_calls_for_the_next_one_at_once_make_one(tmp_path: Path) -> None:
    authority = open_authority(tmp_path / "ca", NOW)
    outcomes: list[object] = []

    def add() -> None:
        try:
            outcomes.append(authority.add_next(NOW))
        except Conflict:
            outcomes.append(None)

    threads = [threading.Thread(target=add) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes, key=str) == [2] + [None] * 5
    assert open_authority(tmp_path / "ca", NOW).numbers == (1, 2)


def test_a_key_that_everybody_may_use_is_refused(tmp_path: Path) -> None:
    open_authority(tmp_path / "ca", NOW)
    key = tmp_path / "ca" / "1" / "key.pem"
    key.chmod(0o640)
    open_authority(tmp_path / "ca", NOW)
    key.chmod(0o644)
    with pytest.raises(InvalidConfig, match="everybody"):
        open_authority(tmp_path / "ca", NOW)
    with pytest.raises(InvalidConfig, match="everybody"):
        open_authority(tmp_path / "none", NOW, (tmp_path / "ca" / "1" / "cert.pem", key))


@pytest.mark.parametrize(("name", "content"), [("issuing", b""), ("issuing", b"x"), ("2/cross.pem", b"")])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    open_authority(tmp_path / "ca", NOW).add_next(NOW)
    (tmp_path / "ca" / name).write_bytes(content)
    with pytest.raises(InvalidConfig, match=name):
        open_authority(tmp_path / "ca", NOW)


def test_a_revocation_list_is_signed_again_only_when_it_changes(tmp_path: Path) -> None:
    authority = open_authority(tmp_path / "ca", NOW)
    first = authority.revocation_list([(1, "aa", NOW)], NOW)
    assert authority.revocation_list([(1, "aa", NOW)], NOW + 5) is first
    assert authority.revocation_list([], NOW) != first
    assert authority.revocation_list([(1, "aa", NOW)], NOW + 5) != first
    authority.add_next(NOW)
    assert authority.revocation_list([(1, "aa", NOW)], NOW).count(b"BEGIN") == 2


@pytest.mark.parametrize("name", ["_hub-1", "_hub-1.x", "hub", "a.b.c", "A.b"])
def test_no_node_gets_a_name_of_the_hub(tmp_path: Path, name: str) -> None:
    authority = open_authority(tmp_path / "ca", NOW)
    with pytest.raises(Malformed):
        authority.issue_node(new_key().public_key(), name, (), NOW)


def test_rolling_over_takes_two_lifetimes_and_loses_nobody(tmp_path: Path) -> None:
    authority = open_authority(tmp_path / "ca", NOW)
    old = authority.bundle().decode()
    with pytest.raises(Conflict, match="no newer"):
        authority.switch(NOW)
    assert authority.add_next(NOW) == 2
    with pytest.raises(Conflict, match="already waiting"):
        authority.add_next(NOW)
    both = authority.bundle().decode()
    assert both.count("BEGIN CERTIFICATE") == 2
    with pytest.raises(Conflict, match=r"14\.0 more days"):
        authority.switch(NOW)
    handshake(tmp_path, authority, old)
    assert authority.switch(NOW + LEAD_SECONDS) == 2
    reopened = open_authority(tmp_path / "ca", NOW)
    assert reopened.issuing == 2
    # Who renewed meanwhile trusts both; who was away knows the old one, from which the cross certificate leads on.
    handshake(tmp_path, reopened, both)
    handshake(tmp_path, reopened, old)
    with pytest.raises(Conflict, match="in use"):
        reopened.retire(1, NOW, in_use=True)
    with pytest.raises(NotFound):
        reopened.retire(7, NOW, in_use=False)
    reopened.retire(1, NOW, in_use=False)
    assert reopened.bundle().decode().count("BEGIN CERTIFICATE") == 1
    assert open_authority(tmp_path / "ca", NOW).numbers == (2,)


def test_a_revocation_list_names_each_authoritys_own_and_does_not_lapse(tmp_path: Path) -> None:
    authority = open_authority(tmp_path / "ca", NOW)
    authority.add_next(NOW)
    lists = authority.revocation_list([(1, "aa", NOW), (2, "bb", NOW)], NOW)
    parts = lists.decode().split("-----END X509 CRL-----\n")
    first, second = (x509.load_pem_x509_crl((part + "-----END X509 CRL-----\n").encode()) for part in parts[:2])
    assert [entry.serial_number for entry in first] == [0xAA]
    assert [entry.serial_number for entry in second] == [0xBB]
    assert first.next_update_utc is not None
    assert first.next_update_utc.timestamp() > NOW + 9 * 365 * 86_400


def test_an_external_authority_issues_and_is_trusted_by_its_root(tmp_path: Path) -> None:
    above = open_authority(tmp_path / "root", NOW)
    above.add_next(NOW)  # its second one, signed by the first, stands for an intermediate
    chain = (tmp_path / "root" / "2" / "cross.pem").read_bytes() + (tmp_path / "root" / "1" / "cert.pem").read_bytes()
    (tmp_path / "chain.pem").write_bytes(chain)
    files = (tmp_path / "chain.pem", tmp_path / "root" / "2" / "key.pem")
    external = open_authority(tmp_path / "unused", NOW, files)
    root = (tmp_path / "root" / "1" / "cert.pem").read_text()
    assert external.bundle().decode() == root
    assert external.pin() == fingerprint(x509.load_pem_x509_certificate(root.encode()))
    handshake(tmp_path, external, root)
    with pytest.raises(Conflict, match="external"):
        external.add_next(NOW)
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize(
    ("chain", "key", "match"),
    [
        ("1/cert.pem", "2/key.pem", "first certificate"),
        ("2/cross.pem", "2/key.pem", "self-signed"),
        ("x", "x", "No such"),
    ],
)
def test_an_external_authority_whose_files_do_not_fit_is_refused(
    tmp_path: Path, chain: str, key: str, match: str
) -> None:
    open_authority(tmp_path / "ca", NOW).add_next(NOW)
    with pytest.raises(InvalidConfig, match=match):
        open_authority(tmp_path / "none", NOW, (tmp_path / "ca" / chain, tmp_path / "ca" / key))


@pytest.mark.parametrize("name", ["", "-x", "a b", "x" * 300, "*.example.org", "http://x"])
def test_a_public_name_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    own = HubCertificates(tmp_path / "tls", open_authority(tmp_path / "ca", NOW), (name,), FakeClock(NOW))
    with pytest.raises(InvalidConfig, match="neither a host name nor"):
        own.refresh()


def test_the_hubs_own_certificate_changes_with_its_names_its_age_and_its_authority(tmp_path: Path) -> None:
    clock, authority = FakeClock(NOW), open_authority(tmp_path / "ca", NOW)
    seen: list[bytes] = []

    def refresh(*names: str) -> bool:
        own = HubCertificates(tmp_path / "tls", authority, names, clock)
        own.refresh()
        changed = own.server[0].read_bytes() not in seen
        seen.append(own.server[0].read_bytes())
        return changed

    assert refresh("10.0.0.1")
    assert not refresh("10.0.0.1")
    assert refresh("10.0.0.1", "hub.example.org")
    clock.advance(21 * 86_400)
    assert refresh("10.0.0.1", "hub.example.org")
    authority.add_next(clock.wall())
    authority.switch(clock.wall(), force=True)
    assert refresh("10.0.0.1", "hub.example.org")


def test_the_zone_of_an_address_goes_into_no_certificate(tmp_path: Path) -> None:
    own = HubCertificates(tmp_path / "tls", open_authority(tmp_path / "ca", NOW), ("fe80::1%eth0",), FakeClock(NOW))
    with pytest.raises(InvalidConfig, match="zone"):
        own.refresh()


async def test_nothing_ends_the_loop_that_keeps_the_hubs_certificates_young(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeClock(NOW)
    own = HubCertificates(tmp_path / "tls", open_authority(tmp_path / "ca", NOW), (), clock)
    tries: list[float] = []

    async def at_once(work: Callable[[], None]) -> None:
        tries.append(clock.wall())
        raise OverflowError("date value out of range")

    monkeypatch.setattr("cloud_hub.certificates.asyncio.to_thread", at_once)
    task = asyncio.create_task(own.keep_fresh())
    for _ in range(3):
        await asyncio.sleep(0)
        clock.advance(7200)
        await asyncio.sleep(0)
    assert len(tries) >= 2
    assert not task.done()
    task.cancel()
