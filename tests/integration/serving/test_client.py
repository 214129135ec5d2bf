"""Both clients against real servers, over every transport: the same calls, the same answers, the same errors."""

from __future__ import annotations

import asyncio
import datetime
import gc
import inspect
import ipaddress
import os
import re
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from models.client import AsyncClient, Client, Retries
from models.errors import (
    Conflict,
    DeadlineExceeded,
    EngineFailure,
    InvalidRequest,
    NotFound,
    Overloaded,
    TierlineError,
    Unauthenticated,
    Unreachable,
)
from models.serving.caller import Caller, Peer
from models.serving.http.server import serve_http
from models.serving.index import ModelDescription, ModelState, ModelStatistics
from models.serving.plane import DataPlane
from models.serving.predictor import InferRequest, InferResponse
from models.serving.rest import RestHandler
from models.tensor import TensorSpec

ROOT = Path(__file__).parents[3]
TOKEN = "s3cret"
INPUTS = {"double": ("x",), "sum": ("a", "b")}


class Models:
    """What the server knows: `double` (y = 2x, FP32 [-1, 4]) and `sum`. Control and statistics are recorded."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def names(self) -> Sequence[str]:
        return sorted(INPUTS)

    def describe(self, model: str, version: str | None) -> ModelDescription:
        if model not in INPUTS or version not in (None, "1"):
            raise NotFound(f"model '{model}' version '{version}' is not served here")
        inputs = tuple(TensorSpec(name, "FP32", (-1, 4)) for name in INPUTS[model])
        return ModelDescription(model, "package-1", ("1",), "onnx_fp32", inputs, (TensorSpec("y", "FP32", (-1, 4)),))

    def is_ready(self, model: str, version: str | None) -> bool:
        self.describe(model, version)
        return True

    def states(self) -> Sequence[ModelState]:
        return [ModelState("double", "1", "READY"), ModelState("sum", "1", "UNAVAILABLE", "unloaded")]

    async def load(self, model: str) -> None:
        if model == "broken":
            raise Conflict("decided by the hub")
        self.done.append(f"load {model}")
        if model == "busy":
            raise Overloaded("busy", 0.01)

    async def unload(self, model: str) -> None:
        self.done.append(f"unload {model}")

    def config(self, model: str, version: str | None) -> Mapping[str, object]:
        self.describe(model, version)
        return {"name": model, "platform": "onnx_fp32", "max_batch_size": 8}

    def watch(self, changed: Callable[[str], None]) -> Callable[[], None]:
        return lambda: None

    def statistics(self, model: str | None, version: str | None) -> Sequence[ModelStatistics]:
        self.describe(model or "double", version)
        return [ModelStatistics("double", "1", inference_count=7)] if model in (None, "double") else []


class Predictor:
    """Doubles its first input. `fail`: raised instead, once for each; `hang`: never answers; `seen`: what was asked."""

    def __init__(self, models: Models) -> None:
        self.models = models
        self.seen: list[InferRequest] = []
        self.fail: list[TierlineError] = []
        self.hang = False
        self.cancelled = threading.Event()

    async def infer(self, request: InferRequest) -> InferResponse:
        self.seen.append(request)
        self.models.describe(request.model, request.version)
        if self.fail:
            raise self.fail.pop(0)
        if self.hang:
            try:
                await asyncio.Event().wait()
            finally:
                self.cancelled.set()
        first = next(iter(request.inputs.values()))
        return InferResponse(
            outputs={"y": first if first.dtype == object else first * 2},
            model=request.model,
            package="package-1",
            version="1",
            tier="edge",
            confidence=request.min_confidence,
            reason="local",
            id=request.id,
        )


class Access:
    """Lets in who shows the token."""

    revision = 0

    def identify(self, peer: Peer, authorization: bytes | None) -> Caller:
        if authorization != f"Bearer {TOKEN}".encode():
            raise Unauthenticated("no valid token")
        return Caller(admin=True)

    def may_use(self, caller: Caller, model: str) -> bool:
        return True


class Server:
    """A real server in a thread with a loop of its own. `url`: where each transport finds it."""

    def __init__(self, folder: Path) -> None:
        self.models = Models()
        self.predictor = Predictor(self.models)
        self.ready = True
        self.plane = DataPlane(
            self.predictor,
            self.models,
            ready=lambda: self.ready,
            control=self.models,
            statistics=self.models,
            access=Access(),
        )
        self.url: dict[str, str] = {}
        self.files = certificates(folder)
        self.socket = folder / "serving.sock"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._stack = self.call(self._listen())

    def stop(self) -> None:
        self.call(self._stack.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def call(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(20)

    async def _listen(self) -> AsyncExitStack:
        stack = AsyncExitStack()
        handler = RestHandler(self.plane)
        plain = await stack.enter_async_context(serve_http(handler, unix=self.socket, drain_seconds=0.1))
        mutual = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        mutual.load_cert_chain(self.files["server"])
        mutual.load_verify_locations(self.files["ca"])
        mutual.verify_mode = ssl.CERT_REQUIRED
        encrypted = await stack.enter_async_context(serve_http(handler, tls=mutual, drain_seconds=0.1))
        self.url = {"http": plain.url, "unix": f"unix://{self.socket}", "https": encrypted.url}
        with suppress(ImportError):
            from models.serving.access.tls import grpc_credentials
            from models.serving.grpc.server import serve_grpc

            server = self.files["server"]
            credentials = partial(grpc_credentials, server, server, self.files["ca"])
            open_port = await stack.enter_async_context(serve_grpc(self.plane, drain_seconds=0.1))
            tls_port = await stack.enter_async_context(
                serve_grpc(self.plane, credentials=credentials, drain_seconds=0.1)
            )
            self.url |= {"grpc": open_port.url, "grpcs": tls_port.url}
        return stack


def certificates(folder: Path) -> dict[str, Path]:
    """PEM files: `ca`; `server` (for 127.0.0.1) and `client`, each with its key; `other`, an authority of nobody here."""
    files = {}
    authority_key, authority = issue("authority", None)
    for name, (key, certificate) in {
        "ca": (None, authority),
        "other": (None, issue("other", None)[1]),
        "server": issue("server", (authority_key, authority)),
        "client": issue("client", (authority_key, authority)),
    }.items():
        pem = certificate.public_bytes(serialization.Encoding.PEM)
        if key is not None:
            pem += key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        files[name] = folder / f"{name}.pem"
        files[name].write_bytes(pem)
    return files


def issue(name: str, by: tuple[Any, Any] | None) -> tuple[Any, Any]:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(by[1].subject if by else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=by is None, path_length=None), critical=True)
    )
    if by is not None:
        builder = builder.add_extension(usage, critical=False).add_extension(names, critical=False)
    return key, builder.sign(by[0] if by else key, hashes.SHA256())


class Blocking:
    """An AsyncClient, called like a Client: one suite for both."""

    loop_factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop

    def __init__(self, url: str, **options: Any) -> None:
        self._runner = asyncio.Runner(loop_factory=type(self).loop_factory)
        self._client = AsyncClient(url, **options)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            async def run() -> Any:
                return await getattr(self._client, name)(*arguments, **options)

            return self._runner.run(run())

        return call

    def __enter__(self) -> Blocking:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._runner.close()


class BlockingOnUvloop(Blocking):
    loop_factory = uvloop.new_event_loop


KINDS: dict[str, Any] = {"blocking": Client, "async": Blocking, "uvloop": BlockingOnUvloop}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("client"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    yield running
    running.ready, running.predictor.hang = True, False
    running.predictor.fail.clear()
    running.predictor.seen.clear()
    running.predictor.cancelled.clear()
    running.models.done.clear()


@contextmanager
def connected(server: Server, kind: str, scheme: str, **options: Any) -> Iterator[Any]:
    if scheme not in server.url:
        pytest.skip(f"no {scheme} server")
    if scheme in ("https", "grpcs"):
        options = {"ca": server.files["ca"], "certificate": server.files["client"], **options}
    with KINDS[kind](server.url[scheme], **{"token": TOKEN, **options}) as client:
        yield client


@pytest.fixture(params=["http", "unix", "https", "grpc", "grpcs"])
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def client(server: Server, kind: str, scheme: str) -> Iterator[Any]:
    with connected(server, kind, scheme) as client:
        yield client


X = np.arange(8, dtype=np.float32).reshape(2, 4)


def test_an_answer_arrives_with_its_marks(server: Server, client: Any) -> None:
    answer = client.infer(
        "double",
        {"x": X},
        version="1",
        outputs=["y"],
        min_confidence=0.25,
        priority=1,
        id="né",
        parameters={"note": "ü", "limit": 3},
        trace="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        timeout=3,
    )
    assert np.array_equal(answer["y"], X * 2)
    assert answer["y"].dtype == np.float32
    marks = (answer.model, answer.version, answer.package, answer.tier, answer.confidence, answer.reason, answer.id)
    assert marks == ("double", "1", "package-1", "edge", 0.25, "local", "né")
    got = server.predictor.seen[0]
    assert (got.version, tuple(got.outputs), got.min_confidence, got.priority) == ("1", ("y",), 0.25, 1)
    assert (got.id, got.parameters["note"], got.parameters["limit"]) == ("né", "ü", 3)
    assert got.trace is not None
    assert got.trace.startswith("00-0af7")
    assert got.deadline is not None
    assert 0 < got.deadline - time.monotonic() <= 3.1


def test_the_same_request_again_gets_its_own_answer(client: Any) -> None:
    for number in range(5):
        assert client.infer("double", {"x": np.full((1, 4), number, np.float32)})["y"][0, 0] == 2 * number
    for rows in (0, 1, 3, 2):
        assert client.infer("double", {"x": np.ones((rows, 4), np.float32)})["y"].shape == (rows, 4)


def test_texts_and_large_tensors_travel(client: Any) -> None:
    texts = np.array([["a", "", "ü" * 1000, b"\xff\x00"]], object)
    assert client.infer("double", {"x": texts})["y"].tolist() == [[b"a", b"", ("ü" * 1000).encode(), b"\xff\x00"]]
    large = np.random.default_rng(1).standard_normal((20_000, 4)).astype(np.float32)
    assert np.array_equal(client.infer("double", {"x": large})["y"], large * 2)


def test_a_list_or_the_value_alone_takes_the_models_datatype(server: Server, client: Any) -> None:
    assert client.infer("double", [[1, 2, 3, 4]])["y"].tolist() == [[2, 4, 6, 8]]
    assert client.infer("double", {"x": [[0.5, 2, 3, 4]]})["y"].dtype == np.float32
    assert client.infer("double", X)["y"].shape == (2, 4)
    with pytest.raises(InvalidRequest, match=r"sum.* 2 inputs .*a, b"):
        client.infer("sum", X)
    with pytest.raises(InvalidRequest, match="'z'"):
        client.infer("double", {"z": [1]})


def test_health_metadata_and_repository(server: Server, client: Any) -> None:
    assert client.live()
    assert client.ready()
    assert client.ready("double")
    assert client.ready("double", version="1")
    assert not client.ready("double", version="9")
    assert not client.ready("none")
    server.ready = False
    assert not client.ready()
    assert client.live()
    known = client.metadata("double")
    assert (known.name, known.versions, known.platform) == ("double", ("1",), "onnx_fp32")
    assert known.inputs == (TensorSpec("x", "FP32", (-1, 4)),)
    assert client.models() == ["double"]
    assert [(each.name, each.state, each.reason) for each in client.index()] == [
        ("double", "READY", ""),
        ("sum", "UNAVAILABLE", "unloaded"),
    ]
    client.load("sum")
    client.unload("sum")
    assert server.models.done == ["load sum", "unload sum"]
    with pytest.raises(Conflict, match="hub"):
        client.load("broken")
    assert client.config("double")["max_batch_size"] == 8
    (counted,) = client.statistics("double")
    assert (counted.name, counted.inference_count, counted.inference_stats["success"].count) == ("double", 7, 0)
    assert len(client.statistics()) == 1


@pytest.mark.parametrize(
    ("error", "kind_of_it"),
    [
        (InvalidRequest("input 'x' is odd"), InvalidRequest),
        (NotFound("nothing"), NotFound),
        (Overloaded("busy", 6.5), Overloaded),
        (EngineFailure("broke"), EngineFailure),
        (DeadlineExceeded("late"), DeadlineExceeded),
    ],
)
def test_an_error_arrives_as_what_it_is(
    server: Server, client: Any, error: TierlineError, kind_of_it: type[TierlineError]
) -> None:
    server.predictor.fail.append(error)
    with pytest.raises(TierlineError) as caught:
        client.infer("double", {"x": X})
    assert type(caught.value) is kind_of_it
    if isinstance(caught.value, Overloaded):
        assert caught.value.retry_after == 7
    assert client.infer("double", {"x": X}).tier == "edge"


def test_no_token_is_unauthenticated(server: Server, kind: str, scheme: str) -> None:
    with connected(server, kind, scheme, token=None) as client:
        with pytest.raises(Unauthenticated):
            client.infer("double", {"x": X})
        assert client.live()


def test_the_deadline_is_kept_and_frees_the_server(server: Server, client: Any, scheme: str) -> None:
    client.live()
    server.predictor.hang = True
    start = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        client.infer("double", {"x": X}, timeout=0.1)
    assert time.monotonic() - start < 1
    if scheme != "unix":  # which has no reset: the server cannot tell a client that left from one that ended its side
        assert server.predictor.cancelled.wait(5)
    server.predictor.hang = False
    assert np.array_equal(client.infer("double", {"x": X})["y"], X * 2)


def test_a_deadline_in_the_past_sends_nothing(server: Server, client: Any) -> None:
    for timeout in (0, -1):
        with pytest.raises(DeadlineExceeded):
            client.infer("double", {"x": X}, timeout=timeout)
    assert not server.predictor.seen
    with pytest.raises(InvalidRequest, match="timeout"):
        client.infer("double", {"x": X}, timeout=float("nan"))


def test_a_closed_client_is_unreachable_for_good(client: Any) -> None:
    client.close()
    with pytest.raises(Unreachable, match="closed"):
        client.infer("double", {"x": X})


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_retries_wait_as_long_as_the_server_says(server: Server, kind: str, scheme: str) -> None:
    # One second is the least that an HTTP server can ask for.
    with connected(server, kind, scheme, retries=Retries(most=1)) as client:
        server.predictor.fail.append(Overloaded("busy", 0.5))
        start = time.monotonic()
        assert client.infer("double", {"x": X}).tier == "edge"
        assert 1 <= time.monotonic() - start < 3
        server.predictor.fail += [Overloaded("busy", 0.5)]
        with pytest.raises(Overloaded):  # the pause would use up the time
            client.infer("double", {"x": X}, timeout=0.5)
        with pytest.raises(Overloaded):  # never again of itself: it may have been done
            client.load("busy")
        assert server.models.done == ["load busy"]


def test_nobody_listening_is_unreachable(kind: str, tmp_path: Path) -> None:
    for url in ("http://127.0.0.1:9", f"unix://{tmp_path}/none.sock", "grpc://127.0.0.1:9", "https://127.0.0.1:9"):
        with KINDS[kind](url) as client:
            with pytest.raises(Unreachable, match=r"127\.0\.0\.1:9|none\.sock"):
                client.metadata("m", timeout=2)
            assert not client.live(timeout=2)
            assert not client.ready(timeout=2)


@pytest.mark.parametrize("scheme", ["https", "grpcs"])
@pytest.mark.parametrize("options", [{"ca": "other"}, {"ca": None}, {"certificate": None}])
def test_a_stranger_is_refused_on_both_sides(
    server: Server, kind: str, scheme: str, options: dict[str, str | None]
) -> None:
    files = {name: value and server.files[value] for name, value in options.items()}
    with connected(server, kind, scheme, **files) as client, pytest.raises(Unreachable):
        client.infer("double", {"x": X}, timeout=2)
    assert not server.predictor.seen


@pytest.mark.parametrize("scheme", ["http", "unix", "https", "grpc"])
def test_threads_share_a_client_and_never_an_answer(server: Server, scheme: str) -> None:
    def ask(number: int) -> bool:
        answer = client.infer("double", {"x": np.full((1, 4), number, np.float32)})
        return bool((answer["y"] == 2 * number).all())

    with connected(server, "blocking", scheme, max_connections=3) as client, ThreadPoolExecutor(8) as threads:
        assert all(threads.map(ask, range(400)))


@pytest.mark.parametrize("scheme", ["http", "unix", "https", "grpc"])
async def test_tasks_share_a_client_and_never_an_answer(server: Server, scheme: str) -> None:
    options: dict[str, Any] = {"ca": server.files["ca"], "certificate": server.files["client"]}

    async def ask(number: int) -> bool:
        answer = await client.infer("double", {"x": np.full((1, 4), number, np.float32)})
        return bool((answer["y"] == 2 * number).all())

    if scheme not in server.url:
        pytest.skip(f"no {scheme} server")
    tls = options if scheme == "https" else {}
    async with AsyncClient(server.url[scheme], token=TOKEN, max_connections=3, **tls) as client:
        assert all(await asyncio.gather(*map(ask, range(200))))


def test_a_restarted_server_is_not_noticed(tmp_path: Path, kind: str) -> None:
    models = Models()
    plane = DataPlane(Predictor(models), models, ready=lambda: True)

    @asynccontextmanager
    async def listening(port: int) -> AsyncIterator[int]:
        async with serve_http(RestHandler(plane), port=port, drain_seconds=0.1) as server:
            yield server.port

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def call(coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(10)

    first = listening(0)
    port = call(first.__aenter__())
    with KINDS[kind](f"http://127.0.0.1:{port}") as client:
        assert client.infer("double", {"x": X}).tier == "edge"
        call(first.__aexit__(None, None, None))
        second = listening(port)
        call(second.__aenter__())
        assert client.infer("double", {"x": X}).tier == "edge"
        call(second.__aexit__(None, None, None))
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


FORKING = """
import os, sys
import numpy as np
from tierline import Client

def right(client, sign):
    x = np.ones((1, 4), np.float32)
    return all(client.infer("double", {"x": x * each * sign})["y"][0, 0] == 2 * each * sign for each in range(50))

with Client(sys.argv[1], token=sys.argv[2]) as client:
    assert right(client, 1)
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if right(client, -1) else 1)
        finally:
            os._exit(2)
    assert right(client, 1)
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.parametrize("scheme", ["http", "unix"])
def test_a_forked_child_does_not_speak_on_its_parents_connections(server: Server, scheme: str) -> None:
    # In a process of its own: this one has threads that would not survive a fork.
    command = [sys.executable, "-c", FORKING, server.url[scheme], TOKEN]
    subprocess.run(command, cwd=ROOT, check=True, timeout=30)


def test_closing_leaves_no_connection_behind(server: Server, kind: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with connected(server, kind, "http") as client:
            client.infer("double", {"x": X})
    gc.collect()
    assert wait_for(lambda: len(os.listdir("/proc/self/fd")) <= before)


def wait_for(true: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 5
    while not true() and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    return true()


def test_both_clients_have_the_same_calls_and_arguments() -> None:
    for name, method in vars(Client).items():
        if not name.startswith("_"):
            assert inspect.signature(getattr(AsyncClient, name)) == inspect.signature(method), name
    assert inspect.signature(Client.__init__) == inspect.signature(AsyncClient.__init__)


def test_the_documented_example_runs(server: Server) -> None:
    page = (ROOT / "docs" / "client.md").read_text()
    namespace: dict[str, Any] = {}
    for code in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        told = (
            code.replace("http://127.0.0.1:8000", server.url["http"])
            .replace("unix:///run/tierline/serving.sock", server.url["unix"])
            .replace('"s3cret"', f'"{TOKEN}"')
        )
        exec(compile(told, "docs/client.md", "exec"), namespace)  # noqa: S102 - our own page
    assert namespace["answer"]["y"].tolist() == [[2, 4, 6, 8]]
