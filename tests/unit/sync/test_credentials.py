"""Keys and certificates on the node: swapped whole, renewed in time, and never a reason to stop."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.hashes import SHA256

from sync import credentials
from sync.channel import LinkOptions, broker_address, reconnect_delay, spread
from sync.credentials import Identity, new_key, write_pair
from sync.enrol_messages import Challenge, Renew
from sync.errors import InvalidConfig, StoreFailed, Unavailable
from sync.hub_call import HubRefused
from sync.identity import Membership, load_config
from sync.renewal import LAST_RETRY_SECONDS, Renewal, due_at
from sync.testing import FakeClock
from sync.tunnel import read_proxy

NODE = "acme.edge-1"
DAY = 86_400.0
WEEK = 7 * DAY


def certificate(key: EllipticCurvePrivateKey, at: float, name: str = NODE, public: Any = None) -> str:
    from datetime import UTC, datetime, timedelta

    start = datetime.fromtimestamp(at, UTC)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(subject).serial_number(1)
    builder = builder.public_key(public or key.public_key())
    builder = builder.not_valid_before(start).not_valid_after(start + timedelta(days=7))
    return builder.sign(key, SHA256()).public_bytes(credentials.Encoding.PEM).decode()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(1_800_000_000.0)


@pytest.fixture
def identity(tmp_path: Path, clock: FakeClock) -> Identity:
    key = new_key()
    cert = certificate(key, clock.wall())
    write_pair(tmp_path / "identity", key, cert, cert)
    return Identity(tmp_path / "identity", clock)


def renew_into(identity: Identity, clock: FakeClock) -> None:
    key = new_key()
    identity.replace(key, certificate(key, clock.wall()), certificate(key, clock.wall()))


def test_a_new_pair_comes_in_one_step_and_links_follow_it(identity: Identity, clock: FakeClock, tmp_path: Path) -> None:
    folder = tmp_path / "identity"
    before = (folder / "key.pem").read_bytes()
    renew_into(identity, clock)
    assert (folder / "live").readlink() == Path("pair-2")
    assert (folder / "key.pem").read_bytes() != before
    assert (folder / "key.pem").read_bytes() == (folder / "pair-2" / "key.pem").read_bytes()
    assert (folder / "pair-2" / "key.pem").stat().st_mode & 0o777 == 0o600


def test_a_crash_before_the_step_leaves_the_old_pair_in_use(
    identity: Identity, clock: FakeClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(link: Path, target: str) -> None:
        raise OSError("no space left")

    before = identity.pair
    monkeypatch.setattr(credentials, "_point", crash)
    with pytest.raises(StoreFailed):
        renew_into(identity, clock)
    assert Identity(tmp_path / "identity", clock).pair.folder == before.folder


def test_the_old_pair_is_tried_in_between_and_goes_when_the_new_one_has_worked(
    identity: Identity, clock: FakeClock
) -> None:
    old = identity.pair.folder
    renew_into(identity, clock)
    shown = []
    for _ in range(6):
        identity.link_context()
        shown.append(identity._shown)
    assert [path == old for path in shown] == [False, False, True] * 2
    identity.connected()
    assert old.exists(), "it was the old one that worked"
    identity.link_context()
    identity.connected()
    assert not old.exists()


def test_a_key_that_others_may_read_or_of_another_certificate_is_refused(
    identity: Identity, clock: FakeClock, tmp_path: Path
) -> None:
    key = identity.pair.folder / "key.pem"
    key.chmod(0o644)
    with pytest.raises(InvalidConfig, match="0600"):
        Identity(tmp_path / "identity", clock)
    key.chmod(0o600)
    key.write_bytes(credentials.private_pem(new_key()))
    with pytest.raises(InvalidConfig, match="not that of the key"):
        Identity(tmp_path / "identity", clock)
    with pytest.raises(InvalidConfig, match="join"):
        Identity(tmp_path / "nothing", clock)


def test_a_bearer_token_says_who_for_whom_and_for_how_long(identity: Identity, clock: FakeClock) -> None:
    token = identity.bearer()
    claims = jwt.decode(
        token,
        identity.pair.key.public_key(),
        ["ES256"],
        audience="tierline-hub",
        options={"verify_exp": False, "verify_iat": False},
    )
    assert claims["sub"] == NODE
    assert claims["exp"] - claims["iat"] == 300
    assert identity.bearer() == token
    clock.advance(121)
    assert identity.bearer() != token
    newer = identity.bearer()
    clock.advance(-1000)
    assert identity.bearer() != newer, "a clock that was set back makes a new one"


def test_renewal_is_due_at_a_third_of_the_life_spread_over_a_tenth() -> None:
    assert due_at(0, 30, lambda low, high: low) == 10
    assert due_at(0, 30, lambda low, high: high) == 13


class FakeHub:
    """Answers renewals; `down` and `refuse` make it not."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.down = False
        self.refuse = False
        self.asked: list[float] = []
        self.more: dict[str, Any] = {}

    def call(self, url: str, body: Any, context: Any, proxy: str | None = None) -> bytes:
        if isinstance(body, Challenge):
            self.asked.append(self.clock.wall())
            if self.down:
                raise Unavailable("away")
            return b'{"nonce":"n"}'
        assert isinstance(body, Renew)
        if self.refuse:
            raise HubRefused(403, "the node was revoked")
        request = x509.load_pem_x509_csr(body.csr.encode())
        signer = new_key()
        cert = certificate(signer, self.clock.wall(), public=request.public_key())
        answer = {
            "node": NODE,
            "tier": "edge",
            "certificate": cert,
            "bundle": cert,
            "trust": "",
            "trust_name": "root.json",
        }
        return json.dumps(answer | {"fleet": 500} | self.more).encode()


async def passing(clock: FakeClock, seconds: float, step: float = 600.0) -> None:
    """Let time pass."""
    for _ in range(int(seconds / step)):
        clock.advance(step)
        for _ in range(4):
            await asyncio.sleep(0)


@pytest.fixture
def hub(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    async def at_once(work: Any, *arguments: Any) -> Any:
        return work(*arguments)

    hub = FakeHub(clock)
    monkeypatch.setattr("sync.renewal.asyncio.to_thread", at_once)  # time must not pass meanwhile
    monkeypatch.setattr("sync.renewal.call", hub.call)
    return hub


async def test_a_certificate_never_gets_old_while_the_hub_is_there(
    identity: Identity, clock: FakeClock, hub: FakeHub
) -> None:
    renewal = Renewal(identity, "https://hub", clock)
    task = asyncio.create_task(renewal.run())
    for _ in range(30):
        await passing(clock, DAY, 900)
        assert identity.pair.not_after > clock.wall() + DAY
    assert 9 <= renewal.renewed <= 13
    assert renewal.fleet_size == 500
    task.cancel()


async def test_four_hundred_days_without_the_hub_end_with_one_renewal(
    identity: Identity, clock: FakeClock, hub: FakeHub, tmp_path: Path
) -> None:
    hub.down = True
    renewal = Renewal(identity, "https://hub", clock)
    task = asyncio.create_task(renewal.run())
    for _ in range(400):
        await passing(clock, DAY, DAY)
    assert identity.pair.not_after < clock.wall()
    assert identity.bearer(), "an expired certificate's key still signs"
    assert Identity(tmp_path / "identity", clock).pair.folder == identity.pair.folder, "and a restart finds it"
    hub.down = False
    await passing(clock, 2 * LAST_RETRY_SECONDS + 20, 60)
    assert renewal.renewed == 1
    assert identity.pair.not_after > clock.wall()
    task.cancel()


@pytest.mark.parametrize("kept", [None, b"", b"{", b'{"origins": 7}'])
async def test_a_node_that_was_not_told_where_its_hub_is_asks_at_once_and_keeps_the_answer(
    identity: Identity, clock: FakeClock, hub: FakeHub, tmp_path: Path, kept: bytes | None
) -> None:
    note = identity.pair.folder / credentials.HUB
    if kept is None:
        note.unlink()  # the pair is of an earlier release
    else:
        note.write_bytes(kept)
    hub.more = {"sources": ["https://hub.example.org", "nonsense"]}
    identity = Identity(tmp_path / "identity", clock)
    assert identity.hub_origins == ()
    renewal = Renewal(identity, "https://10.0.0.5:8443", clock)
    task = asyncio.create_task(renewal.run())
    await passing(clock, DAY)
    assert renewal.renewed == 1
    assert Identity(tmp_path / "identity", clock).hub_origins == ("https://hub.example.org:443",)
    task.cancel()


async def test_a_hub_that_says_no_is_asked_seldom_and_serving_goes_on(
    identity: Identity, clock: FakeClock, hub: FakeHub
) -> None:
    hub.refuse = True
    renewal = Renewal(identity, "https://hub", clock, uniform=lambda low, high: (low + high) / 2)
    task = asyncio.create_task(renewal.run())
    await passing(clock, 3 * DAY)
    assert renewal.trouble is not None
    assert "revoked" in renewal.trouble
    assert len(hub.asked) <= 24
    assert not task.done()
    task.cancel()


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("mqtt://h", ("h", 1883, False, None)),
        ("mqtts://h", ("h", 8883, True, None)),
        ("ws://h:81", ("h", 81, False, "/mqtt")),
        ("wss://h/broker", ("h", 443, True, "/broker")),
        ("mqtts://[::1]:9", ("::1", 9, True, None)),
    ],
)
def test_broker_addresses_are_read(url: str, expected: tuple[object, ...]) -> None:
    address = broker_address(url)
    assert (address.host, address.port, address.tls, address.path) == expected


@pytest.mark.parametrize(
    "url", ["", "h:1", "http://h", "mqtt://", "mqtts://u:p@h", "mqtt://h/path", "wss://h?x", "mqtt://h:x"]
)
def test_what_is_no_broker_is_refused(url: str) -> None:
    with pytest.raises(InvalidConfig, match="broker"):
        broker_address(url)


@pytest.mark.parametrize(
    "url", ["", "h:1", "https://p:1", "http://p", "http://u:geheim@p", "socks5://p:1", "http://p:1/x"]
)
def test_a_proxy_that_is_none_is_refused_without_repeating_its_password(url: str) -> None:
    with pytest.raises(InvalidConfig, match="proxy") as caught:
        read_proxy(url)
    assert "geheim" not in str(caught.value)


def test_reconnecting_spreads_over_the_fleet_as_the_hub_counts_it() -> None:
    options = LinkOptions(url="mqtt://h", client_id="c", fleet_size=1)
    high = lambda low, high: high  # noqa: E731
    assert (spread(1), spread(1000), spread(10**6)) == (0.01, 10.0, 120.0)
    assert reconnect_delay(1, options, high, 10_000) - reconnect_delay(1, options, high) == pytest.approx(100.0 - 0.01)


@pytest.mark.parametrize(
    ("lines", "match"),
    [
        ('broker = "mqtts://h"', "either identity"),
        ('broker = "mqtts://h"\ncredential = "t"\nidentity = "i"', "either identity"),
        ('broker = "mqtt://127.0.0.1"\nidentity = "i"', "mqtts or wss"),
        ('broker = "mqtt://10.0.0.1"\ncredential = "t"', "use TLS"),
        ('broker = "mqtts://h"\nidentity = "i"\nhub = "http://10.0.0.1"', "node.hub"),
        ('broker = "mqtts://h"\nidentity = "i"\nproxy = "socks://x"', "proxy"),
        ('broker = "mqtts://h"\nidentity = "i"\nsources = ["http://10.0.0.1"]', "use TLS"),
    ],
)
def test_a_configuration_that_would_speak_in_the_open_is_refused(tmp_path: Path, lines: str, match: str) -> None:
    path = tmp_path / "node.toml"
    path.write_text(f'id = "{NODE}"\ntier = "edge"\nroot = "root.json"\ndata = "."\n{lines}\n')
    with pytest.raises(InvalidConfig, match=match):
        load_config(path, Membership)


def test_an_identity_of_another_node_is_refused(identity: Identity, tmp_path: Path) -> None:
    membership = Membership(
        id="acme.edge-2",
        tier="edge",
        broker="mqtts://h",
        root=tmp_path / "root.json",
        identity=tmp_path / "identity",
        data=tmp_path,
    )
    with pytest.raises(InvalidConfig, match=r"that of acme\.edge-1"):
        membership.credentials()


async def test_a_clock_that_is_days_ahead_does_not_renew_without_a_pause(
    identity: Identity, clock: FakeClock, hub: FakeHub
) -> None:
    hub.clock = FakeClock(clock.wall())
    clock.advance(3 * DAY)  # so that each new certificate looks three days old
    renewal = Renewal(identity, "https://hub", clock)
    task = asyncio.create_task(renewal.run())
    await passing(clock, 6 * 3600, 60)
    assert 1 <= renewal.renewed <= 6
    task.cancel()


async def test_a_clock_that_is_set_back_after_a_failure_does_not_put_renewal_off(
    identity: Identity, clock: FakeClock, hub: FakeHub
) -> None:
    clock._wall += 365 * DAY
    hub.down = True
    renewal = Renewal(identity, "https://hub", clock)
    task = asyncio.create_task(renewal.run())
    await passing(clock, 600, 60)
    assert hub.asked
    clock._wall -= 365 * DAY
    hub.down = False
    await passing(clock, 4 * DAY, 900)
    assert renewal.renewed >= 1
    task.cancel()


def test_a_pair_that_came_into_use_meanwhile_is_never_deleted(
    identity: Identity, clock: FakeClock, tmp_path: Path
) -> None:
    """A renewal under way outlives its node; the node that was started again read the pair before."""
    again = Identity(tmp_path / "identity", clock)
    renew_into(identity, clock)
    for _ in range(3):
        again.link_context()
        assert again._shown == again.pair.folder
    again.connected()
    assert Identity(tmp_path / "identity", clock).pair.folder == identity.pair.folder


@pytest.mark.parametrize(
    "url", ["mqtt://u:geheim@h", "mqtts://u:geheim@h:x", "http://u:geheim@h", "mqtt://u:a@geheim@h"]
)
def test_a_password_in_a_brokers_address_is_not_repeated(url: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        broker_address(url)
    assert "geheim" not in str(caught.value)
