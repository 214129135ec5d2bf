"""What is no longer believed although its signature holds: a text file, appended to by hand or by a script.

# one line each, what follows a '#' is a remark
jti mJ0dPq3kVh2yX9aB            one token
sub acme.gateway-7              every token and certificate of a client
sub acme.gateway-7 1763800000   those of its tokens that were issued before (seconds of the epoch)
sub "Pump house"                a name with spaces is quoted
"""

from __future__ import annotations

import shlex
from pathlib import Path

import msgspec

from models.serving.access.settings import InvalidAccess

MAX_REVOKED_BYTES = 1024 * 1024
"""Some thirty thousand lines; they are read within the event loop, in about 20 ms."""
FOREVER = float("inf")
MAX_DIGITS = 12
"""Of a time in seconds; more would be milliseconds, or a slip."""


class Revoked(msgspec.Struct, frozen=True):
    """`tokens`: by jti. `clients`: name -> issued before which time they are refused, `FOREVER` = always."""

    tokens: frozenset[str] = frozenset()
    clients: dict[str, float] = {}

    def covers(self, client: str, jti: str | None = None, issued: float = FOREVER) -> bool:
        """Whether a token, or with no `issued` a certificate, of `client` is revoked."""
        if jti in self.tokens:
            return True
        before = self.clients.get(client)
        if before is None:
            return False
        return before == FOREVER or issued < before


NOTHING = Revoked()


def load_revoked(path: Path) -> tuple[Revoked, list[str]]:
    """The file's content, and its lines that say nothing. Raises InvalidAccess when it cannot be read."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_REVOKED_BYTES + 1)
    except OSError as error:
        raise InvalidAccess(f"revoked: {path}: {error.strerror}; an empty file revokes nothing") from error
    if len(data) > MAX_REVOKED_BYTES:
        raise InvalidAccess(f"revoked: {path}: more than {MAX_REVOKED_BYTES} bytes; take out what has expired")
    tokens, clients, wrong = set[str](), dict[str, float](), list[str]()
    for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
        match _words(line):
            case []:
                pass
            case ["jti", token]:
                tokens.add(token)
            case ["sub", client]:
                clients[client] = FOREVER
            case ["sub", client, before] if before.isdecimal() and len(before) < MAX_DIGITS:
                clients[client] = max(float(before), clients.get(client, 0.0))
            case _:
                wrong.append(f"revoked: {path} line {number}: neither 'jti ID' nor 'sub CLIENT [SECONDS]'")
    return Revoked(frozenset(tokens), clients), wrong


def _words(line: str) -> list[str] | None:
    """None = a quote is not closed."""
    if '"' not in line and "'" not in line:
        return line.partition("#")[0].split()  # shlex takes twenty times as long
    try:
        return shlex.split(line, comments=True)
    except ValueError:
        return None
