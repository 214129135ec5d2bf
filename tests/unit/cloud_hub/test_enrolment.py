"""Who gets a certificate, how often, and for how long."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, generate_private_key
from hub_in_memory import Bench

from cloud_hub.authority import NODE_SECONDS
from cloud_hub.enrolment import MAX_CERTIFICATES
from cloud_hub.gate import MAX_OPEN_CALLS
from cloud_hub.kick import WHEN, Kicker
from sync.credentials import Identity, new_key, request, write_pair
from sync.enrol_messages import proof_bytes
from sync.messages import HubState, State, decode, encode
from sync.testing import FakeClock
from sync.topics import HUB_STATE, up

NODE = "acme.edge-1"
DAY = 86_400.0


async def invite(bench: Bench, node: str = NODE, expect: int = 201, **more: Any) -> str:
    answer = await bench.call("POST", "/api/v1/invitations", expect, json={"id": node, "tier": "edge", **more})
    return str(answer.get("token"))


async def enrol(bench: Bench, token: str, expect: int = 200, key: Any = None, **more: Any) -> tuple[Any, Any]:
    key = key or new_key()
    body = {"token": token, "csr": request(key), **more}
    return key, await bench.call("POST", "/api/v1/enrol", expect, json=body, headers={"authorization": ""})


async def renewed(
    bench: Bench, key: Any, expect: int = 200, node: str = NODE, fresh: Any = None, nonce: str = ""
) -> tuple[Any, Any]:
    """A renewal as a node does it, by the proof of `key`."""
    fresh = fresh or new_key()
    if not nonce:
        nonce = (await bench.call("POST", "/api/v1/renew/challenge", 200, json={"node": node}))["nonce"]
    csr = request(fresh)
    proof = base64.b64encode(signed(key, proof_bytes("renew", node, nonce, csr))).decode()
    body = {"node": node, "nonce": nonce, "csr": csr, "proof": proof}
    return fresh, await bench.call("POST", "/api/v1/renew", expect, json=body, headers={"authorization": ""})


def signed(key: Any, message: bytes) -> bytes:
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA
    from cryptography.hazmat.primitives.hashes import SHA256

    return bytes(key.sign(message, ECDSA(SHA256())))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "identity"


async def test_a_certificate_names_the_node_and_lives_a_week(bench: Bench) -> None:
    key, answer = await enrol(bench, await invite(bench))
    cert = x509.load_pem_x509_certificates(answer["certificate"].encode())[0]
    assert cert.subject.rfc4514_string() == f"CN={NODE}"
    assert cert.public_key() == key.public_key()
    names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [f"urn:tierline:node:{NODE}"]
    assert cert.not_valid_after_utc.timestamp() == int(bench.clock.wall() + NODE_SECONDS)
    assert (answer["node"], answer["trust_name"], answer["fleet"]) == (NODE, "root.json", 1)
    assert base64.b64decode(answer["trust"]) == bench.hub.root


async def test_of_a_hundred_uses_of_one_token_exactly_one_succeeds(bench: Bench) -> None:
    token = await invite(bench)

    places = asyncio.Semaphore(MAX_OPEN_CALLS)  # beyond that many strangers at once the gate says 503

    async def use() -> int:
        async with places:
            body = {"token": token, "csr": request(new_key())}
            return (await bench.client.post("/api/v1/enrol", json=body)).status_code

    codes = await asyncio.gather(*(use() for _ in range(100)))
    assert sorted(codes) == [200] + [401] * 99


async def test_a_token_ends_after_a_day_and_a_newer_one_ends_it(bench: Bench) -> None:
    old = await invite(bench)
    bench.clock.advance(DAY + 1)
    assert "too old" in (await enrol(bench, old, 401))[1]["error"]
    first, second = await invite(bench), await invite(bench)
    await enrol(bench, first, 401)
    await enrol(bench, second)


async def test_whoever_used_a_token_may_ask_again_with_the_same_key_because_answers_are_lost(bench: Bench) -> None:
    token = await invite(bench)
    key, _ = await enrol(bench, token)
    _, again = await enrol(bench, token, key=key)
    assert again["node"] == NODE
    await enrol(bench, token, 401)
    await bench.call("POST", f"/api/v1/nodes/{NODE}/revoke", 200, json={})
    await enrol(bench, token, 401, key=key)


async def test_a_token_that_was_used_is_too_old_for_its_own_key_too(bench: Bench) -> None:
    token = await invite(bench)
    key, _ = await enrol(bench, token)
    bench.clock.advance(DAY + 1)
    await enrol(bench, token, 401, key=key)


@pytest.mark.parametrize("known", [True, False])
async def test_revoking_an_id_ends_the_token_that_waits_for_it(bench: Bench, known: bool) -> None:
    if known:
        await bench.add_node(NODE)
    astray = await invite(bench)
    await bench.call("POST", f"/api/v1/nodes/{NODE}/revoke", 200, json={"reason": "token went astray"})
    await enrol(bench, astray, 401)
    assert [entry["id"] for entry in await bench.call("GET", "/api/v1/denied", 200)] == [NODE]


async def test_a_node_that_comes_back_by_a_token_for_its_id_alone_runs_what_it_ran(bench: Bench) -> None:
    await bench.publish()
    await bench.deploy("d", {"digits": "digits-cnn/1"}, site="a")
    await enrol(bench, await invite(bench, labels={"site": "a"}, groups=["line-1"]))
    before = await bench.call("GET", f"/api/v1/nodes/{NODE}", 200)
    await bench.call("POST", f"/api/v1/nodes/{NODE}/revoke", 200, json={})
    _, answer = await enrol(bench, await invite(bench))
    after = await bench.call("GET", f"/api/v1/nodes/{NODE}", 200)
    assert after["desired"] == before["desired"] == {"digits": "digits-cnn/1"}
    assert (answer["labels"], answer["groups"]) == ({"site": "a"}, ["line-1"])


async def test_what_an_invitation_says_of_a_known_node_is_so_for_the_hub_too(bench: Bench) -> None:
    await enrol(bench, await invite(bench, labels={"site": "a"}, groups=["line-1"]))
    await bench.call("POST", f"/api/v1/nodes/{NODE}/revoke", 200, json={})
    _, answer = await enrol(bench, await invite(bench, labels={"site": "b"}, groups=["line-2"]))
    known = await bench.call("GET", f"/api/v1/nodes/{NODE}", 200)
    assert known["labels"] == answer["labels"] == {"site": "b"}
    assert known["groups"] == answer["groups"] == ["line-2"]


async def test_a_node_that_renews_without_end_does_not_fill_the_revocation_list(bench: Bench) -> None:
    key, _ = await enrol(bench, await invite(bench))
    for _ in range(MAX_CERTIFICATES - 1):
        await renewed(bench, key)
    await renewed(bench, key, 503)
    with bench.hub.storage.read() as records:
        assert len(records.identities.ended_alive(bench.clock.wall())) < MAX_CERTIFICATES
    bench.clock.advance(3601)
    await renewed(bench, key)


async def test_a_token_bound_to_a_machine_is_of_no_use_elsewhere(bench: Bench) -> None:
    token = await invite(bench, hardware="SN-1")
    for shown in ({}, {"hardware": "SN-2"}):
        await enrol(bench, token, 403, **shown)
    await enrol(bench, token, hardware="SN-1")


async def test_a_copied_key_is_refused(bench: Bench) -> None:
    key, _ = await enrol(bench, await invite(bench))
    token = await invite(bench, "acme.edge-2")
    assert "before" in (await enrol(bench, token, 409, key=key))[1]["error"]
    await enrol(bench, token)


@pytest.mark.parametrize(
    "name", ["_hub-1", "_hub-1.x", "acme._hub-1", "acme", "hub", "Acme.edge", "a.b.c", "acme.edge\n1"]
)
async def test_names_of_the_hub_and_names_that_are_none_cannot_be_enrolled(bench: Bench, name: str) -> None:
    answer = await bench.client.post("/api/v1/invitations", json={"id": name, "tier": "edge"})
    assert answer.status_code == 400


@pytest.mark.parametrize(
    "csr", ["", "x" * 9000, "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----"]
)
async def test_a_request_that_is_none_is_refused_and_the_token_is_still_good(bench: Bench, csr: str) -> None:
    token = await invite(bench)
    answer = await bench.client.post("/api/v1/enrol", json={"token": token, "csr": csr})
    assert answer.status_code in (400, 422)
    assert "csr" in answer.json()["error"]
    await enrol(bench, token)


async def test_keys_of_other_kinds_are_refused(bench: Bench) -> None:
    _, answer = await enrol(bench, await invite(bench), 400, key=generate_private_key(SECP384R1()))
    assert "P-256" in answer["error"]


async def test_no_token_lies_in_the_database(bench: Bench) -> None:
    secret = (await invite(bench)).split(".")[1].encode()
    stored = b"".join(path.read_bytes() for path in bench.hub.data.glob("hub.sqlite*"))
    assert secret not in stored


@pytest.mark.parametrize("away", [2 * DAY, 400 * DAY])
async def test_a_node_renews_by_its_key_however_long_it_was_away(bench: Bench, away: float) -> None:
    key, _ = await enrol(bench, await invite(bench))
    bench.clock.advance(away)
    fresh, answer = await renewed(bench, key)
    cert = x509.load_pem_x509_certificates(answer["certificate"].encode())[0]
    assert cert.public_key() == fresh.public_key()
    assert cert.not_valid_after_utc.timestamp() == int(bench.clock.wall() + NODE_SECONDS)
    await renewed(bench, fresh)


async def test_an_answer_that_is_lost_costs_nothing_and_keys_before_it_end(bench: Bench) -> None:
    first, _ = await enrol(bench, await invite(bench))
    lost, _ = await renewed(bench, first)
    second, _ = await renewed(bench, first)
    await renewed(bench, lost, 401)
    third, _ = await renewed(bench, second)
    _, answer = await renewed(bench, first, 401)
    assert "copy" in answer["error"], "two machines have the key"
    await renewed(bench, third)


async def test_a_proof_is_good_for_one_request_of_one_node(bench: Bench) -> None:
    key, _ = await enrol(bench, await invite(bench))
    other, _ = await enrol(bench, await invite(bench, "acme.edge-2"))
    nonce = (await bench.call("POST", "/api/v1/renew/challenge", 200, json={"node": NODE}))["nonce"]
    await renewed(bench, other, 401)
    await renewed(bench, key, nonce=nonce)
    await renewed(bench, key, 401, nonce=nonce)
    theirs = (await bench.call("POST", "/api/v1/renew/challenge", 200, json={"node": "acme.edge-2"}))["nonce"]
    await renewed(bench, key, 401, nonce=theirs)
    old = (await bench.call("POST", "/api/v1/renew/challenge", 200, json={"node": NODE}))["nonce"]
    bench.clock.advance(121)
    await renewed(bench, key, 401, nonce=old)
    for nonsense in ("x", "A" * 75, "====", "A" * 100):
        await renewed(bench, key, 401, nonce=nonsense)


async def test_renewing_with_anothers_key_is_refused(bench: Bench) -> None:
    key, _ = await enrol(bench, await invite(bench))
    other, _ = await enrol(bench, await invite(bench, "acme.edge-2"))
    await renewed(bench, key, 409, fresh=other)


async def test_a_revoked_node_is_refused_everywhere_at_once(bench: Bench, folder: Path) -> None:
    key, answer = await enrol(bench, await invite(bench))
    write_pair(folder, key, answer["certificate"], answer["bundle"])
    bearer = {"authorization": f"Bearer {Identity(folder, bench.clock).bearer()}"}
    await bench.call("GET", "/tuf/timestamp.json", 200, headers=bearer)
    before = await bench.call("GET", "/api/v1/broker/access", 200)
    await bench.call("POST", f"/api/v1/nodes/{NODE}/revoke", 200, json={"reason": "stolen"})
    await bench.call("GET", "/tuf/timestamp.json", 401, headers=bearer)
    await renewed(bench, key, 403)
    bench.broker.publish(up(NODE, "state"), encode(State(state="alert", boot="b")), retain=True)
    await asyncio.sleep(0)
    assert (await bench.call("GET", f"/api/v1/nodes/{NODE}", 200))["state"] == ""
    access = await bench.call("GET", "/api/v1/broker/access", 200)
    assert access["version"] != before["version"]
    assert f"user {NODE}\ntopic deny tierline/v1/#\n" in access["acl"]
    serial = x509.load_pem_x509_certificates(answer["certificate"].encode())[0].serial_number
    revoked = x509.load_pem_x509_crl(access["revocations"].encode())
    assert revoked.get_revoked_certificate_by_serial_number(serial) is not None
    assert [entry["id"] for entry in await bench.call("GET", "/api/v1/denied", 200)] == [NODE]


async def test_a_revoked_name_comes_back_by_an_invitation_and_its_old_key_does_not(bench: Bench) -> None:
    old, _ = await enrol(bench, await invite(bench))
    await invite(bench, expect=409)
    await bench.call("POST", f"/api/v1/nodes/{NODE}/revoke", 200, json={})
    token = await invite(bench)
    await enrol(bench, token, 409, key=old)
    new, _ = await enrol(bench, token)
    await renewed(bench, old, 401)
    await renewed(bench, new)
    assert await bench.call("GET", "/api/v1/denied", 200) == []


async def test_a_decommissioned_node_leaves_nothing_but_its_refusal(bench: Bench) -> None:
    key, _ = await enrol(bench, await invite(bench))
    await bench.born(NODE)
    assert up(NODE, "state") in bench.broker.retained
    await bench.call("DELETE", f"/api/v1/nodes/{NODE}", 204)
    await bench.call("GET", f"/api/v1/nodes/{NODE}", 404)
    await renewed(bench, key, 403)
    assert up(NODE, "state") not in bench.broker.retained


async def test_enrolling_ends_the_token_a_node_had_before(bench: Bench) -> None:
    await bench.add_node(NODE)
    bearer = {"authorization": f"Bearer {bench.tokens[NODE]}"}
    await bench.call("GET", "/tuf/timestamp.json", 200, headers=bearer)
    await enrol(bench, await invite(bench))
    await bench.call("GET", "/tuf/timestamp.json", 401, headers=bearer)


CLAIMS = {"sub": NODE, "aud": "tierline-hub", "iat": 0, "exp": 200, "jti": "j"}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({}, 200),
        ({"exp": 301}, 401),
        ({"exp": None}, 401),
        ({"iat": None}, 401),
        ({"jti": None}, 401),
        ({"aud": None}, 401),
        ({"aud": "other"}, 401),
        ({"sub": None}, 401),
        ({"sub": "acme.edge-2"}, 401),
        ({"sub": "_hub-1"}, 401),
        ({"sub": 7}, 401),
        ({"iat": 120, "exp": 300}, 401),
        ({"iat": -300, "exp": -100}, 401),
        ({"exp": "soon"}, 401),
        ({"exp": 1e400}, 401),
    ],
)
async def test_a_bearer_token_is_held_to_every_claim(bench: Bench, changes: dict[str, Any], code: int) -> None:
    key, _ = await enrol(bench, await invite(bench))
    await enrol(bench, await invite(bench, "acme.edge-2"))
    now = int(bench.clock.wall())
    claims = {name: value for name, value in {**CLAIMS, **changes}.items() if value is not None}
    for name in ("iat", "exp"):
        if isinstance(claims.get(name), int):
            claims[name] += now
    if claims.get("exp") == float("inf"):
        claims["exp"] = 10**400
    token = jwt.api_jws.encode(__import__("json").dumps(claims).encode(), key, algorithm="ES256")
    await bench.call("GET", "/tuf/timestamp.json", code, headers={"authorization": f"Bearer {token}"})


async def test_other_algorithms_and_other_keys_are_refused(bench: Bench) -> None:
    key, _ = await enrol(bench, await invite(bench))
    now = int(bench.clock.wall())
    claims = {**CLAIMS, "iat": now, "exp": now + 100}
    good = jwt.encode(claims, key, algorithm="ES256")
    none = jwt.encode(claims, None, algorithm="none")
    secret = jwt.encode(claims, "x" * 64, algorithm="HS256")
    for token in (
        jwt.encode(claims, new_key(), algorithm="ES256"),
        none,
        secret,
        good[:-4] + "AAAA",
        good + "." + good,
    ):
        await bench.call("GET", "/tuf/timestamp.json", 401, headers={"authorization": f"Bearer {token}"})
    # A node's own token reaches what nodes reach.
    await bench.call("GET", "/api/v1/nodes", 403, headers={"authorization": f"Bearer {good}"})


async def test_the_hub_tells_how_large_the_fleet_is(bench: Bench) -> None:
    for number in range(3):
        await bench.add_node(f"acme.edge-{number}")
    bench.hub.publisher.connected()
    for _ in range(2000):
        await asyncio.sleep(0)
        if decode(bench.broker.retained.get(HUB_STATE, b'{"state":""}'), HubState).fleet == 3:
            return
    pytest.fail("not told")


async def test_a_connection_is_taken_when_the_broker_knows_and_else_at_fixed_times() -> None:
    clock, taken = FakeClock(), []

    async def kick(node: str) -> None:
        taken.append(node)

    kicker = Kicker(kick, clock)
    task = asyncio.create_task(kicker.run())
    kicker.add("a.b")
    for count, at in enumerate(WHEN, 1):
        clock.advance(at - (WHEN[count - 2] if count > 1 else 0) + 0.01)
        for _ in range(20):
            await asyncio.sleep(0)
        assert taken == ["a.b"] * count
    kicker.add("c.d")
    kicker.broker_knows({"c.d"})
    for _ in range(20):
        await asyncio.sleep(0)
    assert taken[-1] == "c.d"
    assert WHEN[-1] + 8 < 60
    task.cancel()


async def test_a_list_that_was_read_before_a_revocation_does_not_say_that_the_broker_knows_of_it(bench: Bench) -> None:
    await enrol(bench, await invite(bench))
    bench.hub.kicker._kick = lambda node: asyncio.sleep(0)
    bench.hub.kicker.add(NODE)
    due = dict(bench.hub.kicker._due)
    have = (await bench.call("GET", "/api/v1/broker/access", 200))["version"]
    await bench.call("GET", f"/api/v1/broker/access?have={have}", 200)
    assert bench.hub.kicker._due == due


async def test_a_broker_out_of_reach_is_tried_until_it_is_there() -> None:
    clock, tries = FakeClock(), 0

    async def kick(node: str) -> None:
        nonlocal tries
        tries += 1
        if tries < 9:
            raise OSError("away")

    kicker = Kicker(kick, clock)
    task = asyncio.create_task(kicker.run())
    kicker.add("a.b")
    for _ in range(40):
        clock.advance(10)
        for _ in range(20):
            await asyncio.sleep(0)
    assert (tries, kicker.kicked) == (9, 1)
    task.cancel()
