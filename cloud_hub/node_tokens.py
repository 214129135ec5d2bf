"""Bearer tokens that nodes sign themselves: JSON Web Tokens by the key of their certificate.

A node so has no second secret. The key is looked up by the node it names, never taken from the token. A token that is
overheard is good for five minutes; TLS keeps it from being overheard.
Sources: RFC 7519 (JWT), RFC 8725 (best practice: algorithms and claims decided by the verifier).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cryptography.hazmat.primitives.serialization import load_der_public_key

AUDIENCE = "tierline-hub"
MAX_LIFETIME_SECONDS = 300.0
CLOCK_SKEW_SECONDS = 60.0
"""How far a node's clock may be from the hub's; beyond it the node can renew its certificate but not fetch files."""
MAX_CHARS = 2048
MAX_TIME = 1e12
"""Unix seconds; nobody means a later time."""
REQUIRED = ("exp", "iat", "aud", "sub", "jti")
ALGORITHMS = ("ES256", "EdDSA")


def looks_like_one(token: str) -> bool:
    return len(token) <= MAX_CHARS and token.count(".") == 2 and token.startswith("ey")


def claimed_node(token: str) -> str | None:
    """Whom the token says it is of, unverified: to look the keys up."""
    claims = _decode(token, None, verify=False)
    subject = claims.get("sub") if claims is not None else None
    return subject if isinstance(subject, str) else None


def is_genuine(token: str, keys: Iterable[bytes], now: float) -> bool:
    """Whether one of `keys` (SubjectPublicKeyInfo, DER) signed it, for this audience, and it is valid at `now`."""
    for der in keys:
        claims = _decode(token, load_der_public_key(der), verify=True)
        if claims is not None:
            return _is_valid(claims, now)
    return False


def _is_valid(claims: dict[str, Any], now: float) -> bool:
    issued, expires = claims["iat"], claims["exp"]
    # Comparing refuses NaN and infinity, and an integer too large for a float.
    if not all(isinstance(value, int | float) and 0 < value < MAX_TIME for value in (issued, expires)):
        return False
    lives = 0 < expires - issued <= MAX_LIFETIME_SECONDS
    return bool(lives and issued <= now + CLOCK_SKEW_SECONDS and now < expires + CLOCK_SKEW_SECONDS)


def _decode(token: str, key: Any, *, verify: bool) -> dict[str, Any] | None:
    import jwt

    # Times are checked by `_is_valid`, against the hub's own clock object.
    times = {"verify_exp": False, "verify_iat": False, "verify_nbf": False}
    options: Any = {"require": list(REQUIRED), "verify_signature": verify, "verify_aud": verify, **times}
    try:
        found: dict[str, Any] = jwt.decode(token, key, algorithms=list(ALGORITHMS), audience=AUDIENCE, options=options)
    except (jwt.PyJWTError, ValueError, TypeError, RecursionError):
        return None
    return found
