"""A web server of images on this machine that fails on request, for tests of remote reading."""

from __future__ import annotations

import functools
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FAULTS = ("500", "503", "reset", "short", "stall")
STALL_SECONDS = 1.5


class Faults:
    """Which requests fail, and how many did.

    Args:
        share: of the files that fail at their first `times` requests; of all requests if `independent`.
        gone_after: every request after so many fails as `gone` says.
    """

    def __init__(
        self, share: float = 0.0, times: int = 2, kinds: tuple[str, ...] = FAULTS, *,
        independent: bool = False, gone_after: float = float("inf"), gone: str = "503",
    ) -> None:  # fmt: skip
        self.share, self.times, self.kinds = share, times, kinds
        self.independent, self.gone_after, self.gone = independent, gone_after, gone
        self.heads = 0
        self.asked: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.lock = threading.Lock()

    def of(self, path: str) -> str | None:
        """How this request fails, if it does."""
        with self.lock:
            self.asked[path] += 1
            number = self.asked[path]
            draw = random.Random(f"{path} {number}" if self.independent else path)
            hit = draw.random() < self.share and (self.independent or number <= self.times)
            kind = draw.choice(self.kinds) if hit else None
            kind = self.gone if self.asked.total() > self.gone_after else kind
            if kind is not None:
                self.failed[kind] += 1
        return kind


class Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    faults = Faults()

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        kind = self.faults.of(self.path) if self.path.endswith(".png") else None
        if kind is None:
            super().do_GET()
        elif kind.isdigit():
            self.send_error(int(kind))
        elif kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
        else:
            data = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            if kind == "stall":
                time.sleep(STALL_SECONDS)
            self.close_connection = True


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *arguments: object) -> None:
        """A client that hangs up is part of the tests."""


@contextmanager
def served(folder: Path, faults: Faults | None = None) -> Iterator[str]:
    """The URL of a folder while it is served."""
    handler = type("FailingHandler", (Handler,), {"faults": faults or Faults()})
    server = Server(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
