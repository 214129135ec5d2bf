"""`tierline hold`, `tierline release`, `tierline updates`: what a shell on an edge node may say to it."""

from __future__ import annotations

import argparse
import json
import sys
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError

TIMEOUT_SECONDS = 75.0
"""An activation under way is waited for, at most a minute."""
MAX_ANSWER = 1 << 20


def hold(argv: Sequence[str]) -> int:
    parser = _parser("hold", "Ask an edge node of this machine not to activate updates now; prints the hold's id.")
    parser.add_argument("reason", help="shown to the hub, e.g. 'robot in motion'")
    parser.add_argument("--seconds", type=float, help="how long at most (default: as long as the settings allow)")
    options = parser.parse_args(argv)
    body = {"reason": options.reason, "seconds": options.seconds}
    return _speak("hold", options.edge, "/control/hold", body, lambda answer: str(answer["id"]))


def release(argv: Sequence[str]) -> int:
    parser = _parser("release", "End a hold.")
    parser.add_argument("id", help="what tierline hold printed")
    options = parser.parse_args(argv)

    def said(answer: dict[str, Any]) -> str:
        return "released" if answer["released"] else "there was no such hold any more"

    return _speak("release", options.edge, "/control/release", {"id": options.id}, said)


def updates(argv: Sequence[str]) -> int:
    options = _parser("updates", "Show how the updates of an edge node of this machine stand.").parse_args(argv)

    def said(answer: dict[str, Any]) -> str:
        lines = []
        for kind, report in sorted(answer["documents"].items()):
            why = report.get("error") or report.get("detail") or ""
            numbers = f"revision {report['revision']}, {report['applied']} in force"
            lines.append(f"{kind:<9} {report['state']:<12} {numbers}  {why}".rstrip())
        lines += [f"hold {each['id']}  {each['seconds']:.0f} s left  {each['reason']}" for each in answer["holds"]]
        return "\n".join(lines)

    return _speak("updates", options.edge, "/control/updates", None, said)


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"tierline {command}", description=description)
    parser.add_argument("--edge", default="http://127.0.0.1:8000", metavar="URL", help="the node's data plane")
    return parser


def _speak(command: str, edge: str, path: str, body: Any, said: Any) -> int:
    if not edge.startswith(("http://", "https://")):
        print(f"tierline {command}: --edge {edge!r} is not http(s)://host[:port]", file=sys.stderr)
        return 2
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(  # noqa: S310 - the scheme was looked at
        edge.rstrip("/") + path, data=data, headers={"Content-Type": "application/json"}
    )
    # Of this machine: a proxy that the environment names for the world outside is not asked.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=TIMEOUT_SECONDS) as answer:
            print(said(json.loads(answer.read(MAX_ANSWER))))
    except HTTPError as error:
        print(f"tierline {command}: {_reason(error)}", file=sys.stderr)
        return 1
    except (URLError, HTTPException, OSError, ValueError, KeyError, TypeError) as error:
        print(f"tierline {command}: {edge}: {error}", file=sys.stderr)
        return 1
    return 0


def _reason(error: HTTPError) -> str:
    try:
        return str(json.loads(error.read(MAX_ANSWER))["error"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"{error.code} {error.reason}"
