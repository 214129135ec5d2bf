"""What this process holds of the machine's memory, and giving back what it no longer needs."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

ARENAS = 2
_M_ARENA_MAX = -8
"""As in glibc's malloc.h."""
_STATM = Path("/proc/self/statm")


def resident_bytes() -> int:
    """Resident set size of this process; 0 where the system does not say."""
    try:
        return int(_STATM.read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def keep_few_arenas() -> None:
    """Let all threads take memory from `ARENAS` places, where the C library can (glibc). For processes of our own, before
    they start threads.

    With a place for each thread, what loads and frees versions in one thread after another leaves pieces in all of them:
    after some hundred swaps the process held 2 MB more or less than before, by chance.
    """
    try:
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, ARENAS)
    except (OSError, AttributeError):
        return  # another C library


def give_back() -> None:
    """Return freed memory to the system, where the C library can (glibc's malloc_trim). Takes milliseconds: in a thread.

    Without it a closed session's memory stays with the allocator, in pieces that the next one may not fit.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return  # another C library: its allocator decides
