"""`tierline device`: an agent as a process of its own, one JSON request per line in, one JSON answer per line out.

For trying an agent from a shell, and for applications that are not written in Python. A request is
`{"model": ..., "inputs": {name: nested lists}, "deadline_ms": ..., "min_confidence": ..., "id": ...}`; its answer repeats
`id` and carries the fields of `device_agent.Answer`, or `{"error": ...}`. `lag_ms` is the event loop's worst delay while the
request was under way: what a missed deadline has to be held against on a busy machine.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import stat
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from device_agent.agent import Agent
from device_agent.config import load_agent_config
from models.errors import TierlineError
from models.serving.process import configure_logging
from sync.errors import SyncError

log = logging.getLogger("tierline.device")

MAX_LINE_BYTES = 16 * 1024 * 1024
"""Longest request line (16 MiB)."""
LAG_TICK_SECONDS = 0.002


class Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One request."""

    model: str
    inputs: dict[str, Any]
    deadline_ms: float | None = None
    min_confidence: float | None = None
    outputs: tuple[str, ...] = ()
    id: str | int | None = None


def device(argv: Sequence[str]) -> int:
    if argv and argv[0] in ("join", "leave"):
        from sync.enrol_cli import identity

        return identity("device", argv)
    parser = argparse.ArgumentParser(
        prog="tierline device",
        description="Run a device agent on standard input and output.",
        epilog="tierline device join URL --token TOKEN: enrol this machine; tierline device leave CONFIG: out of service.",
    )
    parser.add_argument("config", type=Path, help="TOML file: edge, threads, [node]")
    options = parser.parse_args(argv)
    try:
        config = load_agent_config(options.config)
        configure_logging(config.node.id)
        asyncio.run(_serve(Agent(config)))
    except (SyncError, OSError) as error:
        print(f"tierline device: {error}", file=sys.stderr)
        return 2
    return 0


async def _serve(agent: Agent) -> None:
    async with agent, _lag() as lag, _lines() as lines:
        async for line in lines:
            if len(line) > MAX_LINE_BYTES:
                _write({"error": f"a line is longer than {MAX_LINE_BYTES} bytes"})
                return
            lag.worst = 0.0
            _write(await _answer(agent, line) | {"lag_ms": round(lag.worst * 1e3, 3)})


@asynccontextmanager
async def _lines() -> AsyncIterator[AsyncIterator[bytes]]:
    """Standard input line by line: from a pipe or a terminal without a thread, from a file (which never blocks) with one."""
    mode = os.fstat(sys.stdin.fileno()).st_mode
    if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or sys.stdin.isatty()):
        yield _file_lines()
        return
    reader = asyncio.StreamReader(limit=MAX_LINE_BYTES)
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    try:
        yield _pipe_lines(reader)
    finally:
        transport.close()


async def _file_lines() -> AsyncIterator[bytes]:
    while line := await asyncio.to_thread(sys.stdin.buffer.readline, MAX_LINE_BYTES + 1):
        yield line


async def _pipe_lines(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while True:
        try:
            line = await reader.readline()
        except ValueError:
            line = b" " * (MAX_LINE_BYTES + 1)  # the reader has dropped it: only its being too long is known
        if not line:
            return
        yield line


async def _answer(agent: Agent, line: bytes) -> dict[str, object]:
    try:
        request = msgspec.json.decode(line, type=Line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        return {"error": f"request: {error}"}
    try:
        answer = await agent.infer(
            request.model,
            request.inputs,
            deadline_ms=request.deadline_ms,
            min_confidence=request.min_confidence,
            outputs=request.outputs,
        )
    except TierlineError as error:
        return {"id": request.id, "error": str(error), "kind": type(error).__name__}
    except Exception:
        log.exception("a request failed unexpectedly")
        return {"id": request.id, "error": "internal error"}
    fields = {name: getattr(answer, name) for name in answer.__struct_fields__ if name != "outputs"}
    return {"id": request.id, **fields, "outputs": {name: array.tolist() for name, array in answer.outputs.items()}}


def _write(message: Mapping[str, object]) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(message) + b"\n")
    sys.stdout.buffer.flush()


class _Lag:
    worst = 0.0


@asynccontextmanager
async def _lag() -> AsyncIterator[_Lag]:
    """Watch how late the event loop wakes up."""
    lag = _Lag()
    loop = asyncio.get_running_loop()

    async def watch() -> None:
        while True:
            due = loop.time() + LAG_TICK_SECONDS
            await asyncio.sleep(LAG_TICK_SECONDS)
            lag.worst = max(lag.worst, loop.time() - due)

    task = asyncio.create_task(watch())
    try:
        yield lag
    finally:
        task.cancel()
        await asyncio.wait((task,))
