"""The way to the hub: names, ports, certificates, clocks."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from datetime import UTC
from email.utils import parsedate_to_datetime

import msgspec

from sync.doctor.check import Check, Finding, Skipped, duration, fail, ok, warn
from sync.doctor.reach import Place, Reply, connect, explain_socket, explain_tls, get, resolve, shake_hands
from sync.doctor.subject import NodeSubject
from sync.errors import SyncError
from sync.trust import CLOCK_LEEWAY
from sync.tunnel import read_proxy

TLS_SECONDS = 3 * 86_400.0
"""Life left in a certificate at which it should have been renewed: the hub's own live 30 days and are renewed after 20."""
SKEW_SECONDS = 30.0
CLOCK_FIX = "set the clock (see machine.time): certificates and documents are judged by it"


class _Signed(msgspec.Struct, frozen=True):
    issued: float = msgspec.field(name="x-issued", default=0.0)
    version: int = 0


class _Timestamp(msgspec.Struct, frozen=True):
    signed: _Signed


def check_names(subject: NodeSubject) -> Finding:
    def look(place: Place) -> str:
        host, port = place.host, place.port
        if place.proxy is not None:
            return f"{place.name} through the proxy"
        addresses = resolve(host, port)
        return host if addresses == [host] else f"{host} = {', '.join(addresses[:3])}"

    return _each(subject.places(), look, lambda error: f"is not resolved ({error.strerror or error})")


def check_ports(subject: NodeSubject) -> Finding:
    def look(place: Place) -> str:
        connect(place).close()
        return place.name

    return _each(subject.places(), look, explain_socket, "connected: ")


def check_tls(subject: NodeSubject) -> Finding:
    places = [place for place in subject.places() if place.tls is not None]
    if not places:
        raise Skipped("nothing here uses TLS: everything is on this machine")
    good, soon = list[str](), list[str]()
    bad, fixes = list[str](), list[str]()
    for place in places:
        try:
            left = shake_hands(place)
        except ssl.SSLError as error:
            what, fix = explain_tls(error)
            bad.append(f"{place.name}: {what}")
            fixes.append(fix)
            continue
        except OSError as error:
            bad.append(f"{place.name}: {explain_socket(error)}")
            fixes.append("see network.ports")
            continue
        (soon if left < TLS_SECONDS else good).append(f"{place.name}, {duration(left)} left")
    if bad:
        return fail("; ".join(bad), "; ".join(dict.fromkeys(fixes)))
    if soon:
        return warn(f"expires soon: {'; '.join(soon)}", "see that the hub runs and renews its certificates (hub.names)")
    return ok("; ".join(good))


def check_proxy(subject: NodeSubject) -> Finding:
    if subject.node.proxy is None:
        raise Skipped("no proxy is configured")
    proxy = read_proxy(subject.node.proxy)
    try:
        connect(Place(("proxy",), "", proxy.host, proxy.port)).close()
    except OSError as error:
        return fail(f"{proxy.host}:{proxy.port}: {explain_socket(error)}")
    return ok(f"{proxy.host}:{proxy.port} answers")


def check_clock(subject: NodeSubject) -> Finding:
    reply = _first_reply(subject)
    shown = reply.headers.get("date")
    if shown is None:
        raise Skipped("the hub's answers carry no date")
    try:
        then = parsedate_to_datetime(shown).replace(tzinfo=UTC).timestamp()
    except ValueError:
        raise Skipped("the hub's answers carry a date that is none") from None
    now = subject.clock.wall()
    signed = _signed_time(reply)
    if signed > now + CLOCK_LEEWAY:
        return fail(f"this clock is {duration(signed - now)} behind the hub's newest signature")
    skew = now - then - 0.5  # the date has whole seconds
    way = "ahead of" if skew > 0 else "behind"
    # The time of an answer is trusted for a finding alone; what is believed by nodes is signed.
    if abs(skew) > CLOCK_LEEWAY:
        return fail(f"this clock is {duration(skew)} {way} the hub's; more than {CLOCK_LEEWAY:.0f} s is not accepted")
    if abs(skew) > SKEW_SECONDS:
        return warn(f"this clock is {duration(skew)} {way} the hub's")
    return ok(f"within {max(abs(skew), 1.0):.0f} s of the hub's")


def check_files(subject: NodeSubject) -> Finding:
    """Whether every source of files answers, and knows this node."""
    node = subject.node
    sources = [url for url in node.sources if not url.startswith("file:")]
    if not sources:
        raise Skipped("no source of files is configured")
    good, bad = [], []
    for url in sources:
        try:
            reply = ask_source(subject, url)
        except (OSError, ValueError, SyncError) as error:
            bad.append(f"{url}: {explain_socket(error) if isinstance(error, OSError) else error}")
            continue
        if reply.status == 200:
            good.append(f"{url} ({reply.took * 1e3:.0f} ms)")
        elif reply.status in (401, 403):
            bad.append(f"{url} does not accept this node's credential ({reply.status})")
        else:
            bad.append(f"{url} has no update repository ({reply.status})")
    if bad:
        # One source is enough.
        return (warn if good else fail)("; ".join(bad))
    return ok("; ".join(good))


NETWORK: tuple[Check[NodeSubject], ...] = (
    Check(
        "network.names",
        "whether the broker's and the hub's names are resolved",
        "correct the name in [node], the machine's resolver (/etc/resolv.conf), or use an address",
        check_names,
        8.0,
    ),
    Check(
        "network.ports",
        "a TCP connection to each",
        "let connections from here out (8883 for mqtts, 443 for wss and https), and see that the other side runs",
        check_ports,
        15.0,
    ),
    Check(
        "network.tls",
        "each certificate: name, authority, days left",
        "see what the other side shows: openssl s_client -connect HOST:PORT",
        check_tls,
        15.0,
    ),
    Check("network.proxy", "the configured proxy", "correct proxy in [node], or see that it runs", check_proxy),
    Check(
        "network.files",
        "whether every source of files answers and knows this node",
        "correct sources in [node]; if the credential is refused ask the hub: tierline hub denied, tierline nodes ID",
        check_files,
        10.0,
    ),
    Check("clock.hub", "the clock against the hub's, and against its newest signature", CLOCK_FIX, check_clock, 10.0),
)


def ask_source(subject: NodeSubject, url: str) -> Reply:
    """The newest timestamp of the update repository at a source. Raises OSError, ValueError, SyncError."""
    node = subject.node
    place = next(place for place in subject.places() if url.startswith(("http://", "https://")) and _is_at(place, url))
    # As the node does it: mirrors never see its bearer token.
    bearer = node.bearer_at(url, subject.credentials())
    route = Place(place.uses, url, place.host, place.port, place.tls, node.proxy_to(url))
    return get(route, "/tuf/timestamp.json", bearer)


def _is_at(place: Place, url: str) -> bool:
    from sync.doctor.reach import place_of

    other = place_of("files", url, ssl.create_default_context)
    return (other.host, other.port, other.tls is not None) == (place.host, place.port, place.tls is not None)


def _first_reply(subject: NodeSubject) -> Reply:
    def ask() -> Reply:
        for url in subject.node.sources:
            try:
                reply = ask_source(subject, url)
            except (OSError, ValueError, SyncError, StopIteration):
                continue
            return reply
        raise Skipped("no source of files answers")

    return subject.shared("timestamp", ask)


def _signed_time(reply: Reply) -> float:
    if reply.status != 200:
        return 0.0
    try:
        return msgspec.json.decode(reply.body, type=_Timestamp).signed.issued
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return 0.0


def _each(
    places: list[Place], look: Callable[[Place], str], explain: Callable[[OSError], str], before: str = ""
) -> Finding:
    good, bad = [], []
    for place in places:
        try:
            good.append(look(place))
        except OSError as error:
            bad.append(f"{place.name}: {explain(error)}")
    return fail("; ".join(bad)) if bad else ok(before + "; ".join(dict.fromkeys(good)))
