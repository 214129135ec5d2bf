"""What the catalogue says of one metric."""

from __future__ import annotations

import msgspec


class Entry(msgspec.Struct, frozen=True):
    """One metric. `kind`: counter, gauge or histogram. `labels`: names, in the order they are written.

    `text`: what it says; `bad`: what to do when it looks bad.
    """

    name: str
    kind: str
    unit: str
    labels: tuple[str, ...]
    text: str
    bad: str
