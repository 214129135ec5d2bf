"""The blocking client."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from models.client.address import Address, PathText, parse_address
from models.client.answer import Answer, Metadata, ModelState, ModelStatistics
from models.client.asking import Known, check_connections, check_timeout, make_budget, make_calls, make_request
from models.client.calls import Call, Transport
from models.client.http_blocking import BlockingHttp
from models.client.retries import Retries
from models.client.tensors import Inputs, as_sent, as_wanted
from models.errors import DeadlineExceeded, NotFound, NotReady, TierlineError, Unreachable

T = TypeVar("T")


class Client:
    """Asks an Open Inference Protocol server; from any number of threads at once.

    `url`: http://host:port, https://host:port, unix:///path.sock, grpc://host:port or grpcs://host:port. `token`: sent as a
    bearer token. `timeout`: seconds for a call that does not say, connecting included; `connect_timeout`: for a connection
    alone. `ca`, `certificate`, `key`: PEM files for https and grpcs: the only authorities to trust (None = the system's), and
    what to show a server that asks who we are. At most `max_connections` are open; a call that finds none free waits.
    `retries`: 0 = a refusal is raised as it comes; n, or a `Retries`, = tried again when the server is overloaded, not ready
    or unreachable, within the timeout. Raises ValueError for what it cannot use, OSError for a file it cannot read.

    Every call raises only errors of `models.errors`; TypeError and the like mean a wrong argument.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout: float = 5.0,
        connect_timeout: float = 1.0,
        ca: PathText | None = None,
        certificate: PathText | None = None,
        key: PathText | None = None,
        max_connections: int = 16,
        retries: int | Retries = 0,
    ) -> None:
        address = parse_address(url, ca=ca, certificate=certificate, key=key)
        self._timeout = check_timeout(timeout)
        self._calls = make_calls(address, token)
        self._transport = _transport(address, check_connections(max_connections), connect_timeout, ca, certificate, key)
        self._budget = make_budget(retries)
        self._known = Known()

    def infer(
        self,
        model: str,
        inputs: Inputs,
        *,
        version: str | None = None,
        outputs: Sequence[str] = (),
        timeout: float | None = None,
        min_confidence: float | None = None,
        priority: int = 0,
        id: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        trace: str | None = None,
    ) -> Answer:
        """The model's answer, within `timeout` seconds.

        `inputs`: name -> array, sent as it is. A list, or the value alone for a model with one input, is brought into the
        model's datatype: its metadata is asked for once, and remembered. `version` None = the one being served. `outputs`:
        names wanted, () = all. `min_confidence`: 0..1, answers below it are escalated, None = as the server's policy says.
        `priority`: 0 = default, 1 = high, 2 = normal, 3 and above = low. `id`: comes back in the answer. `parameters`: the
        protocol's own. `trace`: a W3C traceparent.

        Raises InvalidRequest, NotFound, Unauthenticated, Forbidden, TooLarge (this call), DeadlineExceeded, Overloaded,
        NotReady, Unreachable (this moment) or EngineFailure.
        """
        deadline = self._deadline(timeout)
        arrays = as_sent(inputs)
        if arrays is not None:
            request = make_request(model, arrays, version, outputs, min_confidence, priority, id, parameters, trace)
            return self._run(self._calls.infer(request), deadline)
        known = self._known.get(model, version)
        if known is None:
            known = self._known.put(model, version, self._run(self._calls.metadata(model, version), deadline))
        arrays = as_wanted(inputs, known)
        request = make_request(model, arrays, version, outputs, min_confidence, priority, id, parameters, trace)
        try:
            return self._run(self._calls.infer(request), deadline)
        except TierlineError as error:
            self._known.forget(model, version, error)
            raise

    def live(self, *, timeout: float | None = None) -> bool:
        """Whether the server answers at all."""
        return self._is_well(self._calls.live(), timeout)

    def ready(self, model: str | None = None, *, version: str | None = None, timeout: float | None = None) -> bool:
        """Whether the server, or a model, can answer now. Of a model that is unknown: no."""
        return self._is_well(self._calls.ready(model, version), timeout)

    def metadata(self, model: str, *, version: str | None = None, timeout: float | None = None) -> Metadata:
        """What inputs and outputs a model has. Raises NotFound."""
        return self._run(self._calls.metadata(model, version), self._deadline(timeout))

    def models(self, *, timeout: float | None = None) -> list[str]:
        """Names of the models that are ready, sorted."""
        states = self._run(self._calls.index(True), self._deadline(timeout))
        return sorted({state.name for state in states})

    def index(self, *, ready_only: bool = False, timeout: float | None = None) -> list[ModelState]:
        """Every version of every model that the server knows, with its state and the reason when it is not READY."""
        return self._run(self._calls.index(ready_only), self._deadline(timeout))

    def load(self, model: str, *, timeout: float | None = None) -> None:
        """Make a model ready, or ready again. Raises Forbidden, NotFound, Conflict where a hub decides, PackageError."""
        self._run(self._calls.load(model), self._deadline(timeout))

    def unload(self, model: str, *, timeout: float | None = None) -> None:
        """Take a model out of service. Raises as `load`."""
        self._run(self._calls.unload(model), self._deadline(timeout))

    def config(self, model: str, *, version: str | None = None, timeout: float | None = None) -> Mapping[str, Any]:
        """The model's configuration in the form of Triton's model configuration extension. Raises NotFound."""
        return self._run(self._calls.config(model, version), self._deadline(timeout))

    def statistics(
        self, model: str | None = None, *, version: str | None = None, timeout: float | None = None
    ) -> Sequence[ModelStatistics]:
        """Counters since the server began: of one model, or of all. Raises NotFound."""
        return self._run(self._calls.statistics(model, version), self._deadline(timeout))

    def close(self) -> None:
        """Close every connection; calls under way finish, later ones fail with Unreachable."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _deadline(self, timeout: float | None) -> float:
        return time.monotonic() + (self._timeout if timeout is None else check_timeout(timeout))

    def _is_well(self, call: Call[bool], timeout: float | None) -> bool:
        try:
            return self._transport.run(call, self._deadline(timeout))
        except (Unreachable, NotReady, DeadlineExceeded, NotFound):
            return False

    def _run(self, call: Call[T], deadline: float) -> T:
        budget = self._budget
        if budget is None or not call.repeatable:
            return self._transport.run(call, deadline)
        budget.begin()
        tried = 0
        while True:
            try:
                return self._transport.run(call, deadline)
            except TierlineError as error:
                pause = budget.pause(tried, error, deadline - time.monotonic())
                if pause is None:
                    raise
            time.sleep(pause)
            tried += 1


def _transport(
    address: Address,
    size: int,
    connect_timeout: float,
    ca: PathText | None,
    certificate: PathText | None,
    key: PathText | None,
) -> Transport:
    if address.grpc:
        from models.client.grpc_blocking import BlockingGrpc

        return BlockingGrpc(address, ca=ca, certificate=certificate, key=key)
    return BlockingHttp(address.endpoint, size=size, connect_timeout=connect_timeout)
