"""Nothing that the pinned keys did not sign, for this kind, this scope and this time, is believed."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sync.errors import BadSignature, Expired, Malformed, Refused, Replayed, WrongScope
from sync.messages import MAX_MESSAGE_BYTES, MAX_SIGNATURES, Document, Envelope, Signature, encode
from sync.trust import (
    CLOCK_LEEWAY,
    Keyring,
    SigningKey,
    Verified,
    decode_keyring,
    digest_of,
    encode_keyring,
    sign,
    unseal,
    verify,
)

NOW = 1_800_000_000.0
KEY = SigningKey.from_bytes(bytes(range(32)))
CATALOG_KEY = SigningKey.from_bytes(bytes(32))
STRANGER = SigningKey.from_bytes(b"\x07" * 32)
RING = Keyring((KEY.key("desired", "policy"), CATALOG_KEY.key("catalog")))


def document(**changes: object) -> Document:
    fields: dict[str, object] = {
        "kind": "desired",
        "scope": "node:acme.edge-1",
        "revision": 5,
        "issued": NOW - 10,
        "digests": ("sha256:" + "a" * 64,),
        "body": msgspec.Raw(b'{"models":{}}'),
    }
    return Document(**(fields | changes))  # type: ignore[arg-type]


def check(envelope: bytes, floor: int = 0, seen: str = "", now: float = NOW) -> Verified:
    return verify(envelope, RING, kind="desired", scope="node:acme.edge-1", floor=floor, seen=seen, now=now)


def test_a_signed_document_comes_out_as_it_went_in() -> None:
    verified = check(sign(document(), [KEY]))
    assert verified.document == document()
    assert verified.digest == digest_of(encode(document()))


REFUSED: dict[str, tuple[bytes, type[Refused]]] = {
    "nothing": (b"", Malformed),
    "no json": (b"\xff\x00", Malformed),
    "no envelope": (b'{"payload":1}', Malformed),
    "deep nesting": (b"[" * 60_000, Malformed),
    "too long": (b" " * (MAX_MESSAGE_BYTES + 1), Malformed),
    "no signature": (encode(Envelope(encode(document()), ())), Malformed),
    "too many signatures": (sign(document(), [KEY] * (MAX_SIGNATURES + 1)), Malformed),
    "unknown key": (sign(document(), [STRANGER]), BadSignature),
    "key for another kind": (sign(document(), [CATALOG_KEY]), BadSignature),
    "borrowed kid": (encode(Envelope(b"{}", (Signature(KEY.kid, b"\0" * 64),))), BadSignature),
    "short signature": (encode(Envelope(b"{}", (Signature(KEY.kid, b""),))), BadSignature),
    "signed garbage": (encode(Envelope(b"garbage", (KEY.sign(b"garbage"),))), Malformed),
    "another kind": (sign(document(kind="policy"), [KEY]), WrongScope),
    "another node": (sign(document(scope="node:acme.edge-2"), [KEY]), WrongScope),
    "expired": (sign(document(expires=NOW - CLOCK_LEEWAY - 1), [KEY]), Expired),
    "from the future": (sign(document(issued=NOW + CLOCK_LEEWAY + 1), [KEY]), Expired),
    "revision zero": (sign(document(revision=0), [KEY]), Malformed),
    "huge revision": (sign(document(revision=2**60), [KEY]), Malformed),
    "path as digest": (sign(document(digests=("../../etc/passwd",)), [KEY]), Malformed),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_envelope_is_refused_with_its_reason(name: str) -> None:
    envelope, error = REFUSED[name]
    with pytest.raises(error) as caught:
        check(envelope)
    assert type(caught.value) is error
    assert str(caught.value)


def test_a_replayed_document_is_refused() -> None:
    with pytest.raises(Replayed):
        check(sign(document(revision=4), [KEY]), floor=5)


def test_the_same_document_again_is_no_replay_but_another_under_its_revision_is() -> None:
    envelope = sign(document(), [KEY])
    seen = check(envelope).digest
    assert check(envelope, floor=5, seen=seen).digest == seen
    with pytest.raises(Replayed):
        check(sign(document(body=msgspec.Raw(b"{}")), [KEY]), floor=5, seen=seen)


def test_clocks_may_differ_by_the_leeway() -> None:
    check(sign(document(issued=NOW + CLOCK_LEEWAY, expires=NOW - CLOCK_LEEWAY), [KEY]))


def test_one_good_signature_among_strangers_is_enough() -> None:
    check(sign(document(), [STRANGER, KEY]))


def test_an_expired_document_can_be_reopened_from_the_disk() -> None:
    assert unseal(sign(document(expires=1.0), [STRANGER])).document.revision == 5


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_mutated_envelope_never_yields_another_document(data: st.DataObject) -> None:
    envelope = bytearray(sign(document(), [KEY]))
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(envelope) - 1))
        envelope[position] = data.draw(st.integers(0, 255))
    try:
        verified = check(bytes(envelope))
    except Refused:
        return
    assert verified.document == document()


@given(junk=st.binary(max_size=300))
def test_junk_is_refused_and_nothing_else(junk: bytes) -> None:
    with pytest.raises(Refused):
        check(junk)


def test_a_keyring_survives_its_file() -> None:
    assert decode_keyring(encode_keyring(RING)) == RING


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b'{"keys":[]}',
        b'{"keys":[{"kid":"a","public":"AAAA","kinds":["desired"]}]}',
        b'{"keys":[],"extra":1}',
        encode_keyring(Keyring((KEY.key("desired"), KEY.key("policy")))),
    ],
)
def test_a_bad_keyring_is_refused(data: bytes) -> None:
    with pytest.raises(Malformed):
        decode_keyring(data)


def test_a_signing_key_survives_its_bytes_and_refuses_others() -> None:
    assert SigningKey.from_bytes(KEY.to_bytes()).kid == KEY.kid
    with pytest.raises(Malformed):
        SigningKey.from_bytes(b"short")
