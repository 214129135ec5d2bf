"""The child that makes one delta: `python -m cloud_hub.delta_child BASE TARGET OUT BASE_DIGEST TARGET_DIGEST`.

At the lowest priority and within limits of its own: a publish must not disturb what the hub does for its nodes.
"""

from __future__ import annotations

import mmap
import os
import resource
import sys
from pathlib import Path

NICE = 15
CPU_SECONDS = 120
MEMORY_BYTES = 4 << 30
"""Of address space: both files are mapped, and the hashes of 4 MiB at a time."""


def make(base: Path, target: Path, out: Path, base_digest: str, digest: str) -> None:
    from models.delta import literals, segments
    from sync.delta import FORMAT, Recipe, write

    with base.open("rb") as old, target.open("rb") as new, out.open("wb") as file:
        before = memoryview(mmap.mmap(old.fileno(), 0, access=mmap.ACCESS_READ))
        after = memoryview(mmap.mmap(new.fileno(), 0, access=mmap.ACCESS_READ))
        parts = segments(before, after)
        write(file, Recipe(FORMAT, base_digest, len(before), digest, len(after), parts), literals(after, parts))


def main() -> None:
    os.nice(NICE)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    base, target, out, base_digest, digest = sys.argv[1:]
    make(Path(base), Path(target), Path(out), base_digest, digest)


if __name__ == "__main__":
    main()
