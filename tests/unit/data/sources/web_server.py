"""A web server on 127.0.0.1 that serves parts of files, counts what it sends, and can fail."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class WebServer:
    """What is served, and what was asked for.

    Args:
        url: Where the files are.
        files: Contents by name.
        requests: Method, name and bytes sent of each answer.
        broken: Bytes of a file, by its name, in which no part may begin: the answer is 500.
        num_failures: So many of the next answers are 503.
        tells_changes: Send an ETag.
        serves_parts: Obey `Range`.
    """

    url: str
    files: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str, int]] = field(default_factory=list)
    broken: dict[str, range] = field(default_factory=dict)
    num_failures: int = 0
    tells_changes: bool = True
    serves_parts: bool = True

    def take(self) -> tuple[int, int]:
        """Returns how many parts of files were sent since the last time, and their bytes."""
        sent = [size for method, _, size in self.requests if method == "GET"]
        self.requests.clear()
        return len(sent), sum(sent)


@contextmanager
def serve() -> Iterator[WebServer]:
    """Runs a server for as long as the context lasts."""
    http = _Server(("127.0.0.1", 0), _Handler)
    http.daemon_threads = True
    http.state = WebServer(f"http://127.0.0.1:{http.server_port}")
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield http.state
    finally:
        http.shutdown()
        http.server_close()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Says nothing: a client that has what it wanted hangs up."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def _answer(self, *, with_body: bool) -> None:
        state, name = self.server.state, self.path.lstrip("/")
        if state.num_failures:
            state.num_failures -= 1
            return self._send(503)
        if name == "" or name.endswith("/"):
            links = "".join(f'<a href="/{path}">x</a>' for path in state.files if path.startswith(name))
            return self._send(200, links.encode(), {"Content-Type": "text/html"}, with_body=with_body)
        if name not in state.files:
            return self._send(404)
        data = state.files[name]
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        headers = {"ETag": f'"{hash(data):x}"'} if state.tells_changes else {}
        if asked is None or not state.serves_parts:
            return self._send(200, data, headers, with_body=with_body)
        begin, end = int(asked[1]), min(int(asked[2]) + 1, len(data))
        if begin in state.broken.get(name, ()):
            return self._send(500)
        headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
        return self._send(206, data[begin:end], headers, with_body=with_body)

    def _send(
        self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, *, with_body: bool = True
    ) -> None:
        self.server.state.requests.append((self.command, self.path.lstrip("/"), len(body)))
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if with_body and self.command == "GET":
            self.wfile.write(body)
