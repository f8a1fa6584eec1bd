"""A bucket of images on this machine, behind a proxy that fails on request, for tests of reading from S3.

The server is moto's, in a process of its own; the proxy fails requests for images as `web.Faults` says. Start at
`bucket_of` and `failing`.
"""

from __future__ import annotations

import http.client
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import quote

import pytest
from web import STALL_SECONDS, Faults, Server

SECRET = "S3CR3Tkey/of+the/Bucket"
BUCKET = "bucket"
ERRORS = {
    "500": (500, "InternalError"), "503": (503, "SlowDown"), "403": (403, "AccessDenied"),
    "expired": (400, "ExpiredToken"), "wrong": (403, "InvalidAccessKeyId"),
}  # fmt: skip
"""Kinds of faults beside those of `web`: status and code."""
_SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@contextmanager
def bucket_of(folder: Path, prefix: str = "images") -> Iterator[int]:
    """The port of an S3 server that has the files of a folder under `s3://bucket/PREFIX`."""
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        port = int(process.stdout.readline())
        put(port, f"/{BUCKET}", b"")
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                put(port, f"/{BUCKET}/{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())
        yield port
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(30)


def put(port: int, path: str, body: bytes) -> None:
    """Write an object, `/bucket/key`; the server does not look at signatures."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    key = "Credential=x/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=x"
    connection.request("PUT", quote(path), body, {"Authorization": f"AWS4-HMAC-SHA256 {key}"})
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    connection.close()


class Proxy(BaseHTTPRequestHandler):
    """To the server; requests for images fail as `faults` says, and listings as `listings` does."""

    protocol_version = "HTTP/1.1"
    upstream = 0
    faults, listings = Faults(), Faults()

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        faults = self.faults if path.endswith(".png") else self.listings
        faults.heads += self.command == "HEAD"
        kind = faults.of(self.path) if self.command == "GET" else None
        if kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return
        status, headers, data = self._asked()
        if kind in ERRORS:
            status, code = ERRORS[kind]
            data = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>said {code}</Message></Error>"
            headers, data = {"Content-Type": "application/xml"}, data.encode()
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("transfer-encoding", "connection", "content-length", "date", "server"):
                self.send_header(name, value)
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = kind in ("short", "stall")
        self.wfile.write(data[: len(data) // 2] if cut else data)
        self.wfile.flush()
        if kind == "stall":
            time.sleep(STALL_SECONDS)
        self.close_connection |= cut

    do_HEAD = do_GET

    def _asked(self) -> tuple[int, dict[str, str], bytes]:
        """What the server answers."""
        upstream = http.client.HTTPConnection("127.0.0.1", self.upstream, timeout=30)
        try:
            upstream.request(self.command, self.path, None, dict(self.headers))
            answer = upstream.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            upstream.close()


@contextmanager
def failing(port: int, faults: Faults | None = None, listings: Faults | None = None) -> Iterator[str]:
    """The endpoint of a server while it fails."""
    found = {"upstream": port, "faults": faults or Faults(), "listings": listings or Faults()}
    server = Server(("127.0.0.1", 0), type("FailingProxy", (Proxy,), found))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the environment, and none from elsewhere."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIATEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)
