"""Bearer tokens: JSON Web Tokens signed with Ed25519, and nothing else.

Sources: RFC 7519 (JWT), RFC 7515 (JWS), RFC 8037 (EdDSA), RFC 8725 (best practice: one algorithm, decided by the verifier).
"""

from __future__ import annotations

import base64
import re
import secrets
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from models.errors import Unauthenticated
from models.serving.access.settings import MAX_NAME, InvalidAccess, Patterns

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

ALGORITHM = "EdDSA"
MAX_TOKEN_BYTES = 4096
"""Longest token looked at. One with every claim and a few patterns takes 500 bytes."""
MAX_LIFETIME_SECONDS = 31 * 24 * 3600.0
"""From iat to exp. A stolen token must end by itself; a month is for machines that are rarely visited."""
CLOCK_SKEW_SECONDS = 30.0
"""How far the clocks of whoever signs and whoever verifies may be apart."""
# A signature of Ed25519 is 64 bytes, 86 characters. Anything looser would let one token be written in many ways.
_FORM = re.compile(r"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]{86})")
_HEADER = {"alg", "typ", "kid"}

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME)]
Seconds = Annotated[float, msgspec.Meta(gt=0, lt=1e12)]


class Claims(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a token says. `exp`, `iat`, `nbf`: seconds of the epoch. `sub`: the client. `models`: shell patterns, None = all
    that its tenant may use. `admin`: may load and unload models. `jti`: a name for this one token, to revoke it by."""

    sub: Name
    aud: str | list[str]
    iat: Seconds
    exp: Seconds
    nbf: Seconds | None = None
    jti: Name | None = None
    tenant: Name | None = None
    models: Patterns | None = None
    admin: bool = False


class Unverified(msgspec.Struct, frozen=True):
    """A token taken apart, not believed. `claims`: None = they do not decode, `problem` says why."""

    header: Mapping[str, Any]
    payload: bytes
    claims: Claims | None
    problem: str | None = None


def issue(private: Ed25519PrivateKey, kid: str, claims: Claims) -> str:
    """Sign `claims`. Raises InvalidAccess when no server would accept the token."""
    if claims.exp - claims.iat > MAX_LIFETIME_SECONDS:
        raise InvalidAccess(f"a token lives {MAX_LIFETIME_SECONDS / 86_400:.0f} days at most")
    payload = msgspec.json.encode(claims)
    token: str = jws().encode(payload, private, algorithm=ALGORITHM, headers={"kid": kid, "typ": "JWT"})
    if len(token) > MAX_TOKEN_BYTES:
        raise InvalidAccess(f"the token would take {len(token)} bytes, {MAX_TOKEN_BYTES} at most are accepted")
    # Decoded again by the rules it will be held to.
    checked = _decode_claims(payload)
    if isinstance(checked, str):
        raise InvalidAccess(checked)
    return token


def new_jti() -> str:
    return secrets.token_urlsafe(12)


def verify(token: str, key: Ed25519PublicKey, audience: str, now: float) -> Claims:
    """The claims of a token that `key` signed for `audience` and that is valid at `now`, seconds of the epoch.

    Ask `find_key` first. Costs 0.15 ms. Raises Unauthenticated; what a token says is repeated only once its signature holds.
    """
    from jwt import InvalidTokenError

    try:
        payload = jws().decode_complete(token, key, algorithms=[ALGORITHM])["payload"]
    except InvalidTokenError:
        raise Unauthenticated("the token's signature does not hold") from None
    assert isinstance(payload, bytes)
    claims = _decode_claims(payload)
    if isinstance(claims, str):
        raise Unauthenticated(f"the token's claims are not accepted: {claims}")
    require_valid(claims, audience, now)
    return claims


def require_valid(claims: Claims, audience: str, now: float) -> None:
    """Raises Unauthenticated with the first of `problems`."""
    problem = next(iter(problems(claims, audience, now)), None)
    if problem is not None:
        raise Unauthenticated(problem)


def problems(claims: Claims, audience: str, now: float) -> list[str]:
    """Why claims that decode are not accepted at `now`; [] when they are."""
    found = []
    audiences = [claims.aud] if isinstance(claims.aud, str) else claims.aud
    if audience not in audiences:
        found.append(f"the token is not for the audience '{audience}'")
    # Written so that a NaN would fail too.
    if not claims.iat <= now + CLOCK_SKEW_SECONDS:
        found.append(f"the token was issued in the future, by {claims.iat - now:.0f} s: compare the clocks")
    if claims.nbf is not None and not claims.nbf <= now + CLOCK_SKEW_SECONDS:
        found.append(f"the token is not valid before {claims.nbf - now:.0f} s from now")
    if not now < claims.exp + CLOCK_SKEW_SECONDS:
        found.append(f"the token expired {now - claims.exp:.0f} s ago")
    if not 0 < claims.exp - claims.iat <= MAX_LIFETIME_SECONDS:
        found.append(f"the token lives longer than {MAX_LIFETIME_SECONDS / 86_400:.0f} days, or ends before it begins")
    return found


def take_apart(token: str) -> Unverified:
    """Decode without any key, to show a token. Raises InvalidAccess when it has not the form of a token at all."""
    form = _FORM.fullmatch(token) if len(token) <= MAX_TOKEN_BYTES else None
    parts = token.split(".") if form is None else list(form.groups())
    if len(parts) != 3:
        raise InvalidAccess("not a token: it has not three parts separated by dots")
    try:
        header, payload = msgspec.json.decode(_decode(parts[0])), _decode(parts[1])
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise InvalidAccess(f"not a token: {error}") from error
    if not isinstance(header, dict):
        raise InvalidAccess("not a token: its header is not a JSON object")
    claims = _decode_claims(payload)
    problem = header_problem(header) or (
        None if form else "the token is too long, or its signature is not one of Ed25519"
    )
    if isinstance(claims, str):
        return Unverified(header, payload, None, problem or claims)
    return Unverified(header, payload, claims, problem)


def header_problem(header: Mapping[str, Any]) -> str | None:
    """Why a token with this header is refused, whoever signed it."""
    if header.get("alg") != ALGORITHM:
        return f"the token is not signed with {ALGORITHM}"
    if str(header.get("typ", "JWT")).upper() != "JWT":
        return "the token's typ is not JWT"
    if not isinstance(header.get("kid"), str):
        return "the token's header names no key (kid)"
    # RFC 7515 4.1.11 and 4.1.2 to 4.1.5: crit must be understood, jku, jwk and x5u would let the token choose its own key.
    if not header.keys() <= _HEADER:
        return "the token's header holds more than alg, typ and kid"
    return None


def find_key(token: str, keys: Mapping[str, Ed25519PublicKey]) -> tuple[str, Ed25519PublicKey]:
    """Which of `keys` a token says it is signed with, and its kid. Costs a tenth of `verify`. Raises Unauthenticated for what
    has not the form of a token, too."""
    form = _FORM.fullmatch(token) if len(token) <= MAX_TOKEN_BYTES else None
    if form is None:
        raise Unauthenticated(
            f"the bearer token is malformed: not an {ALGORITHM} token of {MAX_TOKEN_BYTES} bytes at most"
        )
    try:
        header = msgspec.json.decode(_decode(form[1]), type=dict[str, Any])
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise Unauthenticated("the bearer token is malformed: its header does not decode") from None
    problem = header_problem(header)
    if problem is not None:
        raise Unauthenticated(problem)
    key = keys.get(header["kid"])
    if key is None:
        raise Unauthenticated("the token is signed with a key that is not known here")
    return header["kid"], key


def _decode_claims(payload: bytes) -> Claims | str:
    """The claims, or what is wrong with them."""
    try:
        claims = msgspec.json.decode(payload, type=Claims)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        return str(error).replace("`$.", "`").replace("Object missing", "missing")
    for name in (claims.sub, claims.tenant or "-", claims.jti or "-"):
        if not name.isprintable():
            return "a name holds a character that cannot be printed"
    return claims


def _decode(part: str) -> bytes:
    return base64.b64decode(part + "=" * (-len(part) % 4), altchars=b"-_", validate=True)


@lru_cache(maxsize=1)
def jws() -> Any:
    """PyJWT's signer and verifier, which knows one algorithm. Raises InvalidAccess where PyJWT is not installed."""
    try:
        from jwt import PyJWS
    except ModuleNotFoundError as error:
        raise InvalidAccess("tokens need PyJWT: pip install 'tierline[edge]'") from error
    return PyJWS(algorithms=[ALGORITHM])
