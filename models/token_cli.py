"""`tierline token`: make keys, issue bearer tokens for the data plane, and look into them."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path

from models.errors import Unauthenticated
from models.serving.access.checked import CheckedAccess
from models.serving.access.keys import kid_of, load_private_key, new_key
from models.serving.access.settings import InvalidAccess
from models.serving.access.tokens import (
    MAX_LIFETIME_SECONDS,
    MAX_TOKEN_BYTES,
    Claims,
    issue,
    new_jti,
    problems,
    take_apart,
)
from models.serving.caller import LOCAL_PEER

DEFAULT_HOURS = 8.0
AUDIENCE = "tierline"
STANDARD_INPUT = "-"


def token(argv: Sequence[str]) -> int:
    """Run one of its commands. Returns the exit code: 0 = done, 1 = the token shown is no good, 2 = wrong usage or file."""
    options = _parser().parse_args(argv)
    try:
        code: int = options.run(options)
    except (InvalidAccess, OSError) as error:
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        print(f"tierline token: {text}", file=sys.stderr)
        return 2
    return code


def _new_key(options: argparse.Namespace) -> int:
    private, public = new_key(options.folder)
    print(f"private key  {private}   keep it where tokens are issued, nowhere else")
    print(f'public key   {public}   give it to servers: keys = "{options.folder.name or "."}" in their access file')
    return 0


def _issue(options: argparse.Namespace) -> int:
    private = load_private_key(options.key)
    kid = kid_of(private.public_key()) if options.kid is None else options.kid
    now = float(int(time.time()))
    claims = Claims(
        sub=options.client,
        aud=options.audience,
        iat=now,
        exp=now + float(int(options.hours * 3600)),
        jti=new_jti(),
        tenant=options.tenant,
        models=tuple(options.models) if options.models else None,
        admin=options.admin,
    )
    signed = issue(private, kid, claims)
    for line in _lines(claims, now):
        print(line, file=sys.stderr)
    # Alone on standard output: TOKEN=$(tierline token issue ...)
    print(signed)
    return 0


def _show(options: argparse.Namespace) -> int:
    text = sys.stdin.read(MAX_TOKEN_BYTES * 2) if options.token == STANDARD_INPUT else options.token
    text = text.strip()
    if text[:7].lower() == "bearer ":
        text = text[7:].strip()
    access = None if options.access is None else CheckedAccess(options.access)
    audience = options.audience if access is None else access.settings.audience
    seen, now = take_apart(text), time.time()
    print(f"algorithm  {_plain(seen.header.get('alg', 'none'))}\nkey        {_plain(seen.header.get('kid', 'none'))}")
    wrong = [] if seen.problem is None else [seen.problem]
    if seen.claims is not None:
        print("\n".join(_lines(seen.claims, now)))
        wrong += problems(seen.claims, audience, now)
    if access is not None and not wrong:
        wrong += _refused_by(access, text)
    for each in wrong:
        print(f"wrong      {each}")
    if not wrong:
        print("accepted   by that server" if access else "well formed; --access FILE also checks the signature")
    return 1 if wrong else 0


def _refused_by(access: CheckedAccess, text: str) -> list[str]:
    try:
        access.identify(LOCAL_PEER, b"Bearer " + text.encode())
    except Unauthenticated as error:
        return [str(error)]
    return []


def _lines(claims: Claims, now: float) -> list[str]:
    left = claims.exp - now
    return [
        f"client     {claims.sub}",
        f"tenant     {claims.tenant or 'none'}",
        f"models     {', '.join(map(_plain, claims.models)) if claims.models is not None else 'all that the tenant may use'}",
        f"admin      {'yes' if claims.admin else 'no'}",
        f"audience   {_plain(claims.aud)}",
        f"id         {claims.jti or 'none'}",
        f"issued     {_when(claims.iat)}",
        f"expires    {_when(claims.exp)}, {_span(left)}{' from now' if left > 0 else ' ago'}",
    ]


def _when(seconds: float) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (ValueError, OverflowError, OSError):
        return f"{seconds:g} s of the epoch"


def _span(seconds: float) -> str:
    size = abs(seconds)
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if size >= 2 * length:
            return f"{size / length:.0f} {unit}"
    return f"{size:.0f} s"


def _plain(value: object) -> str:
    """What an unverified token says, made harmless for a terminal."""
    text = str(value)
    return text if text.isprintable() else ascii(text)


def _hours(text: str) -> float:
    try:
        hours = float(text)
    except ValueError:
        hours = float("nan")
    if not (isfinite(hours) and 0 < hours * 3600 <= MAX_LIFETIME_SECONDS):
        raise argparse.ArgumentTypeError(f"{text!r} is not a time from 0 to {MAX_LIFETIME_SECONDS / 3600:.0f} hours")
    return hours


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tierline token", description="Bearer tokens of the data plane.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    made = commands.add_parser("new-key", help="make a key pair", description="Make a key pair to sign tokens with.")
    made.add_argument("folder", type=Path, metavar="DIR", help="where <kid>.key (private) and <kid>.pem (public) go")
    made.set_defaults(run=_new_key)

    issued = commands.add_parser(
        "issue", help="issue a token", description="Sign a token; it alone goes to standard output."
    )
    issued.add_argument("--key", type=Path, required=True, metavar="FILE", help="private key, mode 0600")
    issued.add_argument("--kid", help="name that servers know the key by (default: what new-key called it)")
    issued.add_argument("--client", required=True, help="who will use it: limits and logs go by this name")
    issued.add_argument("--tenant", help="whose models it may use")
    issued.add_argument(
        "--models", action="append", metavar="PATTERN", help="only these, shell patterns; may be repeated"
    )
    issued.add_argument(
        "--hours", type=_hours, default=DEFAULT_HOURS, help=f"how long it lives (default {DEFAULT_HOURS:g})"
    )
    issued.add_argument("--admin", action="store_true", help="it may also load and unload models")
    issued.add_argument("--audience", default=AUDIENCE, help=f"as the servers' access file says (default {AUDIENCE})")
    issued.set_defaults(run=_issue)

    shown = commands.add_parser(
        "show", help="look into a token", description="Say what a token holds and what is wrong with it."
    )
    shown.add_argument(
        "token", metavar="TOKEN", help="'-' = read it from standard input, so that no process list shows it"
    )
    shown.add_argument("--audience", default=AUDIENCE, help=f"as the server's access file says (default {AUDIENCE})")
    shown.add_argument(
        "--access", type=Path, metavar="FILE", help="also say whether a server with this access file takes it"
    )
    shown.set_defaults(run=_show)
    return parser
