"""The one interface of the data plane. Local, remote, cached, routed: callers never learn which.

Behaviour is added by wrapping:

    tierline serve Meter(Guard(Cache(Local)))
    cloud worker   Meter(Guard(Router(here=Cache(Local), up=None)))
    edge node      Meter(Guard(Router(here=Cache(Local), up=Remote(cloud))))
    device agent   Router(here=Local, up=Remote(edge))

Times are monotonic seconds of this process (`time.monotonic`); on the wire a deadline travels as remaining milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec

from models.tensor import Array


class InferRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One inference to make.

    `inputs`: name -> array, as the model's metadata describes them. `outputs`: names wanted, () = all.
    `version`: a version of the model, None = the one being served. `deadline`: monotonic seconds, None = the policy's default.
    `min_confidence`: 0..1, answers below it are escalated; None = the policy's, else the package's threshold.
    `priority`: 0 = default, 1 = high, 2 = normal, 3 and above = low. `tenant`, `client`: whose request it is and which of
    their programs sent it, None = not authenticated. `trace`: a W3C traceparent, None = none.
    `parameters`: the protocol's own, passed through untouched.
    """

    model: str
    inputs: Mapping[str, Array]
    version: str | None = None
    outputs: Sequence[str] = ()
    deadline: float | None = None
    min_confidence: float | None = None
    priority: int = 0
    tenant: str | None = None
    client: str | None = None
    trace: str | None = None
    id: str | None = None
    parameters: Mapping[str, object] = {}


class InferResponse(msgspec.Struct, frozen=True, kw_only=True):
    """One answer, with where it came from and why.

    `package`, `version`: what computed it; `tier`: device, edge or cloud. `confidence`: 0..1, None when the package does
    not say how to read it. `reason`: a code of `models.policy.Reason`. `degraded`: a better tier was wanted and could not
    be used in time. `timings`: phase -> seconds. `batch`: rows that the engine ran at once, of
    this request and others. `trace`: a W3C traceparent when the request came with one, else None.
    """

    outputs: Mapping[str, Array]
    model: str
    package: str
    version: str
    tier: str
    confidence: float | None = None
    reason: str = "local"
    degraded: bool = False
    timings: Mapping[str, float] = {}
    batch: int = 1
    trace: str | None = None
    id: str | None = None


class Predictor(Protocol):
    """Anything that answers.

    `infer` raises only errors of `models.errors`. Its first step, up to the first suspension, may run outside any task
    (see `models.serving.drive`): before suspending it must not ask for the current task.
    """

    async def infer(self, request: InferRequest) -> InferResponse: ...
