"""How many calls are under way, in all and of each caller, so that nobody takes the places of everybody."""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial
from typing import Any

from models.errors import Overloaded
from models.serving.caller import Caller, Peer


class Places:
    """`most` calls at once, `most_each` of them of one caller; `what` names them to who is refused."""

    def __init__(self, what: str, most: int, most_each: int) -> None:
        self._what = what
        self._most = most
        self._most_each = most_each
        self._taken = 0
        self._of: dict[Hashable, int] = {}

    def take(self, who: Hashable, context: Any) -> None:
        """Take a place until the call of `context` has ended and its answer is sent. Raises Overloaded."""
        own = self._of.get(who, 0)
        if own >= self._most_each:
            raise Overloaded(f"{own} {self._what} of this caller are under way, no more are accepted")
        if self._taken >= self._most:
            raise Overloaded(f"{self._taken} {self._what} are under way, no more are accepted")
        self._of[who] = own + 1
        self._taken += 1
        context.add_done_callback(partial(self._give, who))

    def _give(self, who: Hashable, context: Any) -> None:
        self._taken -= 1
        if self._of[who] == 1:
            del self._of[who]
        else:
            self._of[who] -= 1


def who_of(caller: Caller, peer: Peer) -> Hashable:
    """Whose place a call takes: that of a client with a name, wherever it calls from, else that of its address."""
    return peer.address if caller.client is None else (caller.tenant, caller.client)
