"""Faults on purpose, without root: a proxy that spoils what passes through it, and what is done to processes.

Every fault counts what it really touched. One that touched nothing proves nothing: `suffering` raises `NeverFired`.
"""

from sync.chaos.faults import BlackHole, Corrupt, Drip, Fault, HalfOpen, Lag, LinkCut, NeverFired, Reset
from sync.chaos.http_faults import Answer503, SlowBody
from sync.chaos.proxy import Proxy
from sync.chaos.threaded import ThreadedProxy

__all__ = [
    "Answer503",
    "BlackHole",
    "Corrupt",
    "Drip",
    "Fault",
    "HalfOpen",
    "Lag",
    "LinkCut",
    "NeverFired",
    "Proxy",
    "Reset",
    "SlowBody",
    "ThreadedProxy",
]
