"""What a child process that runs a stranger's file may see and use."""

from __future__ import annotations

import os
import resource
import tempfile
from pathlib import Path

FILE_SHARE = 5
"""Times its size that a file may need once loaded: weights, their optimised copy and the buffers between."""
FRAMEWORK_BYTES = {"torch": 2 << 30}
"""Address space of frameworks that map more than most: PyTorch 0.7 GB, and 128 MB for each thread's heap."""
KEPT = ("PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "HOME", "TMPDIR", "SYSTEMROOT", "VIRTUAL_ENV")
"""All that the child gets of the environment: it runs a stranger's file and needs no secrets."""


def environment() -> dict[str, str]:
    """The child's environment: it must import this very package, whatever its working folder holds."""
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    path = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**kept, "PYTHONPATH": os.pathsep.join(path), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def memory_for(engine: str, path: Path, memory_bytes: int) -> int:
    """Address space for one file: `memory_bytes`, what the framework maps, and five times the file."""
    return memory_bytes + FRAMEWORK_BYTES.get(engine, 0) + FILE_SHARE * path.stat().st_size


def bound(memory_bytes: int) -> None:
    """In the child, for good: at most this much address space, no core dump, not a byte written to any file."""
    _limit(resource.RLIMIT_AS, memory_bytes, for_good=True)
    _limit(resource.RLIMIT_CORE, 0, for_good=True)
    _limit(resource.RLIMIT_FSIZE, 0, for_good=True)
    # PyTorch asks for the folder of temporary files at import; Python would look for one by writing to it.
    tempfile.tempdir = os.environ.get("TMPDIR", "/tmp")  # noqa: S108 - nothing can be written there


def bound_next(memory_bytes: int, cpu_seconds: int) -> None:
    """In the child, until called again: address space in all, and processor time from here on."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _limit(resource.RLIMIT_AS, memory_bytes)
    _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + cpu_seconds)


def _limit(which: int, limit: int, *, for_good: bool = False) -> None:
    ceiling = resource.getrlimit(which)[1]
    top = limit if ceiling == resource.RLIM_INFINITY else min(limit, ceiling)
    resource.setrlimit(which, (top, top if for_good else ceiling))
