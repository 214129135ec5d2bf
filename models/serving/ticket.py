"""One request's run, from being asked for to its outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from models.serving.drive import Parked
from models.tensor import Array

if TYPE_CHECKING:
    from models.serving.loaded import Loaded


class Run:
    """Outputs in the order of the names asked for; when the run started and ended, monotonic seconds; rows run together."""

    __slots__ = ("ended", "outputs", "rows", "started")

    def __init__(self, outputs: list[Array], started: float, ended: float, rows: int = 1) -> None:
        self.outputs = outputs
        self.started = started
        self.ended = ended
        self.rows = rows


class Ticket:
    """`key`: runs of one version with equal keys may be made together. `deadline`: monotonic seconds. `cost`: seconds the run
    is expected to take. `gone`: nobody waits any more. `parked`: where the
    caller waits. `taken`: no longer in the queue. `threaded`: made in a thread."""

    __slots__ = (
        "cost",
        "deadline",
        "gone",
        "inputs",
        "key",
        "loaded",
        "names",
        "parked",
        "priority",
        "rows",
        "taken",
        "threaded",
    )

    def __init__(
        self,
        loaded: Loaded,
        inputs: Mapping[str, Array],
        names: Sequence[str],
        rows: int,
        key: object,
        deadline: float,
        priority: int,
        parked: Parked[Run],
    ) -> None:
        self.loaded = loaded
        self.inputs = inputs
        self.names = names
        self.rows = rows
        self.key = key
        self.deadline = deadline
        self.priority = priority
        self.parked = parked
        self.cost = 0.0
        self.gone = False
        self.taken = False
        self.threaded = False
