"""Every metric there is, as data: the registry takes names from here alone, the documentation is made from it.

Names follow OpenTelemetry's semantic conventions where one exists (`process.*`, `cpython.gc.*`); for classic inference none
does, so `inference.*`, `router.*`, `runtime.*`, `websocket.*`, `telemetry.*` and those of delivery are ours. Units are UCUM:
`s`, `By`, and `{thing}` for counts.
"""

from __future__ import annotations

from models.serving.meter.delivery_entries import DELIVERY
from models.serving.meter.entry import Entry

__all__ = ["CATALOGUE", "ENTRIES", "Entry"]

_ANSWER = ("model", "version", "tier")

ENTRIES = (
    # --- requests --------------------------------------------------------------------------------------------------------
    Entry(
        "inference.request.count",
        "counter",
        "{request}",
        _ANSWER,
        "Requests answered, by the tier that computed the answer.",
        "A drop to zero while clients still ask: look at inference.request.errors and at the readiness route.",
    ),
    Entry(
        "inference.request.rows",
        "counter",
        "{row}",
        _ANSWER,
        "Rows answered: the size of the first input's free first dimension, 1 for a model without one.",
        "Far above the request count: callers batch by themselves; check that their deadlines allow for it.",
    ),
    Entry(
        "inference.request.errors",
        "counter",
        "{request}",
        ("model", "error"),
        "Requests that ended in an error, by its class; cancelled = the caller went away, unexpected = a mistake of ours.",
        "engine_failure or unexpected: read the log. overloaded, deadline_exceeded: add capacity or lower the load. "
        "The others are the callers' to mend.",
    ),
    Entry(
        "inference.request.degraded",
        "counter",
        "{request}",
        ("model",),
        "Answers given here because a better tier could not be used in time.",
        "Look at router.decision.count for the reason, then at the tier above and the link to it.",
    ),
    Entry(
        "inference.request.e2e.duration",
        "histogram",
        "s",
        _ANSWER,
        "Time from a decoded request to its answer, over the requests answered.",
        "Compare with the queue and compute durations: the larger of the two says where to look.",
    ),
    Entry(
        "inference.request.queue.duration",
        "histogram",
        "s",
        _ANSWER,
        "Time that a request waited before the engine ran it, over the requests computed here.",
        "More load than the engine threads can carry: more threads, a smaller variant, or more nodes.",
    ),
    Entry(
        "inference.request.compute.duration",
        "histogram",
        "s",
        _ANSWER,
        "Time of the engine's run that a request was part of.",
        "A jump after a new version: roll it back. A slow rise: a busy or throttled processor.",
    ),
    Entry(
        "inference.request.active",
        "gauge",
        "{request}",
        (),
        "Requests under way.",
        "Stays near the limit: callers wait on each other; look at the queue duration.",
    ),
    Entry(
        "inference.request.rejected",
        "counter",
        "{request}",
        ("reason",),
        "Requests refused by a limit before any work: rate or concurrency.",
        "One client exceeds its share, or the limits are too low for the load that was agreed.",
    ),
    Entry(
        "router.decision.count",
        "counter",
        "{request}",
        ("model", "reason"),
        "Answers whose reason is another than local (escalated, up_late ...).",
        "up_unreachable, up_late and no_time: the link or the tier above. escalated rising: the model here is less sure.",
    ),
    Entry(
        "router.breaker.state",
        "gauge",
        "1",
        (),
        "1 while calls to the tier above are suspended, else 0.",
        "The tier above does not answer: its readiness, the network, the name and the certificate.",
    ),
    # --- queue, batches, models, cache, connections ----------------------------------------------------------------------
    Entry(
        "inference.queue.depth",
        "gauge",
        "{request}",
        (),
        "Runs that wait for an engine thread.",
        "Grows without falling: the node is offered more than it can do.",
    ),
    Entry(
        "inference.queue.work",
        "gauge",
        "s",
        (),
        "Engine time that those runs are expected to take.",
        "Divided by the engine threads it is the wait of the next request: compare with the deadlines.",
    ),
    Entry(
        "inference.batch.size",
        "histogram",
        "{row}",
        _ANSWER,
        "Rows that the engine ran together, one value for each request that was part of the run.",
        "Always 1 under load, for a model that batches: requests differ in shape or in the outputs they ask for.",
    ),
    Entry(
        "inference.model.served",
        "gauge",
        "{model}",
        (),
        "Models that can be asked for.",
        "Fewer than deployed: the repository index says why each of the others is not ready.",
    ),
    Entry(
        "inference.model.resident",
        "gauge",
        "{version}",
        (),
        "Model versions in memory, of those that may be put out of it.",
        "Far fewer than are used: see inference.model.evictions.",
    ),
    Entry(
        "inference.model.memory.usage",
        "gauge",
        "By",
        (),
        "Memory that those versions are reckoned to take.",
        "At its budget with evictions going on: raise the budget or serve fewer models here.",
    ),
    Entry(
        "inference.model.loads",
        "counter",
        "{load}",
        (),
        "Loads of a model version because a request asked for it.",
        "Rising steadily: models push each other out of memory.",
    ),
    Entry(
        "inference.model.evictions",
        "counter",
        "{version}",
        (),
        "Model versions put out of memory because others needed the room.",
        "Rising steadily: raise the memory budget or serve fewer models here.",
    ),
    Entry(
        "inference.cache.hits",
        "counter",
        "{request}",
        (),
        "Answers taken from the result cache.",
        "Near zero while the cache is on: inputs do not repeat, turn it off for this model.",
    ),
    Entry(
        "inference.cache.misses",
        "counter",
        "{request}",
        (),
        "Requests of cached models that had to be computed.",
        "As for inference.cache.hits.",
    ),
    Entry(
        "inference.cache.evictions",
        "counter",
        "{answer}",
        (),
        "Answers put out of the cache for lack of room.",
        "As many as there are misses: the cache is too small for what repeats.",
    ),
    Entry(
        "inference.cache.size",
        "gauge",
        "By",
        (),
        "Memory that cached answers take.",
        "At its bound with few hits: see inference.cache.evictions.",
    ),
    Entry(
        "websocket.connections",
        "gauge",
        "{connection}",
        (),
        "WebSocket connections open.",
        "Falls to zero at once: a proxy between cut them; its idle timeout must exceed 20 s.",
    ),
    # --- events up -------------------------------------------------------------------------------------------------------
    Entry(
        "outbox.event.pending",
        "gauge",
        "{event}",
        (),
        "Events on the disk that the hub has not acknowledged.",
        "Grows without falling: the broker or the hub is out of reach; what follows is in docs/events.md.",
    ),
    Entry(
        "outbox.event.size",
        "gauge",
        "By",
        (),
        "What those events count for in the outbox's quota.",
        "At the quota: the oldest of the lowest priority are dropped.",
    ),
    Entry(
        "outbox.event.outcomes",
        "counter",
        "{event}",
        ("outcome",),
        "Events by what became of them: enqueued, delivered, expired, or dropped and why (dropped.quota, dropped.disk, "
        "dropped.overrun, dropped.refused). enqueued = the sum of the others and outbox.event.pending.",
        "dropped.disk: the disk is full or read-only. dropped.quota: away for too long. dropped.refused: the hub's ledger of "
        "the node says why.",
    ),
    Entry(
        "outbox.event.resends",
        "counter",
        "{event}",
        (),
        "Events sent again because no acknowledgement came in time.",
        "Rising while the hub is up: it is too slow, or limits this node.",
    ),
    *DELIVERY,
    # --- the process -----------------------------------------------------------------------------------------------------
    Entry(
        "process.cpu.time",
        "counter",
        "s",
        (),
        "Processor time of the process, all threads.",
        "Its rate near the number of cores: the node is full.",
    ),
    Entry(
        "process.memory.usage",
        "gauge",
        "By",
        (),
        "Resident memory.",
        "Grows for hours at constant load: a leak; at a step: a model, see inference.model.loads.",
    ),
    Entry(
        "process.thread.count",
        "gauge",
        "{thread}",
        (),
        "Threads of the process.",
        "Grows without falling: runs that never end.",
    ),
    Entry(
        "process.unix.file_descriptor.count",
        "gauge",
        "{file_descriptor}",
        (),
        "Open file descriptors.",
        "Near the limit of the service (ulimit -n): connections are about to be refused.",
    ),
    Entry("process.uptime", "gauge", "s", (), "Time since the process began.", "Small again and again: it restarts."),
    Entry(
        "cpython.gc.collections",
        "counter",
        "{collection}",
        ("generation",),
        "Runs of Python's garbage collector.",
        "Generation 2 several times a second: each stops serving for milliseconds.",
    ),
    Entry(
        "runtime.event_loop.lag",
        "histogram",
        "s",
        (),
        "How late a timer of one second fired: what any request may have had to wait. Resolution about 1 ms.",
        "Above 5 ms: something holds the event loop, or the machine is too busy.",
    ),
    # --- telemetry itself ------------------------------------------------------------------------------------------------
    Entry(
        "telemetry.series.dropped",
        "counter",
        "{series}",
        (),
        "Label values counted as other because there were too many.",
        "More models or versions than the caps allow for: per-model figures are incomplete.",
    ),
    Entry(
        "telemetry.spans.exported",
        "counter",
        "{span}",
        (),
        "Spans that the collector accepted.",
        "Zero while requests are sampled: see telemetry.spans.dropped.",
    ),
    Entry(
        "telemetry.spans.dropped",
        "counter",
        "{span}",
        (),
        "Spans lost because the collector did not take them in time.",
        "The collector is down or too slow; serving is not affected.",
    ),
)

CATALOGUE = {entry.name: entry for entry in ENTRIES}
