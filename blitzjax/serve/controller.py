"""The controller process: drives the brain with a wall clock, links to workers, and serves clients. Never imports jax.

Invariant: the brain is only touched on the event loop, and each of its commands is carried out before the next event.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import logging
import signal
import sys
import time
import typing
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from blitzjax import config as configs
from blitzjax import types
from blitzjax.config import Config
from blitzjax.control.cluster import Cluster
from blitzjax.errors import BlitzError, ConfigError, InvalidRequest, UnknownModel
from blitzjax.serve import codec
from blitzjax.serve.answers import Answer, Order
from blitzjax.serve.deployments import message_of
from blitzjax.serve.eventlog import EventLog
from blitzjax.serve.frontend import SERVICE, Frontend
from blitzjax.serve.links import WorkerLink
from blitzjax.serve.model import ServedModel, load_model
from blitzjax.v1 import inference_pb2_grpc as rpc
from blitzjax.v1 import worker_pb2 as pb

_log = logging.getLogger("blitzjax.controller")
_TICK_S = 0.05
_GRACE_S = 0.5  # open streams may flush their last message

_SERVER_OPTIONS = (
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.so_reuseport", 0),  # a second server on the port is an error, not a lottery
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
)


class Controller:
    """Owns the brain, the requests' answers and the worker links. Implements links.Shell."""

    def __init__(self, config: Config, models: Sequence[ServedModel], workers: Mapping[types.InstanceId, str]):
        """`workers` maps instance ids to addresses, in rank order. Opens the event log."""
        self.config = config
        self.models = {model.name: model for model in models}
        if len(self.models) < len(models):
            raise ConfigError(f"two models have the same name; they are {', '.join(m.name for m in models)}")
        self.draining = False
        self._cluster = Cluster(config, [model.spec for model in models])
        self._started = time.monotonic()
        self._numbers = itertools.count()
        self._answers: dict[types.RequestId, Answer] = {}
        self._active: dict[str, tuple[Answer, ...]] = {}  # by the client's request id, until all of them are forgotten
        # Answers whose last token came before their RequestFinished: instance and event, in case the worker dies.
        self._unconfirmed: dict[types.RequestId, types.RequestFinished] = {}
        self.compiled: set[tuple[types.InstanceId, str]] = set()  # workers, for models deployed since the start
        self.refusals: dict[tuple[types.InstanceId, str], str] = {}
        self._watchers: set[asyncio.Event] = set()
        self._broken: asyncio.Future[None] | None = None
        self._served = False  # an instance has served since the start
        self._event_log: EventLog | None = None
        if config.serve.event_log:
            header = {"specs": [asdict(model.spec) for model in models], "config": configs.to_tables(config)}
            self._event_log = EventLog(Path(config.serve.event_log), header)
        self.links = {link.instance: link for link in self._make_links(workers)}

    def _make_links(self, workers: Mapping[types.InstanceId, str]) -> Iterator[WorkerLink]:
        peers = [pb.Peer(instance=i, address=a, rank=rank) for rank, (i, a) in enumerate(workers.items())]
        for instance, address in workers.items():
            yield WorkerLink(address, pb.Configure(
                instance=instance, models=[message_of(model) for model in self.models.values()],
                config_json=json.dumps(configs.to_tables(self.config)), peers=peers), self)

    # ---- time and state

    def now(self) -> float:
        return time.monotonic() - self._started

    @property
    def pool(self) -> int:
        return len(self.links)

    @property
    def ready(self) -> bool:
        """A model can answer: an instance serves that runs prompts (those can decode as well), or one is being made, or
        can be, of its host copy.
        """
        status = self._cluster.status()
        waking = self._served and any(m.target and not m.least for m in status.models)
        return waking or any(m.copy for m in status.models) or any(
            i.phase is types.Phase.SERVING and i.role is not types.Role.DECODE for i in status.instances)

    @property
    def busy(self) -> bool:
        return bool(self._answers)

    def status(self):
        return self._cluster.status()

    def find(self, name: str) -> ServedModel:
        """The model of this name; without a name, the one deployed first. Raises UnknownModel."""
        model = self.models.get(name) if name else next(iter(self.models.values()), None)
        if model is None:
            raise UnknownModel(f"no model {name!r} here; served: {', '.join(self.models) or 'none'}")
        return model

    def context_tokens(self, model: ServedModel) -> int:
        return min(self.config.engine.max_model_len, model.spec.max_len)

    @contextlib.contextmanager
    def subscribe(self) -> Iterator[asyncio.Event]:
        """An event that is set after every change until the block ends."""
        changed = asyncio.Event()
        self._watchers.add(changed)
        try:
            yield changed
        finally:
            self._watchers.discard(changed)

    # ---- what clients want

    def submit(self, order: Order) -> tuple[Answer, ...]:
        """Starts the order's answers. Raises InvalidRequest when its id is in use."""
        if order.request_id in self._active:
            raise InvalidRequest(f"request id {order.request_id!r} is still running; ids must be unique")
        changed, now = asyncio.Event(), self.now()
        model = self.find(order.model)
        answers = tuple(Answer(f"{order.request_id}#{next(self._numbers)}", order, index, model, now, changed)
                        for index in range(order.n))
        self._active[order.request_id] = answers
        self._answers |= {answer.request.id: answer for answer in answers}
        for answer in answers:
            self.on_event(types.RequestArrived(self.now(), answer.request))
        return answers

    def leave(self, answer: Answer) -> None:
        """Nobody waits for `answer` any more; ends its generation if it still runs."""
        if self._forget(answer):
            answer.end("abort")
            self.on_event(types.RequestCancelled(self.now(), answer.request.id))

    def abort(self, request_id: str) -> None:
        for answer in self._active.get(request_id, ()):
            self.leave(answer)

    def scale(self, model: str, target: int, live: types.LiveMode | None, source: types.Source | None) -> None:
        self.on_event(types.ScaleRequested(self.now(), target, live, source, model))

    def tell_workers(self, command: pb.WorkerCommand) -> None:
        for link in self.links.values():
            link.send(command)

    def _forget(self, answer: Answer) -> bool:
        """Whether it was known; its order's id is free again when no answer of it is left."""
        if self._answers.pop(answer.request.id, None) is None:
            return False
        if all(a.request.id not in self._answers for a in self._active[answer.order.request_id]):
            del self._active[answer.order.request_id]
        return True

    # ---- what workers say

    def on_event(self, event: types.Event) -> None:
        """The only way to the brain. A brain that raises has no trustworthy state left: the process ends."""
        try:
            self._handle(event)
        except Exception as e:
            if self._broken is None or self._broken.done():
                raise
            self._broken.set_exception(e)

    def _handle(self, event: types.Event) -> None:
        if self._event_log is not None:
            self._event_log.event(event)
        commands = self._cluster.handle(event)
        if self._event_log is not None:
            for command in commands:  # before any is carried out, for that may be an event of its own
                self._event_log.command(event.at, command)
        for command in commands:
            self._execute(command)
        if isinstance(event, types.RequestFinished):
            self._confirm(event)
        elif isinstance(event, types.TransferEnded) and event.error:
            self._load_failed(event)
        elif isinstance(event, types.ModelReady):
            self.compiled.add((event.instance, event.model))
        self._served = self._served or self.ready
        for changed in self._watchers:
            changed.set()

    def on_tokens(self, instance: types.InstanceId, tokens: pb.Tokens) -> None:
        answer = self._answers.get(tokens.request_id)
        if answer is None or tokens.attempt != answer.attempt:
            return  # the client left, or a later attempt runs elsewhere
        answer.layers_helped = max(answer.layers_helped, tokens.layers_helped)
        answer.cached_tokens = tokens.cached_tokens if tokens.start == 0 else answer.cached_tokens
        try:
            answer.push(tokens.start, list(tokens.token_ids), tokens.finish_reason or None, self.now(),
                        codec.decode_logprobs(tokens.logprobs), codec.decode_logprobs(tokens.prompt_logprobs))
        except IndexError as e:
            _log.error("%s: %s", instance, e)
            answer.fail("INTERNAL", str(e))
        if not answer.ended:
            return
        self._forget(answer)
        if tokens.finish_reason and answer.failure is None:
            self._unconfirmed[answer.request.id] = types.RequestFinished(
                self.now(), instance, answer.request.id, answer.attempt, tokens.finish_reason)
        else:  # a stop string, or broken
            self.on_event(types.RequestCancelled(self.now(), answer.request.id))

    def _confirm(self, event: types.RequestFinished) -> None:
        """Ends an answer whose last tokens did not say so; every request ends with a reply."""
        self._unconfirmed.pop(event.request_id, None)
        answer = self._answers.get(event.request_id)
        if answer is None or event.attempt != answer.attempt or event.reason == "abort":
            return  # an aborted attempt runs again, unless the client left: then nobody waits
        self._forget(answer)
        if event.reason == "error":
            answer.fail("INTERNAL", f"{event.instance} could not finish the request")
        else:
            answer.end(event.reason)

    def on_lost(self, instance: types.InstanceId, reason: str) -> None:
        _log.warning("%s lost: %s", instance, reason)
        for event in [e for e in self._unconfirmed.values() if e.instance == instance]:
            self.on_event(event)
        self.on_event(types.InstanceLost(self.now(), instance, reason))

    def _load_failed(self, event: types.TransferEnded) -> None:
        """Told to the operator; fatal while nothing has ever served, for then it is the checkpoint."""
        _log.error("%s could not load the model: %s", event.instance, event.error)
        if not self._served and self._broken is not None and not self._broken.done():
            self._broken.set_exception(BlitzError(f"the model cannot be loaded: {event.error}"))

    def on_refused(self, instance: types.InstanceId, message: str, model: str = "") -> None:
        if model:
            _log.error("%s cannot serve %s: %s", instance, model, message)
            self.refusals[instance, model] = message
            for changed in self._watchers:
                changed.set()
            return
        _log.error("%s refused to serve: %s", instance, message)
        if self._broken is not None and not self._broken.done() and all(link.refused for link in self.links.values()):
            self._broken.set_exception(BlitzError(f"no worker can serve: {message}"))

    # ---- what the brain wants

    def _execute(self, command: types.Command) -> None:
        if isinstance(command, types.Reject):
            answer = self._answers.get(command.request_id)
            if answer is not None:
                self._forget(answer)
                answer.fail(command.code, command.message)
            return
        work = None
        if isinstance(command, types.Assign):
            answer = self._answers.get(command.request_id)
            if answer is None:  # its client has everything already
                self.on_event(types.RequestFinished(self.now(), command.instance, command.request_id, command.attempt,
                                                    "stop"))
                return
            work = answer.work(command.attempt, self.now())
        self.links[command.instance].send(codec.encode_command(command, work))

    # ---- life

    async def run(self) -> None:
        """Ticks and talks to workers until cancelled. Raises what broke the brain; BlitzError if no worker serves."""
        self._broken = asyncio.get_running_loop().create_future()
        links = (link.run() for link in self.links.values())
        async with _background(*links, self._tick(), _result(self._broken)) as ended:
            await ended

    async def _tick(self) -> None:
        while True:
            self.on_event(types.Ticked(self.now()))
            if self._event_log is not None:
                self._event_log.flush()
            await asyncio.sleep(_TICK_S)

    def give_up(self) -> None:
        """Ends what still runs with UNAVAILABLE."""
        for answer in list(self._answers.values()):
            self._forget(answer)
            answer.fail("UNAVAILABLE", "the server shut down before the answer was complete")

    def close(self) -> None:
        """Closes the event log. AssertionError if the brain is inconsistent."""
        if self._event_log is not None:
            self._event_log.close()
            self._event_log = None
        self._cluster.check()


async def _result(future: asyncio.Future[None]) -> None:
    await future


# --------------------------------------------------------------------------------------------------------------------
# The process: server, health, signals.


class Stop:
    """SIGTERM and SIGINT: the first asks to drain, the second to leave at once."""

    def __init__(self):
        self.drain, self.now = asyncio.Event(), asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._signalled)

    def _signalled(self) -> None:
        (self.now if self.drain.is_set() else self.drain).set()


async def serve(controller: Controller, host: str, port: int) -> None:
    """Serves until signalled or broken. Raises BlitzError when it cannot listen or no worker can serve."""
    server = grpc.aio.server(options=_SERVER_OPTIONS)
    checker = health.aio.HealthServicer()
    rpc.add_InferenceServicer_to_server(Frontend(controller), server)
    health_pb2_grpc.add_HealthServicer_to_server(checker, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    stop = Stop()
    await _set_health(checker, False)
    try:
        port = server.add_insecure_port(f"{host}:{port}")
    except RuntimeError as e:
        raise BlitzError(f"cannot listen on {host}:{port}: is the port in use?") from e
    await server.start()
    print(f"controller of {', '.join(controller.models)} listens on {host}:{port}", flush=True)
    try:
        async with _background(controller.run(), _keep_health(controller, checker), stop.drain.wait()) as ended:
            await ended  # raises what broke
            await _drain(controller, checker, stop)
            controller.give_up()
            await server.stop(0 if stop.now.is_set() else _GRACE_S)
    finally:
        await server.stop(0)
    controller.close()


async def _drain(controller: Controller, checker: health.aio.HealthServicer, stop: Stop) -> None:
    """Unready at once; answers in flight may finish until the timeout or a second signal."""
    controller.draining = True
    await checker.enter_graceful_shutdown()
    _log.info("shutting down; a second signal leaves at once")
    left = asyncio.get_running_loop().time() + controller.config.serve.shutdown_timeout_s
    with controller.subscribe() as changed:
        while controller.busy and not stop.now.is_set() and asyncio.get_running_loop().time() < left:
            changed.clear()
            await changed.wait()  # at the latest the next tick


async def _keep_health(controller: Controller, checker: health.aio.HealthServicer) -> None:
    ready = False
    with controller.subscribe() as changed:
        while True:
            await changed.wait()
            changed.clear()
            if ready != controller.ready:
                ready = not ready
                await _set_health(checker, ready)


async def _set_health(checker: health.aio.HealthServicer, ready: bool) -> None:
    status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
    for name in ("", SERVICE):
        await checker.set(name, status)


@contextlib.asynccontextmanager
async def _background(*work: typing.Coroutine[None, None, object]) -> AsyncIterator[typing.Awaitable[None]]:
    """Runs coroutines beside the block; yields a wait for whichever ends first. All are cancelled at the end."""
    tasks = [asyncio.ensure_future(item) for item in work]
    try:
        yield _first(tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _first(tasks: Sequence[asyncio.Future[object]]) -> None:
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", required=True, help="i0=HOST:PORT,i1=HOST:PORT,... in rank order")
    parser.add_argument("--model-dir", required=True, type=Path, action="append",
                        help="converted checkpoint (see: blitzjax convert); again for every further model")
    parser.add_argument("--config", type=Path, help="TOML file")
    parser.add_argument("--config-json", help="the whole configuration as JSON tables; instead of --config")
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE", help="overrides one knob")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="blitzjax controller", description="The process that clients talk to.")
    add_arguments(parser)
    return run(parser.parse_args(argv))


def run(args: argparse.Namespace) -> int:
    """Exit code: 0 after a drain, 2 for a mistake of the caller, 1 when nothing can serve."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    try:
        config = _config(args)
        workers = _workers(args.workers)
        controller = Controller(config, [load_model(directory) for directory in args.model_dir], workers)
    except (BlitzError, OSError) as e:
        print(f"blitzjax controller: {e}", file=sys.stderr)
        return 2
    try:
        asyncio.run(serve(controller, config.serve.host, config.serve.port))
    except BlitzError as e:
        print(f"blitzjax controller: {e}", file=sys.stderr)
        return 1
    return 0


def _config(args: argparse.Namespace) -> Config:
    if args.config_json is None:
        return configs.load(args.config, args.set)
    try:
        return configs.from_tables(json.loads(args.config_json))
    except ValueError as e:
        raise ConfigError(f"--config-json is not JSON: {e}") from e


def _workers(text: str) -> dict[str, str]:
    """"i0=host:port,i1=host:port" -> {"i0": "host:port", ...}."""
    pairs = [item.partition("=") for item in text.split(",") if item]
    if not pairs or not all(name and port.rpartition(":")[2].isdigit() for name, _, port in pairs):
        raise ConfigError(f"--workers wants i0=HOST:PORT,i1=HOST:PORT,..., got {text!r}")
    return {name: address for name, _, address in pairs}


if __name__ == "__main__":
    sys.exit(main())
