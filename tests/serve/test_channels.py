"""Whoever calls, and whoever is called, notices that the other one is stopped, or that nothing reaches it any more."""

from __future__ import annotations

import asyncio
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import pytest
from bench import netns

from blitzjax.serve.channels import CONTROLLER_SERVER
from blitzjax.serve.hosts import free_ports

PEER = (sys.executable, str(Path(__file__).with_name("channel_peer.py")))
ALL = {f"gone {end} of a {name}" for end in ("client", "server") for name in ("worker", "controller")}
FASTER = (20, 5, 1)  # than ours; the first is for a machine on which nothing waits for a core for 0.2 s
SILENT_S = 60.0  # some pings of every end, if they were ours
WHOLE_S = 60.0  # nothing but a ping notices so soon


class Peer:
    def __init__(self, argv: list[str]):
        self.process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self._lines.put(line.strip())

    def line(self, timeout_s: float) -> str:
        return self._lines.get(timeout=timeout_s)

    def silent(self, for_s: float) -> bool:
        try:
            return not self.line(for_s)
        except queue.Empty:
            return True


@contextmanager
def two(how: str, faster: int) -> Iterator[tuple[list[Peer], Callable[[], None]]]:
    """Two peers, and what makes the second one vanish."""
    peer = (*PEER, str(faster))
    with ExitStack() as stack:
        if how == "cut off":
            hosts = stack.enter_context(netns.hosts(2, 1000))
            here, there = (f"{host.ip}:6000,{host.ip}:6001" for host in hosts)
            commands = [hosts[0].command([*peer, here, there]), hosts[1].command([*peer, there, here])]

            def vanish() -> None:
                subprocess.run(["ip", "link", "set", f"{hosts[1].namespace}h", "down"], check=True)
        else:
            addresses = [f"127.0.0.1:{port}" for port in free_ports(4)]
            here, there = ",".join(addresses[:2]), ",".join(addresses[2:])
            commands = [[*peer, here, there], [*peer, there, here]]

            def vanish() -> None:
                peers[1].process.send_signal(signal.SIGSTOP)
        peers = [Peer(command) for command in commands]
        for peer in peers:
            stack.callback(peer.process.wait)
            stack.callback(peer.process.kill)
        yield peers, vanish


@pytest.mark.parametrize("how", ["stopped", "cut off"])
def test_both_ends_notice(how: str) -> None:
    if how == "cut off" and (why := netns.missing()):
        pytest.skip(why)
    for faster in FASTER:
        with two(how, faster) as (peers, vanish):
            here, _ = peers
            if [peer.line(300) for peer in peers] == ["open", "open"] and here.silent(SILENT_S / faster):
                vanish()
                assert {here.line(WHOLE_S) for _ in ALL} == ALL
                return
    raise AssertionError("pings are not allowed, whatever their pace")


def test_of_a_burst_no_call_is_cancelled() -> None:
    async def echo(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        return request

    async def burst(calls: int) -> list[bytes]:
        server = grpc.aio.server(options=CONTROLLER_SERVER)
        method = grpc.unary_unary_rpc_method_handler(echo)
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("service", {"Echo": method})])
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary("/service/Echo")
            answers = await asyncio.gather(*(call(b"%d" % k) for k in range(calls)))
        await server.stop(0)
        return answers

    assert asyncio.run(burst(2500)) == [b"%d" % k for k in range(2500)]
