"""The data plane as every frontend sees it: REST, gRPC and WebSocket translate, this decides.

Whatever a frontend asks goes through here with the caller's identity, so that visibility and errors are the same on all of
them. Only inferring itself goes to `predictor` directly, after `require`.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

from models.errors import Conflict, NotFound
from models.serving.caller import Access, Caller, OpenAccess, require_admin
from models.serving.exchange import HttpRequest, HttpResponse
from models.serving.index import ModelControl, ModelDescription, ModelIndex, ModelState, ModelStatistics, Statistics
from models.serving.logs import LogSettings
from models.serving.predictor import Predictor

EXTENSIONS = (
    "binary_tensor_data",
    "model_configuration",
    "model_repository",
    "model_repository(unload_dependents)",
    "parameters",
    "statistics",
    "logging",
)
"""Protocol extensions that this server has, by the names Triton gave them."""


Submit = Callable[[Caller, HttpRequest, str, "str | None"], Coroutine[Any, Any, HttpResponse]]
"""Takes an inference to be made later: caller, request, model, version."""


class DataPlane:
    """`ready` says whether the server as a whole may get traffic. `control` None = models are decided elsewhere.

    `statistics` None = nothing counts here. `name`: of the server, in its metadata. `submit`: set once there is something
    that makes inferences later, None = there is not.
    """

    def __init__(
        self,
        predictor: Predictor,
        index: ModelIndex,
        *,
        ready: Callable[[], bool],
        name: str = "tierline",
        access: Access | None = None,
        control: ModelControl | None = None,
        statistics: Statistics | None = None,
        logs: LogSettings | None = None,
    ) -> None:
        self.predictor = predictor
        self.access = access or OpenAccess()
        self.control = control
        self.logs = logs or LogSettings()
        self.submit: Submit | None = None
        self.name = name
        self._index = index
        self._ready = ready
        self._statistics = statistics

    @cached_property
    def version(self) -> str:
        """Of this distribution. Looked up when first asked for: it takes 20 ms, which a start need not."""
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("tierline")
        except PackageNotFoundError:
            return "0"

    def require(self, caller: Caller, model: str) -> None:
        """Raises NotFound for a model that `caller` may not know of, in the words used for one that does not exist."""
        if not self.access.may_use(caller, model):
            raise NotFound(f"model '{model}' is not served here")

    def is_ready(self) -> bool:
        return self._ready()

    def names(self, caller: Caller) -> Sequence[str]:
        return [name for name in self._index.names() if self.access.may_use(caller, name)]

    def describe(self, caller: Caller, model: str, wanted: str | None) -> ModelDescription:
        self.require(caller, model)
        return self._index.describe(model, wanted)

    def model_ready(self, caller: Caller, model: str, wanted: str | None) -> bool:
        self.require(caller, model)
        return self._index.is_ready(model, wanted)

    def config(self, caller: Caller, model: str, wanted: str | None) -> Mapping[str, object]:
        self.require(caller, model)
        if self.control is not None:
            return self.control.config(model, wanted)
        known = self._index.describe(model, wanted)
        return {"name": model, "platform": known.platform, "backend": known.platform.partition("_")[0]}

    def statistics(self, caller: Caller, model: str | None, wanted: str | None) -> Sequence[ModelStatistics]:
        """Of one model, None = of all that `caller` may know of and that have the version. Raises NotFound."""
        if model is not None:
            self.require(caller, model)
            self._index.describe(model, wanted)
        if self._statistics is None:
            return []
        if model is not None:
            return self._statistics.statistics(model, wanted)
        found: list[ModelStatistics] = []
        # One by one: an error that named another caller's model would tell that it exists.
        for name in self.names(caller):
            with suppress(NotFound):
                found += [each for each in self._statistics.statistics(name, wanted) if each.name == name]
        return found

    def states(self, caller: Caller, *, ready_only: bool = False) -> Sequence[ModelState]:
        """The repository index; without a control, of what is served."""
        if self.control is not None:
            states = self.control.states()
        else:
            states = [
                ModelState(name, each, "READY")
                for name in self._index.names()
                for each in self._index.describe(name, None).versions
            ]
        return [
            state
            for state in states
            if self.access.may_use(caller, state.name) and not (ready_only and state.state != "READY")
        ]

    async def load(self, caller: Caller, model: str) -> None:
        """Raises Forbidden, NotFound, Conflict where the hub decides, and what `ModelControl.load` raises."""
        await self._control(caller, model).load(model)

    async def unload(self, caller: Caller, model: str) -> None:
        """As `load`."""
        await self._control(caller, model).unload(model)

    def _control(self, caller: Caller, model: str) -> ModelControl:
        require_admin(caller)
        self.require(caller, model)
        if self.control is None:
            raise Conflict("what this node serves is decided by its hub: publish a deployment there")
        return self.control
