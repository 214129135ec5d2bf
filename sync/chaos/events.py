"""What happens, as one line of JSON per event on standard output."""

from __future__ import annotations

import json
import sys

from sync.clock import Clock, SystemClock


def say(event: str, *, clock: Clock | None = None, **facts: object) -> None:
    """Write the event with its time (Unix seconds) at once: who reads it may be waiting for it."""
    at = round((clock or SystemClock()).wall(), 3)
    sys.stdout.write(json.dumps({"event": event, "at": at, **facts}) + "\n")
    sys.stdout.flush()
