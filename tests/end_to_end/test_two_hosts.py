"""Two hosts that talk over a network of their own, launched as two nodes; the link between them is cut once.

The hosts are network namespaces joined by a virtual link, which takes the rights of an administrator on Linux.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from command_line import ROOT, Commands

Hosts = tuple[str, str]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """The names of two namespaces, 10.77.0.1 and 10.77.0.2."""
    tag = uuid.uuid4().hex[:6]
    names = f"mt-{tag}-a", f"mt-{tag}-b"
    try:
        ip("netns", "add", names[0])
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("network namespaces cannot be made here")
    try:
        ip("netns", "add", names[1])
        ip("link", "add", f"v{tag}a", "netns", names[0], "type", "veth", "peer", f"v{tag}b", "netns", names[1])
        for number, name in enumerate(names, start=1):
            device = f"v{tag}{'ab'[number - 1]}"
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", device)
            for each in ("lo", device):
                ip("-n", name, "link", "set", each, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def launch(commands: Commands, hosts: Hosts, *overrides: str) -> list[subprocess.Popen[str]]:
    """torchrun on each host."""
    nodes = []
    for number, host in enumerate(hosts):
        node = ["--nnodes", "2", "--node-rank", str(number), "--nproc-per-node", "1"]
        meeting = ["--master-addr", "10.77.0.1", "--master-port", "29511"]
        inside = ["ip", "netns", "exec", host, shutil.which("torchrun") or "torchrun", *node, *meeting]
        commands.environment["GLOO_SOCKET_IFNAME"] = f"v{host.split('-')[1]}{'ab'[number]}"
        nodes.append(commands.start([*inside, str(ROOT / "train.py"), *commands.tiny, *overrides]))
    return nodes


def ended(nodes: list[subprocess.Popen[str]], seconds: float) -> list[str]:
    """What each said, once all have ended within the time."""
    deadline, said = time.monotonic() + seconds, []
    try:
        for node in nodes:
            said.append(node.communicate(timeout=max(0.1, deadline - time.monotonic()))[1])
    finally:
        for node in nodes:
            if node.poll() is None:
                for each in [*psutil.Process(node.pid).children(recursive=True), node]:
                    each.kill()
    return said


def wait_for_rows(metrics: Path, number: int) -> None:
    for _ in range(6000):
        if metrics.exists() and len(metrics.read_text().splitlines()) >= number:
            return
        time.sleep(0.01)
    raise AssertionError("no steps within a minute")


def test_a_run_over_two_hosts_ends_when_the_link_is_cut_and_goes_on_when_it_is_back(
    commands: Commands, hosts: Hosts
) -> None:
    settings = ["parallel=ep_fsdp2", "parallel.timeout_seconds=8", "checkpoint.every_steps=5", "run_dir=run"]
    nodes = launch(commands, hosts, *settings, "stop.steps=100000")
    run = commands.folder / "run"
    wait_for_rows(run / "metrics.jsonl", 7)
    while not list((run / "checkpoints").glob("step_*")):
        assert all(node.poll() is None for node in nodes)
        time.sleep(0.01)
    ip("-n", hosts[0], "link", "set", f"v{hosts[0].split('-')[1]}a", "down")
    said = ended(nodes, 90)
    assert all(node.returncode != 0 for node in nodes)
    (line,) = (line for line in said[0].splitlines() if line.startswith("error:"))
    saved = int(re.findall(r"step_(\d+) is saved: go on with resume=auto", line)[0])
    assert not list((run / "checkpoints").glob("step_*/.writing*"))

    ip("-n", hosts[0], "link", "set", f"v{hosts[0].split('-')[1]}a", "up")
    nodes = launch(commands, hosts, *settings, f"stop.steps={saved + 2}", "resume=auto")
    said = ended(nodes, 90)
    assert [node.returncode for node in nodes] == [0, 0], said
    assert commands.summary("run")["steps"] == saved + 2
    assert f"going on from step {saved}" in said[0]
