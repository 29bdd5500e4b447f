"""As much of wandb's server as a run and a workspace talk to, on this machine, and able to stop answering."""

from __future__ import annotations

import http.server
import json
import re
import threading
import time
from collections.abc import Callable
from typing import Any

API_KEY = "0123456789" * 4  # of the right form, of nobody


class WandbServer(http.server.ThreadingHTTPServer):
    """Keeps what it was sent. `mode`: answers, errors (HTTP 500), denies (401) or hangs (never answers)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.mode = "answers"
        self.requests: list[str] = []
        self.runs: dict[str, dict[str, Any]] = {}  # the variables of a run's latest UpsertBucket
        self.history: dict[int, dict[str, Any]] = {}  # by line
        self.summary: dict[str, Any] = {}
        self.views: list[dict[str, Any]] = []
        self.no_project = False
        self.ended = threading.Event()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        return {
            "WANDB_BASE_URL": f"http://127.0.0.1:{self.server_port}",
            "WANDB_API_KEY": API_KEY,
            "WANDB_ERROR_REPORTING": "false",
        }

    def close(self) -> None:
        self.ended.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: Any) -> None:
        """A client that gave up is none."""

    def waits_for(self, wanted: Callable[[], bool], seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not wanted():
            assert time.monotonic() < deadline, self.requests
            time.sleep(0.02)

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        if path == "/graphql":
            asked = json.loads(body)
            operation = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
            assert operation, asked
            self.requests.append(operation[1])
            return {"data": getattr(self, f"_{operation[1]}", lambda _: {})(asked.get("variables") or {})}
        self.requests.append(path)
        if path.endswith("/file_stream"):
            for name, content in (json.loads(body).get("files") or {}).items():
                if name == "wandb-history.jsonl":
                    self.history |= {content["offset"] + n: json.loads(x) for n, x in enumerate(content["content"])}
                if name == "wandb-summary.json":
                    self.summary |= json.loads(content["content"][-1])
        return {}

    # ----------------------------------------------------------------------------------------- a run's own requests

    def _Viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "VXNlcg==", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}

    _GetDefaultEntity = _Viewer

    def _RunResumeStatus(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"model": None}

    def _UpsertBucket(self, variables: dict[str, Any]) -> dict[str, Any]:
        known = {key: value for key, value in variables.items() if value is not None}
        run = self.runs.setdefault(known.get("name", "") or next(iter(self.runs)), {})
        run |= known
        project = {"id": "UA==", "name": run["project"], "entity": {"id": "RQ==", "name": run.get("entity", "me")}}
        bucket = {"id": "Qg==", "name": run["name"], "displayName": run.get("displayName"), "project": project}
        return {"upsertBucket": {"bucket": {**bucket, "config": "{}", "historyLineCount": 0}, "inserted": True}}

    def _CreateRunFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        url = f"http://127.0.0.1:{self.server_port}/upload"
        files = [{"name": name, "uploadUrl": f"{url}/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": "Qg==", "uploadHeaders": [], "files": files}}

    # -------------------------------------------------------------------------------------------------- workspaces

    def _View(self, variables: dict[str, Any]) -> dict[str, Any]:
        if self.no_project:
            return {"project": None}
        wanted = [view for view in self.views if view["name"] == variables["viewName"]]
        found = [view for view in wanted if view["projectName"] == variables["name"]]
        return {"project": {"allViews": {"edges": [{"node": view} for view in found]}}}

    def _UpsertView2(self, variables: dict[str, Any]) -> dict[str, Any]:
        same = [view for view in self.views if view["id"] == variables.get("id")]
        view = same[0] if same else {"id": f"view-{len(self.views)}"}
        view |= {key: value for key, value in variables.items() if key != "id"}
        if not same:
            self.views.append(view)
        return {"upsertView": {"view": {"id": view["id"], "name": view["name"]}, "inserted": not same}}


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.server.mode == "hangs":
            self.server.ended.wait()
            return
        status = {"errors": 500, "denies": 401}.get(self.server.mode, 200)
        content = json.dumps(self.server.answer(self.path, body) if status == 200 else {"error": self.server.mode})
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content.encode())

    do_GET = do_PUT = do_POST

    def log_message(self, *_: Any) -> None:
        """Says nothing."""
