"""The management API as the command line uses it: one connection, every wait bounded, errors as one sentence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import file_digest
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import msgspec
import urllib3

from models.errors import InvalidManifest
from models.manifest import MAX_MANIFEST_BYTES, Manifest, decode_manifest

CONNECT_SECONDS = 5.0
READ_SECONDS = 60.0
"""For one answer; an upload's answer comes after its last byte was flushed to the hub's disk."""
MAX_ANSWER_BYTES = 16 * 1024 * 1024
PIECE_BYTES = 256 * 1024
MAX_FILES = 1_000
"""Files looked at in a package folder."""


class HubError(Exception):
    """The hub refused or could not be reached; the text is for the person at the terminal."""


class HubClient:
    """Raises HubError for every answer that is not a success."""

    def __init__(self, url: str, token: str, ca: Path | None = None) -> None:
        """`ca`: PEM of whom an https hub is trusted by, None = the machine's own trust."""
        if not url.startswith(("http://", "https://")):
            raise HubError(f"--hub {url!r} is not http://host:port")
        self._url = url.rstrip("/")
        self._headers = {"authorization": f"Bearer {token}"}
        timeout = urllib3.Timeout(connect=CONNECT_SECONDS, read=READ_SECONDS)
        self._pool = urllib3.PoolManager(timeout=timeout, retries=False, ca_certs=str(ca) if ca is not None else None)

    def get(self, path: str, query: Mapping[str, str] | None = None) -> Any:
        return self._json("GET", path, fields=query)

    def send(self, method: str, path: str, body: bytes | Mapping[str, object]) -> Any:
        """Send a JSON body; bytes go as they are."""
        data = body if isinstance(body, bytes) else msgspec.json.encode(body)
        return self._json(method, path, body=data, headers={"content-type": "application/json"})

    def pages(self, path: str) -> Iterator[dict[str, Any]]:
        """Every entry of a paged list."""
        query = {"limit": "200"}
        while True:
            page = self.get(path, query)
            yield from page["items"]
            if not page["next"]:
                return
            query = {"limit": "200", "after": page["next"]}

    def has_blob(self, digest: str) -> bool:
        with self._answer("HEAD", f"/api/v1/blobs/{quote(digest)}") as answer:
            if answer.status not in (200, 404):
                raise HubError(f"HEAD blob {digest}: status {answer.status}")
            return answer.status == 200

    def put_blob(self, digest: str, path: Path) -> None:
        with path.open("rb") as file:
            headers = {"content-type": "application/octet-stream", "content-length": str(path.stat().st_size)}
            self._json("PUT", f"/api/v1/blobs/{quote(digest)}", body=file, headers=headers)

    def download(self, path: str, query: Sequence[tuple[str, str]]) -> Iterator[bytes]:
        """A large answer as it comes."""
        with self._answer("GET", f"{path}?{urlencode(query)}") as answer:
            if answer.status != 200:
                raise HubError(_explain(self._url, answer.status, answer.read(MAX_ANSWER_BYTES)))
            yield from answer.stream(PIECE_BYTES)

    def close(self) -> None:
        self._pool.clear()

    def _json(self, method: str, path: str, **request: Any) -> Any:
        with self._answer(method, path, **request) as answer:
            body = answer.read(MAX_ANSWER_BYTES)
            if not 200 <= answer.status < 300:
                raise HubError(_explain(self._url, answer.status, body))
            return msgspec.json.decode(body) if body else None

    @contextmanager
    def _answer(
        self, method: str, path: str, headers: Mapping[str, str] | None = None, **request: Any
    ) -> Iterator[urllib3.BaseHTTPResponse]:
        try:
            answer = self._pool.request(
                method,
                self._url + path,
                headers={**self._headers, **(headers or {})},
                preload_content=False,
                redirect=False,
                **request,
            )
            try:
                yield answer
            finally:
                answer.release_conn()
        except urllib3.exceptions.HTTPError as error:
            raise HubError(f"no answer from {self._url}: {_cause(error)}") from error


def _cause(error: Exception) -> str:
    inner = error.__cause__ or error
    return str(inner) or type(inner).__name__


def _explain(url: str, status: int, body: bytes) -> str:
    try:
        text = str(msgspec.json.decode(body, type=dict[str, Any])["error"])
    except (msgspec.MsgspecError, UnicodeDecodeError, KeyError):
        text = f"status {status}"
    # A hub names what it misses: this is the answer of something else, or of another path.
    return f"is {url} a hub? It says: {text}" if status == 404 and "/" in text else text


def publish_folder(hub: HubClient, folder: Path) -> tuple[str, int]:
    """Upload a package folder's files that the hub lacks and publish its manifest; (`package/version`, files uploaded).

    Raises InvalidManifest when the folder does not hold what its manifest names, HubError, OSError.
    """
    content = _read_manifest(folder / "manifest.json")
    try:
        manifest = decode_manifest(content)
    except InvalidManifest as error:
        raise InvalidManifest(f"{folder / 'manifest.json'}: {error}") from error
    files = find_files(folder, manifest)
    missing = [digest for digest in files if not hub.has_blob(digest)]
    for digest in missing:
        hub.put_blob(digest, files[digest])
    hub.send("POST", "/api/v1/packages", content)
    return f"{manifest.package}/{manifest.version}", len(missing)


def _read_manifest(path: Path) -> bytes:
    if not path.is_file():
        raise InvalidManifest(f"{path} does not exist: not a package folder")
    with path.open("rb") as file:
        return file.read(MAX_MANIFEST_BYTES + 1)


def find_files(folder: Path, manifest: Manifest) -> dict[str, Path]:
    """Digest -> file of everything the manifest names; names are free, content decides. Raises InvalidManifest."""
    uses = {f"variant {variant.engine} {variant.precision}": variant.blob for variant in manifest.variants}
    uses["golden"] = manifest.golden
    wanted = {blob.digest: blob.size for blob in uses.values()}
    found: dict[str, Path] = {}
    for count, path in enumerate(sorted(folder.iterdir())):
        if count >= MAX_FILES:
            raise InvalidManifest(f"{folder} holds more than {MAX_FILES} files")
        if path.is_file():
            with path.open("rb") as file:
                found.setdefault(f"sha256:{file_digest(file, 'sha256').hexdigest()}", path)
    for use, blob in uses.items():
        if blob.digest not in found:
            raise InvalidManifest(f"{folder}: {use}: no file here has the content {blob.digest}")
        size = found[blob.digest].stat().st_size
        if size != blob.size:
            raise InvalidManifest(f"{folder}: {use}: {blob.size} bytes stated, {found[blob.digest].name} has {size}")
    return {digest: found[digest] for digest in wanted}
