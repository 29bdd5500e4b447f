"""The page over HTTP on this machine alone, with data that is read again whenever it is asked for."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from moe_train.dashboard.content import Source
from moe_train.dashboard.page import as_json, as_page
from moe_train.errors import UserError

HOST = "127.0.0.1"
REFRESH_SECONDS = 5.0


class DashboardServer(ThreadingHTTPServer):
    """Listens on 127.0.0.1; port 0 takes a free one. Raises UserError where the port is taken."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, source: Source, port: int) -> None:
        self._source, self._reading = source, threading.Lock()
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"port={port} cannot be served ({reason}): choose another port=, or 0 for any that is free"
            ) from None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever asked and left before the answer is no error."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_address[1]}/"

    def content(self) -> tuple[dict[str, Any], str]:
        """What there is to show now, and a name for it that changes when it does."""
        with self._reading:
            content = self._source.read()
        stable = json.dumps({key: value for key, value in content.items() if key != "made_at"}, sort_keys=True)
        return content, '"' + hashlib.sha256(stable.encode()).hexdigest()[:24] + '"'


class _Handler(BaseHTTPRequestHandler):
    server: DashboardServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        # A page elsewhere could have a name of its own point here, and read what it got: only our own names are served.
        host = (self.headers.get("Host") or "").rpartition(":")[0]
        if host not in (HOST, "localhost"):
            self._answer(403, "text/plain", b"only this machine's own browser is served\n")
            return
        if self.path not in ("/", "/data.json"):
            self._answer(404, "text/plain", b"there is / and /data.json\n")
            return
        content, name = self.server.content()
        if self.path == "/":
            self._answer(200, "text/html", as_page(content, REFRESH_SECONDS).encode())
        elif self.headers.get("If-None-Match") == name:
            self._answer(304, "application/json", b"", name)
        else:
            self._answer(200, "application/json", as_json(content).encode(), name)

    def _answer(self, status: int, kind: str, body: bytes, name: str | None = None) -> None:
        packed = len(body) > 1000 and "gzip" in (self.headers.get("Accept-Encoding") or "")
        if packed:
            compressor = zlib.compressobj(1, wbits=31)
            body = compressor.compress(body) + compressor.flush()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Cache-Control", "no-cache")
        self.send_header("X-Content-Type-Options", "nosniff")
        if packed:
            self.send_header("Content-Encoding", "gzip")
        if name:
            self.send_header("ETag", name)
        if status != 304:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if status != 304:
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a page that asks every few seconds would fill the terminal."""
