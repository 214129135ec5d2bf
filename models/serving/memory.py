"""What this process holds of the machine's memory, and giving back what it no longer needs."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_STATM = Path("/proc/self/statm")


def resident_bytes() -> int:
    """Resident set size of this process; 0 where the system does not say."""
    try:
        return int(_STATM.read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def give_back() -> None:
    """Return freed memory to the system, where the C library can (glibc's malloc_trim). Takes milliseconds: in a thread.

    Without it a closed session's memory stays with the allocator, in pieces that the next one may not fit.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return  # another C library: its allocator decides
