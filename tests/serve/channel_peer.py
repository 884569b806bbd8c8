"""One of two machines that call each other: `python channel_peer.py FASTER HERE THERE`, two addresses each.

It listens as a worker and as a controller do, and calls the other as both are called, with pings that are so many times
FASTER, and twice that where they are those of controllers. "open" on stdout says that all four calls are there; "gone WHICH"
that this end has noticed the other's.
"""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc

from blitzjax.serve import channels

TIMES = ("grpc.keepalive_time_ms", "grpc.keepalive_timeout_ms", "grpc.http2.ping_timeout_ms",
         "grpc.http2.min_ping_interval_without_data_ms")
ENDS = {"worker": (channels.TO_WORKER, channels.WORKER_SERVER),
        "controller": (channels.TO_CONTROLLER, channels.CONTROLLER_SERVER)}


def faster(times: int, options: channels.Options) -> channels.Options:
    return tuple((key, value // times if key in TIMES else value) for key, value in options)


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


def call(name: str, address: str, options: channels.Options, opened: threading.Semaphore) -> None:
    channel = grpc.insecure_channel(address, options)
    answers = channel.unary_stream("/test/call")(b"", wait_for_ready=True)
    try:
        next(answers)
        opened.release()
        next(answers)
    except grpc.RpcError:
        say(f"gone client of a {name}")


def say(line: str) -> None:
    print(line, flush=True)


def main(times: str, here: str, there: str) -> None:
    opened = threading.Semaphore(0)
    servers = []  # what nobody holds stops
    for k, (name, listens, called) in enumerate(zip(ENDS, here.split(","), there.split(","), strict=True), 1):
        calls, listening = (faster(k * int(times), options) for options in ENDS[name])
        server = grpc.server(ThreadPoolExecutor(2), (Calls(name, opened),), options=listening)
        server.add_insecure_port(listens)
        server.start()
        servers.append(server)
        threading.Thread(target=call, args=(name, called, calls, opened), daemon=True).start()
    for _ in range(2 * len(ENDS)):
        opened.acquire()
    say("open")
    threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
