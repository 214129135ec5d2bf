"""Every token that is not exactly right is refused, and the answer says nothing that was not the sender's already."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
import pytest
from access_writer import AccessWriter
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from models.errors import Unauthenticated
from models.serving.access.keys import load_keys
from models.serving.access.settings import InvalidAccess
from models.serving.access.tokens import (
    CLOCK_SKEW_SECONDS,
    MAX_LIFETIME_SECONDS,
    MAX_TOKEN_BYTES,
    Claims,
    find_key,
    issue,
    take_apart,
    verify,
)

NOW = int(time.time())


def verified(token: str, keys: Any, now: float) -> Claims:
    return verify(token, find_key(token, keys)[1], "tierline", now)


def part(value: Any) -> str:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def pem(writer: AccessWriter) -> bytes:
    return writer.private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def with_hmac(writer: AccessWriter, secret: bytes) -> str:
    """HS256 made by hand: PyJWT itself refuses to use a public key as a secret."""
    head = f"{part({'alg': 'HS256', 'typ': 'JWT', 'kid': writer.kid})}.{part(writer.claims())}"
    return f"{head}.{part(hmac.digest(secret, head.encode(), hashlib.sha256))}"


def with_header(writer: AccessWriter, **header: Any) -> str:
    """Signed rightly, whatever the header says."""
    head = f"{part({'alg': 'EdDSA', 'kid': writer.kid} | header)}.{part(writer.claims())}"
    return f"{head}.{part(writer.private.sign(head.encode()))}"


def without_kid(writer: AccessWriter) -> str:
    head = f"{part({'alg': 'EdDSA'})}.{part(writer.claims())}"
    return f"{head}.{part(writer.private.sign(head.encode()))}"


def swapped(writer: AccessWriter) -> str:
    """The signature of one token under the claims of another."""
    head, _, signature = writer.token().split(".")
    return f"{head}.{part(writer.claims(admin=True))}.{signature}"


def flipped(writer: AccessWriter) -> str:
    head, claims, signature = writer.token().split(".")
    return f"{head}.{claims}.{'B' if signature[0] == 'A' else 'A'}{signature[1:]}"


def p256(writer: AccessWriter) -> str:
    return jwt.encode(writer.claims(), generate_private_key(SECP256R1()), "ES256", headers={"kid": writer.kid})


BAD: dict[str, Callable[[AccessWriter], str]] = {
    "alg none, no signature": lambda w: f"{part({'alg': 'none', 'kid': w.kid})}.{part(w.claims())}.",
    "alg none, a signature": lambda w: with_header(w, alg="none"),
    "alg NONE": lambda w: with_header(w, alg="nOnE"),
    "HS256 with the public key's PEM": lambda w: with_hmac(w, pem(w)),
    "HS256 with the raw public key": lambda w: with_hmac(w, w.private.public_key().public_bytes_raw()),
    "ES256": p256,
    "Ed448": lambda w: w.token(key=Ed448PrivateKey.generate()),
    "alg as a list": lambda w: with_header(w, alg=["EdDSA"]),
    "another key under the known kid": lambda w: w.token(key=Ed25519PrivateKey.generate()),
    "unknown kid": lambda w: w.token(header={"kid": "0123456789abcdef"}),
    "no kid": without_kid,
    "kid that is no string": lambda w: with_header(w, kid=1),
    "kid that is a path": lambda w: with_header(w, kid="../keys/" + w.kid),
    "header brings its own key": lambda w: with_header(w, jwk={"kty": "OKP"}),
    "header points to a key": lambda w: with_header(w, jku="https://example.invalid/keys"),
    "critical extension": lambda w: with_header(w, crit=["b64"], b64=False),
    "typ of something else": lambda w: with_header(w, typ="dpop+jwt"),
    "header not an object": lambda w: f"{part([1])}.{part(w.claims())}.{'A' * 86}",
    "header nested too deep": lambda w: f"{part(b'[' * 2500)}.{part(b'{}')}.{'A' * 86}",
    "claims swapped": swapped,
    "signature altered": flipped,
    "signature cut short": lambda w: w.token()[:-1],
    "signature too long": lambda w: w.token() + "A",
    "signature missing": lambda w: w.token().rpartition(".")[0],
    "signature empty": lambda w: w.token().rpartition(".")[0] + ".",
    "four parts": lambda w: w.token() + ".AAAA",
    "duplicate dots": lambda w: w.token().replace(".", ".."),
    "a space within": lambda w: w.token().replace(".", ". ", 1),
    "a line break at the end": lambda w: w.token() + "\n",
    "padded base64": lambda w: w.token() + "==",
    "not base64": lambda w: "!!!.???.***",
    "not ASCII": lambda w: "\xff\xfe." + w.token(),
    "empty parts": lambda w: "..",
    "huge": lambda w: w.token(sub="x" * MAX_TOKEN_BYTES),
    "wrong aud": lambda w: w.token(aud="another"),
    "aud that contains ours": lambda w: w.token(aud="tierline2"),
    "empty list of aud": lambda w: w.token(aud=[]),
    "no aud": lambda w: w.token(aud=None),
    "no exp": lambda w: w.token(exp=None),
    "no iat": lambda w: w.token(iat=None),
    "no sub": lambda w: w.token(sub=None),
    "empty sub": lambda w: w.token(sub=""),
    "sub with a line break": lambda w: w.token(sub="a\nb"),
    "sub that is a number": lambda w: w.token(sub=7),
    "expired": lambda w: w.token(iat=NOW - 7200, exp=NOW - 3600),
    "exp as text": lambda w: w.token(exp=str(NOW + 60)),
    "exp true": lambda w: w.token(exp=True),
    "exp that is not a number": lambda w: w.signed(
        b'{"sub":"c","aud":"tierline","iat":%d,"exp":NaN}' % NOW,
    ),
    "exp beyond all time": lambda w: w.token(exp=10**300),
    "exp before iat": lambda w: w.token(iat=NOW + 20, exp=NOW + 10),
    "future iat": lambda w: w.token(iat=NOW + 3600, exp=NOW + 7200),
    "future nbf": lambda w: w.token(nbf=NOW + 3600),
    "lives too long": lambda w: w.token(iat=NOW, exp=NOW + int(MAX_LIFETIME_SECONDS) + 60),
    "models no list": lambda w: w.token(models="*"),
    "models with a number": lambda w: w.token(models=["a", 1]),
    "too many models": lambda w: w.token(models=["a"] * 65),
    "admin as text": lambda w: w.token(admin="true"),
    "claims not an object": lambda w: w.signed(b"[]"),
    "claims not JSON": lambda w: w.signed(b"sub=c"),
    "claims not UTF-8": lambda w: w.signed(b'{"sub":"\xff"}'),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_token_is_refused_in_words_that_do_not_repeat_it(tmp_path: Path, name: str) -> None:
    writer = AccessWriter(tmp_path)
    token = BAD[name](writer)
    with pytest.raises(Unauthenticated) as refused:
        verified(token, load_keys(tmp_path / "keys"), time.time())
    text = str(refused.value)
    assert 10 < len(text) < 200
    assert not any(len(each) > 8 and each in text for each in token.split("."))


def test_a_good_token_says_who_it_is_for(tmp_path: Path) -> None:
    writer = AccessWriter(tmp_path)
    token = writer.token(tenant="acme", models=["a*"], aud=["other", "tierline"], iss="somebody", nbf=NOW)
    claims = verified(token, load_keys(tmp_path / "keys"), time.time())
    assert (claims.sub, claims.tenant, claims.models, claims.admin) == ("c", "acme", ("a*",), False)


def test_clocks_may_differ_by_the_stated_seconds_and_no_more(tmp_path: Path) -> None:
    writer = AccessWriter(tmp_path)
    keys = load_keys(tmp_path / "keys")
    token = writer.token(iat=NOW, exp=NOW + 60)
    verified(token, keys, NOW - CLOCK_SKEW_SECONDS)
    verified(token, keys, NOW + 60 + CLOCK_SKEW_SECONDS - 0.1)
    with pytest.raises(Unauthenticated, match="future"):
        verified(token, keys, NOW - CLOCK_SKEW_SECONDS - 0.1)
    with pytest.raises(Unauthenticated, match="expired 30 s ago"):
        verified(token, keys, NOW + 60 + CLOCK_SKEW_SECONDS)


def test_what_is_issued_is_verified_by_the_library_alone_too(tmp_path: Path) -> None:
    writer = AccessWriter(tmp_path)
    token = issue(writer.private, writer.kid, Claims(sub="c", aud="tierline", iat=NOW, exp=NOW + 7200, jti="j"))
    claims = jwt.decode(
        token,
        writer.private.public_key(),
        algorithms=["EdDSA"],
        audience="tierline",
        options={"require": ["exp", "iat", "aud", "sub"]},
    )
    assert claims == {"sub": "c", "aud": "tierline", "iat": NOW, "exp": NOW + 7200, "jti": "j"}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"exp": NOW + MAX_LIFETIME_SECONDS + 1}, "31 days"),
        ({"sub": ""}, "sub"),
        ({"sub": "a\tb"}, "printed"),
        ({"models": ("",)}, "models"),
        ({"models": ("m" * 200,) * 20}, "bytes"),
    ],
)
def test_a_token_that_nobody_would_take_is_not_issued(tmp_path: Path, changed: dict[str, Any], words: str) -> None:
    writer = AccessWriter(tmp_path)
    good: dict[str, Any] = {"sub": "c", "aud": "tierline", "iat": NOW, "exp": NOW + 60}
    with pytest.raises(InvalidAccess, match=words):
        issue(writer.private, writer.kid, Claims(**(good | changed)))


def test_a_token_is_taken_apart_without_a_key(tmp_path: Path) -> None:
    writer = AccessWriter(tmp_path)
    seen = take_apart(writer.token(tenant="acme"))
    assert seen.problem is None
    assert seen.claims is not None
    assert seen.claims.tenant == "acme"
    assert take_apart(with_hmac(writer, b"x")).problem == "the token is not signed with EdDSA"
    unfinished = take_apart(writer.token(exp=None))
    assert unfinished.claims is None
    assert "exp" in (unfinished.problem or "")
    for text in ("", "a.b", "a.b.c", "..", "\xff.\xff.\xff"):
        with pytest.raises(InvalidAccess, match="not a token"):
            take_apart(text)
