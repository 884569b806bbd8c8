"""The worker process: one gRPC service, `Run(stream WorkerCommand) → stream WorkerEvent`, around one Node.

The controller's session configures it and feeds it, a live partner's session pulls from it, a third kind brings the KV
of one request; one that begins with Inspect is told what the worker holds, and one with FetchExecutable or FetchTokenizer
gets a file.
Invariant: parameters and compiled stages outlive sessions, requests do not; a session outlives its controller if
another one resumes it in time.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import resource
import signal
import sys
import threading
import typing
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc

from blitzjax.addresses import address, check_free, host_of, resolved
from blitzjax.errors import BlitzError
from blitzjax.serve.channels import WORKER_SERVER
from blitzjax.serve.peers import Lender
from blitzjax.serve.sessions import Outbox
from blitzjax.v1 import worker_pb2 as pb
from blitzjax.v1 import worker_pb2_grpc as rpc

if typing.TYPE_CHECKING:
    from blitzjax.serve.node import Node

log = logging.getLogger("blitzjax.worker")
_SESSIONS = 24  # concurrent Run calls: the controller, live partners, their successors while old ones end, and lenders


class Worker(rpc.WorkerServicer):
    """Sessions come and go; `_node` is made by the first Configure and stays."""

    def __init__(self, args: argparse.Namespace):
        self._args = args
        self._node: Node | None = None
        self._lock = threading.Lock()
        self._lender = Lender()  # also while the node still compiles

    def Run(self, requests: Iterator[pb.WorkerCommand], context: grpc.ServicerContext) -> Iterator[pb.WorkerEvent]:
        first = next(requests, pb.WorkerCommand())
        match first.WhichOneof("command"):
            case "configure":
                return self._control(first.configure, requests, context)
            case "partner":
                return self._partner(first, requests, context)
            case "kv_offer":
                return self._receive_kv(first, context)
            case "inspect":
                holdings = pb.Holdings() if self._node is None else self._node.holdings()
                return iter([pb.WorkerEvent(holdings=holdings)])
            case "fetch_executable":
                return _fetched(self._lender.lend(first.fetch_executable.name))
            case "fetch_tokenizer":
                return _fetched(None if self._node is None else self._node.own_tokenizer(first.fetch_tokenizer.model))
        return context.abort(
            grpc.StatusCode.INVALID_ARGUMENT,
            "a session begins with Configure, Partner, KVOffer, Inspect, FetchExecutable or FetchTokenizer")

    def _control(self, configure: pb.Configure, requests, context) -> Iterator[pb.WorkerEvent]:
        outbox = Outbox()
        context.add_callback(outbox.close)
        threading.Thread(target=self._obey, args=(configure, requests, outbox), name="session", daemon=True).start()
        yield from outbox

    def _obey(self, configure: pb.Configure, requests, outbox: Outbox) -> None:
        """Makes or adopts the node, then feeds it until the controller goes."""
        if configure.resume and self._node is None:  # it was in another process: the controller must not wait for us
            outbox.close()
            return
        try:
            with self._lock:
                if self._node is None:
                    from blitzjax.serve.node import Node  # imports jax: only now, and only here

                    self._lender.open(configure)
                    self._node = Node(configure, self._args)
                node = self._node
            node.attach(configure, outbox)
        except Exception as e:
            if not isinstance(e, BlitzError):
                log.exception("cannot configure")
            message = str(e) if isinstance(e, BlitzError) else repr(e)
            outbox.put(pb.WorkerEvent(refused=pb.Refused(instance=configure.instance, message=message)))
            outbox.close()
            return
        try:
            for command in requests:
                node.take(command, outbox)
        except grpc.RpcError:
            pass  # the controller went away
        node.detach(outbox)
        outbox.close()

    def _partner(self, first: pb.WorkerCommand, requests, context) -> Iterator[pb.WorkerEvent]:
        node = self._configured(context)
        outbox = Outbox()
        context.add_callback(outbox.close)

        def feed() -> None:
            old = node.partnered(first.partner, outbox)
            try:
                for command in requests:
                    node.obey_partner(old, command)
            except grpc.RpcError:
                pass
            node.partner_left(old)
            outbox.close()

        threading.Thread(target=feed, name="partner", daemon=True).start()
        yield from outbox

    def _receive_kv(self, first: pb.WorkerCommand, context) -> Iterator[pb.WorkerEvent]:
        node, outbox = self._configured(context), Outbox()
        offer = node.kv_offered(first.kv_offer, outbox)

        def ended() -> None:
            node.kv_withdrawn(offer)
            outbox.close()

        if not context.add_callback(ended):
            ended()
        yield from outbox

    def _configured(self, context):
        if self._node is None:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "this worker was not configured yet")
        return self._node


def _fetched(content: bytes | None) -> Iterator[pb.WorkerEvent]:
    return iter([pb.WorkerEvent(fetched=pb.Fetched(content=content))])


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s", stream=sys.stderr)
    flag = "--xla_cpu_collective_timeout_seconds"
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}=10".strip()
    open_many_files()
    server = grpc.server(ThreadPoolExecutor(_SESSIONS), options=WORKER_SERVER)
    rpc.add_WorkerServicer_to_server(Worker(args), server)
    try:
        check_free(args.listen)
    except BlitzError as e:
        print(f"blitzjax worker: {e}", file=sys.stderr)
        return 2
    server.add_insecure_port(args.listen)
    server.start()
    log.info("rank %d of %d listens on %s", args.rank, args.world, args.listen)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # collectives and compiled code cannot be interrupted
    signal.signal(signal.SIGINT, lambda *_: os._exit(0))
    threading.Thread(target=_preload, name="preload", daemon=True).start()
    server.wait_for_termination()
    return 0


def open_many_files() -> None:
    """As many as the system lets us: gloo holds a socket per other member of every clique that ever met."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _preload() -> None:
    """Imports what the first Configure needs, while nobody waits yet.

    All of it stays, so looking for garbage there would cost a fifth of the time now, and long pauses later.
    """
    gc.disable()
    import blitzjax.serve.node  # noqa: F401

    gc.freeze()
    gc.enable()


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="blitzjax worker", description="One worker process of a blitzjax cluster.")
    parser.add_argument("--listen", required=True, type=address, metavar="HOST:PORT",
                        help="where the controller and partners connect")
    parser.add_argument("--rank", type=int, required=True, help="this worker's rank in the world")
    parser.add_argument("--world", type=int, required=True, help="number of workers")
    parser.add_argument("--coordinator", required=True, type=address, metavar="HOST:PORT",
                        help="the coordination service")
    parser.add_argument("--host-ip", default="", help="address that other workers reach this one at")
    parser.add_argument("--leaf", default="", help="name of the switch, or rack, that the host is at")
    parser.add_argument("--core", type=int, help="compute on this CPU core; communication runs where there is room")
    args = parser.parse_args(argv)
    if not 0 <= args.rank < args.world:
        parser.error(f"--rank must be in [0, {args.world - 1}] in a --world of {args.world}, got {args.rank}")
    if args.core is not None and args.core not in (cores := os.sched_getaffinity(0)):
        parser.error(f"--core must be one of {', '.join(map(str, sorted(cores)))}, got {args.core}")
    if not args.host_ip:
        try:
            args.host_ip = resolved(host_of(args.listen) or "127.0.0.1")
        except OSError as e:
            parser.error(f"--listen: cannot resolve {host_of(args.listen)}: {e.strerror}")
    return args


if __name__ == "__main__":
    sys.exit(main())
