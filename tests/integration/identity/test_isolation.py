"""What one node can do to another at the broker: nothing. Judged by what is delivered, never by what is acknowledged."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from cloud_hub.authority import Authority, Certificate, open_authority
from cloud_hub.certificate_parts import new_key, private_pem
from cloud_hub.certificate_requests import PublicKey, read_request
from deploy.broker import Broker, Secure, find_mosquitto
from deploy.processes import free_port
from sync.credentials import trusting
from sync.topics import access_list

pytestmark = [
    pytest.mark.broker,
    pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed: isolation was NOT tested"),
]
VICTIM, THIEF, STRANGER = "acme.edge-1", "acme.edge-2", "other.edge-1"
NODES = (VICTIM, THIEF, STRANGER)
GROUPS = ((VICTIM, "line-1"),)
WAIT = 0.4
"""Seconds in which something that must not arrive would have arrived: what is allowed takes a hundredth of it."""


class Guarded:
    """A broker as `tierline broker` configures it, and certificates of an authority of ours."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = open_authority(folder / "ca", time.time())
        self.secure = Secure(("127.0.0.1",), free_port(), "127.0.0.1")
        self.broker = Broker(folder / "broker", secure=self.secure)
        self.clients: list[Client] = []

        key, _ = read_request(self.broker.request())
        issued = self.authority.issue_server(key, ("127.0.0.1",), time.time())
        self.broker.install(issued.chain.decode(), self.authority.bundle().decode())
        self.admit()
        self.broker.start()

    def admit(self, denied: tuple[str, ...] = (), revoked: tuple[Certificate, ...] = ()) -> None:
        lists = [(each.issuer, each.serial, time.time()) for each in revoked]
        crl = self.authority.revocation_list(lists, time.time()).decode()
        self.broker.admit("", access_list(NODES, GROUPS, denied), crl)

    def certificate(self, name: str, **more: Any) -> tuple[Certificate, Callable[[], ssl.SSLContext]]:
        return self.made(lambda key: self.authority.issue_client(key, name, time.time(), **more), self.authority)

    def made(
        self, issue: Callable[[PublicKey], Certificate], authority: Authority
    ) -> tuple[Certificate, Callable[[], ssl.SSLContext]]:
        key = new_key()
        issued = issue(key.public_key())
        folder = self.folder / issued.serial
        folder.mkdir()
        (folder / "crt").write_bytes(issued.chain)
        (folder / "key").write_bytes(private_pem(key))

        def context() -> ssl.SSLContext:
            made = trusting(self.authority.bundle().decode())()
            made.load_cert_chain(folder / "crt", folder / "key")
            return made

        return issued, context

    def connect(self, name: str, context: ssl.SSLContext | None = None, **options: Any) -> Client:
        client = Client(self.secure.port, name, context or self.certificate(name)[1](), **options)
        self.clients.append(client)
        return client

    def stop(self) -> None:
        for client in self.clients:
            client.close()
        self.broker.stop()


class Client:
    def __init__(
        self,
        port: int,
        client_id: str,
        context: ssl.SSLContext,
        *,
        username: str | None = None,
        will: str | None = None,
        version: MQTTProtocolVersion = MQTTProtocolVersion.MQTTv5,
        password: str | None = None,
    ) -> None:
        self.got: list[tuple[str, bytes]] = []
        self.connected = self.ended = False
        self._client = paho.Client(CallbackAPIVersion.VERSION2, client_id, protocol=version, reconnect_on_failure=False)
        self._client.tls_set_context(context)
        if username is not None:
            self._client.username_pw_set(username, password)
        if will is not None:
            self._client.will_set(will, b"from the will", qos=1, retain=True)
        self._client.on_connect = self._on_connect
        self._client.on_disconnect = self._on_disconnect
        self._client.on_message = lambda _client, _data, message: self.got.append((message.topic, message.payload))
        try:
            self._client.connect("127.0.0.1", port)
            self._client.loop_start()
        except OSError:
            self.ended = True
        until(lambda: self.connected or self.ended)

    def _on_connect(self, client: Any, data: Any, flags: Any, reason: Any, properties: Any) -> None:
        self.connected = not reason.is_failure

    def _on_disconnect(self, client: Any, data: Any, flags: Any, reason: Any, properties: Any) -> None:
        self.connected, self.ended = False, True

    def subscribe(self, *filters: str) -> None:
        for item in filters:
            self._client.subscribe(item, qos=1)
        time.sleep(0.1)

    def publish(self, topic: str, payload: bytes = b"x", *, retain: bool = False) -> None:
        self._client.publish(topic, payload, qos=1, retain=retain)

    def cut(self) -> None:
        """End without a goodbye, so that the will is spoken."""
        sock = self._client.socket()
        assert sock is not None
        sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


def until(check: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not check():
        if time.monotonic() > end:
            pytest.fail(f"not within {seconds:g} s")
        time.sleep(0.005)


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Guarded]:
    site = Guarded(tmp_path)
    yield site
    site.stop()


SPIES = (
    "#",
    "+/+/+/+/+",
    "tierline/v1/#",
    f"tierline/v1/{VICTIM}/#",
    f"tierline/v1/{VICTIM}/down/desired",
    "tierline/v1/+/down/#",
    "tierline/v1/+/up/#",
    f"$share/spies/tierline/v1/{VICTIM}/down/#",
    "$share/hub/tierline/v1/+/up/#",
    "tierline/v1/_t/acme/policy",
    "tierline/v1/_g/acme.line-1/policy",
    "$SYS/#",
)


def test_a_node_hears_nothing_that_is_not_meant_for_it(guarded: Guarded) -> None:
    hub = guarded.connect("_hub-1")
    hub.subscribe("tierline/v1/+/up/event")
    hub.publish(f"tierline/v1/{VICTIM}/down/desired", b"kept", retain=True)
    hub.publish("tierline/v1/_t/acme/policy", b"kept", retain=True)
    victim, spy = guarded.connect(VICTIM), guarded.connect(STRANGER)
    victim.subscribe(f"tierline/v1/{VICTIM}/down/#", "tierline/v1/_t/acme/policy", "tierline/v1/_g/acme.line-1/policy")
    spy.subscribe(*SPIES)
    hub.publish(f"tierline/v1/{VICTIM}/down/job", b"live")
    hub.publish("tierline/v1/_g/acme.line-1/policy", b"live")
    victim.publish(f"tierline/v1/{VICTIM}/up/event", b"live")
    hub.publish(f"tierline/v1/{STRANGER}/down/job", b"own")
    until(lambda: len(victim.got) >= 4 and len(hub.got) >= 1)
    time.sleep(WAIT)
    # Its own message comes once for each filter that matches it: that the spy hears at all is what makes silence tell.
    assert {topic for topic, _ in spy.got} == {f"tierline/v1/{STRANGER}/down/job"}


def test_a_node_cannot_say_anything_in_anothers_place(guarded: Guarded) -> None:
    hub = guarded.connect("_hub-1")
    hub.subscribe("#")
    victim = guarded.connect(VICTIM)
    victim.subscribe(f"tierline/v1/{VICTIM}/down/#", "tierline/v1/_t/acme/policy", "tierline/v1/_hub/state")
    thief = guarded.connect(THIEF, will=f"tierline/v1/{VICTIM}/up/state")
    for topic in (
        f"tierline/v1/{VICTIM}/up/state",
        f"tierline/v1/{VICTIM}/down/desired",
        f"tierline/v1/{THIEF}/down/desired",
        "tierline/v1/_t/acme/policy",
        "tierline/v1/_hub/state",
        f"tierline/v1/{THIEF}/../{VICTIM}/up/state",
    ):
        thief.publish(topic, b"forged", retain=True)
    thief.publish(f"tierline/v1/{THIEF}/up/event", b"own")
    until(lambda: bool(hub.got))
    thief.cut()
    late = guarded.connect(STRANGER)
    late.publish(f"tierline/v1/{STRANGER}/up/event", b"own")
    until(lambda: len(hub.got) >= 2)
    time.sleep(WAIT)
    assert hub.got == [(f"tierline/v1/{THIEF}/up/event", b"own"), (f"tierline/v1/{STRANGER}/up/event", b"own")]
    assert victim.got == []


@pytest.mark.parametrize("claim", ["client id", "user name", "hub"])
def test_a_node_can_neither_be_another_nor_evict_it(guarded: Guarded, claim: str) -> None:
    name = "_hub-1" if claim == "hub" else VICTIM
    victim = guarded.connect(name)
    _, context = guarded.certificate(THIEF)
    username = VICTIM if claim == "user name" else None
    thief = guarded.connect(name, context(), username=username)
    thief.publish(f"tierline/v1/{VICTIM}/up/event", b"forged")
    time.sleep(WAIT)
    assert victim.connected
    assert not victim.ended


def test_two_connections_of_one_certificate_are_one_node(guarded: Guarded) -> None:
    """The control of the test above: it is the certificate's name that counts, and evicts."""
    _, context = guarded.certificate(VICTIM)
    first = guarded.connect("any", context())
    guarded.connect("other", context())
    until(lambda: first.ended)


@pytest.mark.parametrize("what", ["none", "foreign", "expired", "not yet valid"])
def test_no_foreign_or_outdated_certificate_is_let_in(guarded: Guarded, tmp_path: Path, what: str) -> None:
    now = time.time()
    contexts = {
        "none": trusting(guarded.authority.bundle().decode()),
        "expired": guarded.made(
            lambda key: guarded.authority.issue_node(key, VICTIM, (), now - 8 * 86_400), guarded.authority
        )[1],
        "not yet valid": guarded.made(
            lambda key: guarded.authority.issue_node(key, VICTIM, (), now + 86_400), guarded.authority
        )[1],
    }
    if what == "foreign":
        foreign = open_authority(tmp_path / "foreign", now)
        contexts[what] = guarded.made(lambda key: foreign.issue_node(key, VICTIM, (), now), foreign)[1]
    assert not guarded.connect(VICTIM, contexts[what]()).connected
    assert guarded.connect(VICTIM).connected


def test_a_revoked_certificate_is_refused_and_its_live_connection_is_mute_at_once(guarded: Guarded) -> None:
    hub = guarded.connect("_hub-1")
    hub.subscribe("tierline/v1/+/up/#")
    stolen, context = guarded.certificate(VICTIM)
    thief = guarded.connect(VICTIM, context())
    guarded.admit(denied=(VICTIM,), revoked=(stolen,))
    time.sleep(WAIT)
    thief.publish(f"tierline/v1/{VICTIM}/up/event", b"after")
    time.sleep(WAIT)
    assert hub.got == []
    assert not guarded.connect(VICTIM, context()).connected
    assert guarded.connect(THIEF).connected


def test_shared_subscriptions_are_no_way_around(guarded: Guarded) -> None:
    hub, thief = guarded.connect("_hub-1"), guarded.connect(THIEF)
    thief.subscribe("$share/all/#")
    hub.publish(f"tierline/v1/{VICTIM}/down/job", b"secret")
    time.sleep(WAIT)
    assert thief.got == []


def test_a_session_with_subscriptions_does_not_pass_to_another(guarded: Guarded) -> None:
    """What waits for a node that is away waits for its certificate alone."""
    hub = guarded.connect("_hub-1")
    victim = guarded.connect(VICTIM, version=MQTTProtocolVersion.MQTTv311)
    victim.subscribe(f"tierline/v1/{VICTIM}/down/#")
    victim.close()
    hub.publish(f"tierline/v1/{VICTIM}/down/job", b"waiting")
    _, context = guarded.certificate(THIEF)
    thief = guarded.connect(VICTIM, context(), version=MQTTProtocolVersion.MQTTv311)
    time.sleep(WAIT)
    assert thief.got == []
