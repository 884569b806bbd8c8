"""One of two machines that call each other: `python channel_peer.py HERE THERE`, two addresses each.

It listens as a worker and as a controller do, and calls the other as both are called, with faster pings. "open" on
stdout says that all four calls are there; "gone WHICH" that this end has noticed the other's.
"""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc

from blitzjax.serve import channels

FASTER = {"worker": 20, "controller": 40}
TIMES = ("grpc.keepalive_time_ms", "grpc.keepalive_timeout_ms", "grpc.http2.ping_timeout_ms",
         "grpc.http2.min_ping_interval_without_data_ms")
ENDS = {"worker": (channels.TO_WORKER, channels.WORKER_SERVER),
        "controller": (channels.TO_CONTROLLER, channels.CONTROLLER_SERVER)}


def faster(name: str, options: channels.Options) -> channels.Options:
    return tuple((key, value // FASTER[name] if key in TIMES else value) for key, value in options)


class Calls(grpc.GenericRpcHandler):
    """Each call is answered once, and then never again."""

    def __init__(self, name: str, opened: threading.Semaphore):
        self._name, self._opened = name, opened

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return grpc.unary_stream_rpc_method_handler(self._answer)

    def _answer(self, request: bytes, context: grpc.ServicerContext):
        context.add_callback(lambda: say(f"gone server of a {self._name}"))
        self._opened.release()
        yield b"hello"
        threading.Event().wait()


def call(name: str, address: str, opened: threading.Semaphore) -> None:
    channel = grpc.insecure_channel(address, faster(name, ENDS[name][0]))
    answers = channel.unary_stream("/test/call")(b"", wait_for_ready=True)
    next(answers)
    opened.release()
    try:
        next(answers)
    except grpc.RpcError:
        say(f"gone client of a {name}")


def say(line: str) -> None:
    print(line, flush=True)


def main(here: str, there: str) -> None:
    opened = threading.Semaphore(0)
    servers = []  # what nobody holds stops
    for name, listens, called in zip(ENDS, here.split(","), there.split(","), strict=True):
        server = grpc.server(ThreadPoolExecutor(2), (Calls(name, opened),), options=faster(name, ENDS[name][1]))
        server.add_insecure_port(listens)
        server.start()
        servers.append(server)
        threading.Thread(target=call, args=(name, called, opened), daemon=True).start()
    for _ in range(2 * len(ENDS)):
        opened.acquire()
    say("open")
    threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
