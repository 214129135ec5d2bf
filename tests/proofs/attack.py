"""One server under malformed requests over every transport: what is sent, and what may come back."""

from __future__ import annotations

import json
import random
import socket
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

import grpc
from proofs import malformed
from proofs.malformed_grpc import call, message
from proofs.malformed_websocket import good_websocket, websocket
from proofs.server import Server
from proofs.sockets import (
    HANG_SECONDS,
    Address,
    Broken,
    Hang,
    answers,
    check_error,
    connect,
    exchange,
    message_of,
    send_all,
    session,
)

KEPT = 8
"""Requests that are shown when the server has died: the last ones."""
MAX_SHOWN = 4000
DEATH_SECONDS = 0.5
SERVICE = "inference.GRPCInferenceService"
REFUSED = {"INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION"}
LATE = {"DEADLINE_EXCEEDED"}
"""Right for a request whose own deadline is over, which some of them say; a hang is told by its time."""
TRANSPORTS = {"tcp": 40, "unix": 15, "grpc": 22, "stream": 5, "websocket": 15, "http2": 3}
"""Shares of the requests."""


class Attack:
    """One server under fire. `problems`: what must not be, with the bytes that brought it about."""

    def __init__(self, server: Server, seed: int, without: Sequence[str] = ()) -> None:
        self.server = server
        self.shares = {name: share for name, share in TRANSPORTS.items() if name not in without}
        self.rng = random.Random(seed)
        self.sent: Counter[str] = Counter()
        self.outcomes: dict[str, Counter[str]] = {name: Counter() for name in TRANSPORTS}
        self.problems: list[dict[str, str]] = []
        self.latest: deque[dict[str, str]] = deque(maxlen=KEPT)
        self.slowest = 0.0
        self.good = 0
        self.channel = grpc.insecure_channel(server.addresses["grpc"])
        self.conversation = self._recorded()

    def close(self) -> None:
        self.channel.close()

    def one(self) -> None:
        """One malformed request."""
        transport = self.rng.choices(list(self.shares), list(self.shares.values()))[0]
        self.sent[transport] += 1
        start = time.monotonic()
        data = b""
        try:
            if transport in ("tcp", "unix"):
                data = malformed.http(self.rng)
                self._http(transport, data)
            elif transport == "websocket":
                data, opening = websocket(self.rng)
                self._websocket(data, opening)
            elif transport == "http2":
                data = malformed.damage(self.conversation, self.rng)
                self._http2(data)
            else:
                name, data, metadata = call(self.rng)
                if transport == "grpc":
                    self._grpc(name, data, metadata)
                else:
                    self._stream([message(self.rng) for _ in range(self.rng.randrange(1, 6))])
        except (Hang, Broken) as error:
            self.problem(transport, str(error), data)
        except OSError as error:
            self.problem(transport, f"no connection: {error}", data)
        self.slowest = max(self.slowest, time.monotonic() - start)
        self.latest.append(_told(transport, "one of the last requests", data))

    def problem(self, transport: str, text: str, data: bytes) -> None:
        self.problems.append(_told(transport, text, data))

    # --- transports ----------------------------------------------------------------------------------------------------

    def address(self, transport: str) -> Address:
        return self.server.addresses["unix"] if transport == "unix" else self.server.http

    def _http(self, transport: str, data: bytes) -> None:
        came = exchange(self.address(transport), data)
        head_only = data[:200].lstrip()[:4] == b"HEAD"
        if came[:12] == b"HTTP/1.1 101":
            self.outcomes[transport]["upgraded"] += 1
            return
        found = answers(came, head_only=head_only)
        for answer in found:
            self.outcomes[transport][str(answer.status)] += 1
            if answer.status >= 400 and not head_only:
                check_error(answer.status, answer.body)
            if answer.status == 500:
                raise Broken("500")
        if not found:
            self.outcomes[transport]["closed"] += 1

    def _websocket(self, data: bytes, opening: bytes | None) -> None:
        transport = self.rng.choice(("tcp", "unix"))
        answer, came = session(self.address(transport), data, opening)
        seen = self.outcomes["websocket"]
        if answer is None:
            seen["closed"] += 1
        elif answer.status != 101:
            seen[str(answer.status)] += 1
            check_error(answer.status, answer.body)
        for opcode, payload in came:
            if opcode == 8:
                code = struct.unpack_from("!H", payload)[0] if len(payload) >= 2 else 0
                seen[f"close {code}"] += 1
                if code == 1011:
                    raise Broken(f"the session ended with an internal error: {payload!r}")
            elif opcode in (1, 2):
                told = message_of(opcode, payload)
                seen[f"{told['op']} {told.get('status', '')}".strip()] += 1
                if told.get("status") == 500:
                    raise Broken(f"{told}")

    def _grpc(self, name: str, data: bytes, metadata: list[tuple[str, str | bytes]]) -> None:
        method = self.channel.unary_unary(f"/{SERVICE}/{name}")
        try:
            method(data, timeout=2 * HANG_SECONDS, metadata=metadata, wait_for_ready=True)
            self.outcomes["grpc"]["OK"] += 1
        except grpc.RpcError as error:
            self._refused("grpc", error)

    def _stream(self, messages: list[bytes]) -> None:
        from models.serving.grpc import inference_pb2 as pb

        method = self.channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")
        try:
            came = list(method(iter(messages), timeout=2 * HANG_SECONDS, wait_for_ready=True))
        except grpc.RpcError as error:
            self._refused("stream", error)
            return
        if len(came) != len(messages):
            raise Broken(f"{len(came)} answers to {len(messages)} requests")
        for each in came:
            text = pb.ModelStreamInferResponse.FromString(each).error_message
            self.outcomes["stream"]["error" if text else "OK"] += 1
            if text == "internal error":
                raise Broken(text)

    def _refused(self, transport: str, error: Any) -> None:
        code = error.code().name
        self.outcomes[transport][code] += 1
        if code not in REFUSED | LATE:
            raise Broken(f"{code}: {error.details()}")

    def _http2(self, data: bytes) -> None:
        """Wire bytes of a real conversation, damaged. What comes back is HTTP/2 or nothing; the server must live."""
        host, _, port = self.server.addresses["grpc"].rpartition(":")
        with connect((host, int(port))) as link:
            send_all(link, data)
            link.settimeout(0.02)
            try:
                while link.recv(1 << 16):
                    pass
            except OSError:
                pass
        self.outcomes["http2"]["sent"] += 1

    def _recorded(self) -> bytes:
        """What a real client of gRPC sends for one request."""
        host, _, port = self.server.addresses["grpc"].rpartition(":")
        recorded = bytearray()
        with socket.create_server(("127.0.0.1", 0)) as between:

            def forward() -> None:
                client, _ = between.accept()
                with client, connect((host, int(port))) as upstream:
                    back = threading.Thread(target=_pump, args=(upstream, client, None))
                    back.start()
                    _pump(client, upstream, recorded)
                    back.join(HANG_SECONDS)

            thread = threading.Thread(target=forward)
            thread.start()
            with grpc.insecure_channel(f"127.0.0.1:{between.getsockname()[1]}") as channel:
                channel.unary_unary(f"/{SERVICE}/ServerLive")(b"", timeout=HANG_SECONDS)
            thread.join(HANG_SECONDS)
        return bytes(recorded)

    # --- good ones in between --------------------------------------------------------------------------------------------

    def check_good(self) -> None:
        """A good request on every transport is answered correctly."""
        self.good += 1
        try:
            self._ask_all()
        except (OSError, Hang, Broken, ValueError, grpc.RpcError) as error:
            self.problem("all", f"a good request failed: {error!r}", b"")
            time.sleep(DEATH_SECONDS)  # a process that is dying needs a moment until it is seen to be dead

    def _ask_all(self) -> None:
        from models.serving.grpc import inference_pb2 as pb

        wanted = {"sum": [2, 3, 4, 5], "difference": [0, 1, 2, 3]}
        for transport in ("tcp", "unix"):
            found = answers(exchange(self.address(transport), malformed.good_http()))
            if [answer.status for answer in found] != [200] or _outputs(json.loads(found[0].body)) != wanted:
                self.problem(transport, f"a good request got {found}", b"")
        _, came = session(self.server.http, good_websocket())
        told = [message_of(opcode, payload) for opcode, payload in came if opcode == 1]
        if len(told) != 1 or _outputs(told[0].get("response", {})) != wanted:
            self.problem("websocket", f"a good request got {came}", b"")
        request = pb.ModelInferRequest(model_name="sum")
        for name, values in (("a", [1, 2, 3, 4]), ("b", [1, 1, 1, 1])):
            tensor = request.inputs.add(name=name, datatype="FP32", shape=[1, 4])
            tensor.contents.fp32_contents.extend(values)
        method = self.channel.unary_unary(f"/{SERVICE}/ModelInfer")
        answer = pb.ModelInferResponse.FromString(
            method(request.SerializeToString(), timeout=HANG_SECONDS, wait_for_ready=True)
        )
        raws = [list(struct.unpack("<4f", raw)) for raw in answer.raw_output_contents]
        if raws != list(wanted.values()):
            self.problem("grpc", f"a good request got {raws}", b"")

    def bomb(self) -> None:
        self.sent["tcp"] += 1
        start = time.monotonic()
        found = answers(exchange(self.server.http, malformed.bombs(self.rng)))
        self.outcomes["tcp"].update(str(answer.status) for answer in found)
        if [answer.status for answer in found] != [413]:
            self.problem("tcp", f"a compression bomb got {found}", b"")
        self.slowest = max(self.slowest, time.monotonic() - start)


def _told(transport: str, text: str, data: bytes) -> dict[str, str]:
    return {"transport": transport, "problem": text, "request": data[:MAX_SHOWN].hex()}


def _pump(source: socket.socket, target: socket.socket, record: bytearray | None) -> None:
    try:
        while data := source.recv(1 << 16):
            if record is not None:
                record += data
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass


def _outputs(response: Any) -> Any:
    return {output["name"]: output["data"] for output in response.get("outputs", [])}
