"""What is wrong with a node that nobody notices while it serves: judged by the clock, told when it begins and when it ends.

An expired repository or certificate stops updates, never inference, and no event marks the moment: so somebody has to look.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import msgspec

from sync.clock import Clock
from sync.outbox import Outbox

LOOK_SECONDS = 60.0
"""Between two looks. What raises an alarm here is measured in hours."""
KIND = "alarm"

log = logging.getLogger(__name__)

Judge = Callable[[], str]
"""What is wrong, in words; empty when nothing is."""


class Alarms:
    """`judges`: by the alarm's name. `on_change` is called when `raised` has changed; the hub hears of it by an event too."""

    def __init__(
        self, judges: Mapping[str, Judge], outbox: Outbox, clock: Clock, on_change: Callable[[], None] = lambda: None
    ) -> None:
        self.raised: dict[str, str] = {}
        self._judges = judges
        self._outbox = outbox
        self._clock = clock
        self.on_change = on_change

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self.look()
            await self._clock.sleep(LOOK_SECONDS)

    def look(self) -> None:
        """Judge now. Never raises: a judge that fails says nothing."""
        changed = False
        for name, judge in self._judges.items():
            try:
                text = judge()
            except Exception:
                log.exception("whether to raise %s could not be judged", name)
                continue
            if bool(text) != (name in self.raised):
                changed = True
                self._tell(name, text)
            if text:
                self.raised[name] = text
            else:
                self.raised.pop(name, None)
        if changed:
            self.on_change()

    def _tell(self, name: str, text: str) -> None:
        state = "raised" if text else "cleared"
        log.log(logging.WARNING if text else logging.INFO, "alarm %s %s%s", name, state, f": {text}" if text else "")
        body = {"alarm": name, "state": state, "text": text[:500]}
        self._outbox.offer(KIND, msgspec.json.encode(body))
