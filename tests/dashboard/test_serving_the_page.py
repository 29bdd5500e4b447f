"""The page is served to this machine alone, and what it is asked for is read anew."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import ROOT
from made_up_runs import write_run

from moe_train.dashboard.content import Source
from moe_train.dashboard.serve import DashboardServer
from moe_train.errors import UserError


@pytest.fixture
def server(tmp_path: Path) -> Iterator[DashboardServer]:
    write_run(tmp_path / "one", steps=8)
    served = DashboardServer(Source(f"{tmp_path}/**", tmp_path / "ledger.jsonl", tmp_path / "report.json"), port=0)
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield served
    served.shutdown()
    served.server_close()
    thread.join()


def get(server: DashboardServer, path: str, **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=30)
    connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer, body


def test_it_listens_on_this_machine_alone(server: DashboardServer) -> None:
    assert server.socket.getsockname()[0] == "127.0.0.1"
    with socket.socket() as other:
        other.settimeout(1)
        assert other.connect_ex(("127.0.0.2", server.server_address[1])) != 0


def test_whoever_leaves_before_the_answer_is_no_error(
    server: DashboardServer, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, left = threading.Event(), threading.Event()
    content = server.content

    def slowly() -> tuple[dict[str, Any], str]:
        asked.set()
        assert left.wait(30)
        return content()

    monkeypatch.setattr(server, "content", slowly)
    with socket.create_connection(server.server_address[:2]) as connection:
        connection.sendall(f"GET /data.json HTTP/1.0\r\nHost: 127.0.0.1:{server.server_address[1]}\r\n\r\n".encode())
        assert asked.wait(30)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, not an end
    left.set()
    monkeypatch.setattr(server, "content", content)
    assert get(server, "/data.json")[0].status == 200
    assert "Traceback" not in capfd.readouterr().err


def test_a_page_of_another_name_that_points_here_is_refused(server: DashboardServer) -> None:
    answer, body = get(server, "/data.json", Host=f"evil.example:{server.server_address[1]}")
    assert answer.status == 403
    assert b"runs" not in body
    assert get(server, "/data.json", Host=f"localhost:{server.server_address[1]}")[0].status == 200


def test_the_page_asks_again_every_few_seconds_and_nothing_else_is_served(server: DashboardServer) -> None:
    answer, body = get(server, "/")
    assert answer.status == 200
    assert b'data-refresh="5"' in body
    for path in ("/../one/config.yaml", "/config.yaml", "/data.json/.."):
        assert get(server, path)[0].status == 404


def test_data_are_read_anew_and_unchanged_ones_not_sent_again(server: DashboardServer, tmp_path: Path) -> None:
    answer, body = get(server, "/data.json")
    assert [run["figures"]["steps"] for run in json.loads(body)["runs"]] == [8]
    name = answer.headers["ETag"]
    assert get(server, "/data.json", If_None_Match=name)[0].status == 304
    write_run(tmp_path / "one", steps=9)
    write_run(tmp_path / "two", steps=3)
    answer, body = get(server, "/data.json", If_None_Match=name)
    assert answer.status == 200
    assert [run["figures"]["steps"] for run in json.loads(body)["runs"]] == [9, 3]


def test_the_command_serves_until_it_is_interrupted(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts/dashboard.py"), "serve=true", "port=0"]
    process = subprocess.Popen(command, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert re.fullmatch(r"serving http://127\.0\.0\.1:\d+/ to this machine \(Ctrl-C ends it\)\n", line)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")


def test_a_taken_port_is_a_mistake_with_its_remedy(server: DashboardServer, tmp_path: Path) -> None:
    source = Source(f"{tmp_path}/**", tmp_path / "ledger.jsonl", tmp_path / "report.json")
    with pytest.raises(UserError, match=r"cannot be served .*: choose another port=, or 0"):
        DashboardServer(source, port=server.server_address[1])
