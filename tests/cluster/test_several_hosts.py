"""The command that is run on each of several machines: here two addresses of the loopback device, told as two hosts."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from rig import SPEC, prompts

from blitzjax.engine.convert import write_random
from blitzjax.serve.client import Client, Result
from blitzjax.serve.hosts import free_ports

HOSTS = ("localhost", "127.0.0.2")
MANIFEST = Path(__file__).parents[2] / "launch" / "kubernetes.yaml"


def two_ports() -> int:
    """A free port whose next one is free too."""
    while True:
        [port] = free_ports(1)
        with socket.socket() as following, contextlib.suppress(OSError):
            following.bind(("0.0.0.0", port + 1))
            return port


@pytest.fixture
def start(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], subprocess.Popen[str]]]:
    """start(k) runs the command of host k. Clients talk to `start.address`; host k answers probes at `start.probes[k]`."""
    write_random(tmp_path / "tiny", SPEC, seed=3)
    [port, *probes], base = free_ports(3), two_ports()
    started = []

    def start(k: int) -> subprocess.Popen[str]:
        started.append(subprocess.Popen(
            [sys.executable, "-m", "blitzjax.cli", "serve", str(tmp_path / "tiny"), "--hosts", ",".join(HOSTS),
             "--host-index", str(k), "--leaf", f"rack {k}", "--event-log", str(tmp_path / f"events {k}"), "--pool", "2", "--port", str(port), "--scaling-policy", "manual", "--dtype", "float32",
             "--metrics-port", str(probes[k]), "--max-model-len", "256", "--max-num-seqs", "8", "--max-num-batched-tokens", "64",
             "--set", f"cluster.base_port={base}", "--set", "cluster.threads=1", "--set", "transfer.collective_timeout_s=3",
             "--set", f"engine.executable_cache={tmp_path_factory.getbasetemp() / 'executables'}"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        return started[-1]

    start.address, start.probes = f"127.0.0.1:{port}", [f"http://127.0.0.1:{probe}" for probe in probes]
    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def answers(client: Client) -> list[Future[Result]]:
    """To prompts that all run at once, on all instances."""
    with ThreadPoolExecutor(12) as senders:
        return [senders.submit(client.generate, p, max_tokens=60, ignore_eos=True) for p in prompts(12, seed=8)]


def tokens(answered: list[Future[Result]]) -> list[tuple[int, ...]]:
    return [answer.result().token_ids for answer in answered]


def test_hosts_share_a_cluster_and_one_of_them_may_go_and_come_back(start, tmp_path: Path) -> None:
    first, second = start(0), start(1)
    with Client(start.address) as client:
        client.wait_ready(300)
        expected = tokens(answers(client))
        while len(client.status().instances) < 2:  # the other host's worker has not come yet
            time.sleep(0.1)
        client.scale(2, wait=True, timeout_s=300)
        for path in {"/metrics", *re.findall(r"httpGet: {path: (\S+), port: metrics}", MANIFEST.read_text())}:
            for host in start.probes:
                with urllib.request.urlopen(f"{host}{path}", timeout=300) as answer:
                    assert answer.status == 200
        assert tokens(answers(client)) == expected
        killing = threading.Timer(0.1, second.kill)  # and with it its worker
        killing.start()
        assert tokens(answers(client)) == expected
        killing.join()
        second.communicate()
        second = start(1)
        assert "starting workers i1 at 127.0.0.2:" in second.stdout.readline()  # from here on a signal ends it in order
        client.scale(2, wait=True, timeout_s=300)
        assert tokens(answers(client)) == expected
    nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # then they ignore it, too
    second.send_signal(signal.SIGTERM if nohup else signal.SIGHUP)
    first.send_signal(signal.SIGTERM)
    second.communicate(timeout=300)
    said = first.communicate(timeout=300)[0]
    joined = [line for line in map(json.loads, (tmp_path / "events 0").read_text().splitlines())
              if line.get("event") == "InstanceJoined"]
    assert {(e["instance"], e["leaf"]) for e in joined} == {("i0", "rack 0"), ("i1", "rack 1")}
    assert "1 of 2 instances" in said and (second.returncode, first.returncode) == (0, 0), said
