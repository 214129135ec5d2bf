"""No secret gets out: what is known to be secret, by its value, and what looks like one, by its form.

The second line of defence: findings are written without secrets, and configurations go out by a list of allowed fields.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

GONE = "[removed]"
MIN_SECRET = 6
"""A shorter value is left where it stands: taking every 'on' out of a text would hide what it says, and protect nothing."""
MAX_SECRETS = 500

_NAMES = re.compile(
    r"(?i)(?:^|[_.-])(?:pass|passwd|password|pwd|secret|token|apikey|api_key|key|credential|credentials|auth|authorization"
    r"|cookie|session|dsn|private)(?:$|[_.-])|(?i:token|secret|password|credential)$"
)
_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL), GONE),
    (re.compile(r"\b([a-zA-Z][a-zA-Z0-9+.-]*://)[^\s/@'\"<>]+@"), rf"\1{GONE}@"),
    (re.compile(r"\beyJ[\w-]{8,}\.[\w-]+\.[\w-]*"), GONE),
    (re.compile(r"\btl[a-z]_[\w-]{16,}"), GONE),
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{6,}"), rf"\1 {GONE}"),
    (
        re.compile(
            r"(?i)([\"']?[\w.-]*(?:password|passwd|secret|token|api_?key|credential|authorization)[\"']?\s*=\s*)"
            r"(?:\"[^\"\n]*\"|'[^'\n]*'|[^\s,;}\]]+)"
        ),
        rf"\1{GONE}",
    ),
    # With a colon only what cannot be a word of a sentence: "token: it is missing" has to stay.
    (
        re.compile(r"(?i)((?:password|passwd|secret|token|api_?key|authorization)\"?\s*:\s*)\"[^\"\n]*\""),
        rf'\1"{GONE}"',
    ),
    (re.compile(r"(?i)((?:password|passwd|secret|token|api_?key)\s*:\s*)(?=\S*\d)[^\s,;}\]]{6,}"), rf"\1{GONE}"),
    (re.compile(r"\$7\$\d+\$[\w+/=]+\$[\w+/=]+"), GONE),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bgh[pousr]_\w{20,}|\bxox[abprs]-[\w-]{10,}|\bsk-[\w-]{20,}"), GONE),
)


class Redaction:
    """`secrets`: values that must never appear, wherever they come from."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        found = {value for secret in secrets for value in _forms(secret)}
        # The longest first: one may be a part of another.
        self._secrets = sorted(found, key=len, reverse=True)[:MAX_SECRETS]

    def text(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, GONE)
        for pattern, instead in _PATTERNS:
            text = pattern.sub(instead, text)
        return text

    def value(self, value: Any) -> Any:
        """The same for JSON: every text in it, keys too."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self.text(str(key)): self.value(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(item) for item in value]
        return value


def secrets_of_environment(environ: Mapping[str, str]) -> list[str]:
    """Values of variables whose name says that they are secret, and what stands before the @ of URLs."""
    named = [value for name, value in environ.items() if _NAMES.search(name) and "/" not in value[:1]]
    return named + [found for value in environ.values() for found in secrets_of_url(value)]


def secrets_of_url(url: str) -> list[str]:
    """User and password of a URL."""
    match = re.match(r"[a-zA-Z][\w+.-]*://([^/@\s]*)@", url)
    if match is None:
        return []
    user, _, password = match[1].partition(":")
    return [password] if password else [user]


def secrets_in(value: Any, name: str = "") -> list[str]:
    """Texts of a configuration that are secret by the name they stand under, at any depth, and passwords in its URLs."""
    if isinstance(value, Mapping):
        return [found for key, item in value.items() for found in secrets_in(item, str(key))]
    if isinstance(value, list):
        return [found for item in value for found in secrets_in(item, name)]
    if not isinstance(value, str):
        return []
    return ([value] if _NAMES.search(name) and "/" not in value and "." not in value else []) + secrets_of_url(value)


def _forms(secret: str) -> list[str]:
    from urllib.parse import quote, unquote

    stripped = secret.strip()
    return [form for form in {stripped, unquote(stripped), quote(stripped, safe="")} if len(form) >= MIN_SECRET]
