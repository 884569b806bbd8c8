"""The controller process: drives the brain with a wall clock, links to workers, and serves clients. Never imports jax.

Invariant: the brain is only touched on the event loop, and each of its commands is carried out before the next event.
With a journal, what is told to the replica is written down first, and the file is flushed before anybody is told.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from blitzjax import config as configs
from blitzjax import events, types
from blitzjax.config import Config
from blitzjax.addresses import is_address
from blitzjax.errors import BlitzError, ConfigError, InvalidRequest, Unavailable, UnknownModel
from blitzjax.serve import access
from blitzjax.serve.answers import Answer, Order
from blitzjax.serve.eventlog import EventLog
from blitzjax.serve.journal import Journal
from blitzjax.serve.latencies import Latencies
from blitzjax.serve.links import WorkerLink
from blitzjax.serve.model import ServedModel, load_model
from blitzjax.serve.replica import Replica, message_of
from blitzjax.serve.resume import compact, with_journal
from blitzjax.serve.server import background, serve
from blitzjax.v1 import worker_pb2 as pb

_log = logging.getLogger("blitzjax.controller")
_TICK_S = 0.05


class Controller:
    """Owns the brain, the requests' answers and the worker links. Implements links.Shell."""

    def __init__(self, config: Config, models: Sequence[ServedModel], workers: Mapping[types.InstanceId, str]):
        """`workers` maps instance ids to addresses, in rank order."""
        self.config = config
        if len({model.name for model in models}) < len(models):
            raise ConfigError(f"two models have the same name; they are {', '.join(m.name for m in models)}")
        self.draining = self.over = False
        self._started = time.monotonic()  # on that clock, `now` was 0
        self.refusals: dict[tuple[types.InstanceId, str], str] = {}
        self._watchers: set[asyncio.Event] = set()
        self._broken: asyncio.Future[None] | None = None
        self._served = False  # an instance has served since the cluster's start
        self._event_log: EventLog | None = None
        self.journal: Journal | None = None
        self.about: dict[str, object] = {  # what a log of this controller is about
            "specs": [asdict(model.spec) for model in models], "config": configs.to_tables(config),
            "workers": dict(workers)}
        self.links = {link.instance: link for link in self._make_links(models, workers)}
        self.replica = Replica(config, models, self.links)
        self.models = self.replica.models
        self._orders = self.replica.orders
        self.latencies: defaultdict[str, Latencies] = defaultdict(Latencies)  # by model, since this process began

    def _make_links(self, models: Sequence[ServedModel], workers: Mapping[types.InstanceId, str]) -> Iterator[WorkerLink]:
        peers = [pb.Peer(instance=i, address=a, rank=rank) for rank, (i, a) in enumerate(workers.items())]
        for instance, address in workers.items():
            yield WorkerLink(address, pb.Configure(
                instance=instance, models=[message_of(model) for model in models],
                config_json=json.dumps(configs.to_tables(self.config)), peers=peers), self)

    # ---- time and state

    def now(self) -> float:
        return time.monotonic() - self._started

    @property
    def resume_s(self) -> float:
        """So long an answer waits for its client if its connection breaks or this process crashes; 0: it does not."""
        return 0.0 if self.journal is None else self.config.serve.resume_timeout_s

    @property
    def pool(self) -> int:
        return len(self.links)

    @property
    def ready(self) -> bool:
        """A model can answer: an instance serves that runs prompts (those can decode as well), or one is being made, or
        can be, of its host copy.
        """
        status = self.status()
        waking = self._served and any(m.target and not m.least for m in status.models)
        return waking or any(m.copy for m in status.models) or any(
            i.phase is types.Phase.SERVING and i.role is not types.Role.DECODE for i in status.instances)

    @property
    def busy(self) -> bool:
        return bool(self._orders)

    @property
    def awaited(self) -> list[str]:
        """Workers that have not joined, where they are called, and why if they said so."""
        return [f"{link.instance} at {link.address}" + f" ({link.refused})" * bool(link.refused)
                for link in self.links.values() if not link.joined]

    def check_open(self) -> None:
        """Raises Unavailable when this process leaves: nobody should wait for it any longer."""
        if self.over:
            raise Unavailable("the server shut down")

    def status(self):
        return self.replica.cluster.status()

    def find(self, name: str) -> ServedModel:
        """The model of this name; without a name, the one deployed first. Raises UnknownModel."""
        model = self.models.get(name) if name else next(iter(self.models.values()), None)
        if model is None:
            served = ", ".join(self.models)
            raise UnknownModel(f"no model {name!r} here; served: {served}" if served
                               else "no model is served; `blitzjax deploy MODEL` adds one")
        return model

    def model_for(self, name: str, request_id: str, key: str) -> ServedModel:
        """`find` for a request. A client that comes back asks for the model of its answer, which may be undeployed by now."""
        known = self._orders.model_of(request_id, key)
        return known if known is not None and name in ("", known.name) else self.find(name)

    def context_tokens(self, model: ServedModel) -> int:
        return min(self.config.engine.max_model_len, model.spec.max_len)

    @property
    def page_size(self) -> int:
        """Of the prefix caches that requests are routed by; 0: they are not."""
        engine = self.config.engine
        return engine.page_size if engine.prefix_caching and self.config.serve.prefix_routing else 0

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

    def submit(self, order: Order, resume: bool = False, key: str = "") -> tuple[Answer, ...]:
        """Starts the order's answers, or goes on with those of a client that comes back and may insist on them; it can
        come back with `key`.

        Raises InvalidRequest when its id is in use, Unavailable when there is nothing to `resume` or this process
        begins nothing more, UnknownModel when the model left meanwhile.
        """
        known = self._orders.claim(order, key)
        if known is not None:
            return known
        if self.draining:
            raise Unavailable("the server is shutting down; try another one")
        if resume:
            raise Unavailable("this answer is not known any more; ask again without resume")
        if self._orders.running(order.request_id):
            raise InvalidRequest(f"request id {order.request_id!r} is still running; ids must be unique")
        self.find(order.model)
        first, now = self._orders.next_number, self.now()
        if self.journal is not None:
            self.journal.admitted(now, order, first)
        for event in self.replica.admit(order, first, now):
            self.on_event(event)
        return self._orders.attend(order.request_id, key)

    def leave(self, answers: Sequence[Answer], broken: bool = False) -> None:
        """The stream of an order is over; what still runs of it ends, for nobody waits for it. If it is `broken`, that
        has time until the client comes back.
        """
        request_id = answers[0].order.request_id
        if answers[0] not in self._orders.answers(request_id):
            return  # another stream has them, or the client's id another order
        running = [answer for answer in answers if self._orders.get(answer.request.id) is not None]
        if broken and running and self.resume_s:
            self._orders.await_client(request_id, self.now())
            return
        first, now, delivered = answers[0].request.id, self.now(), not running and self.journal is not None
        if self.journal is not None:
            self.journal.stream_ended(now, first, delivered)
        self._orders.stream_ended(first, delivered, now)
        self._cancel(running)

    def abort(self, request_id: str) -> None:
        self._cancel(self._orders.running(request_id))

    def _cancel(self, answers: Sequence[Answer]) -> None:
        for answer in answers:
            self.on_event(events.RequestCancelled(self.now(), answer.request.id))

    def scale(self, model: str, target: int, live: types.LiveMode | None, source: types.Source | None) -> None:
        self.on_event(events.ScaleRequested(self.now(), target, live, source, model))

    def deploy(self, model: ServedModel, least: int | None, most: int | None) -> None:
        """In the brain and on every worker. What workers said of an earlier model of that name is forgotten."""
        now = self.now()
        self.refusals = {key: said for key, said in self.refusals.items() if key[1] != model.name}
        if self.journal is not None:
            self.journal.deployed(now, str(model.directory), model.name, least, most)
        for event in self.replica.deploy(model, least, most, now):
            self.on_event(event)

    def _remove_gone(self) -> None:
        """Undeployed models of which nothing is left in the brain, whether or not anybody waits for it."""
        for name in [name for name in self.models if name not in self.replica.cluster.models]:
            if self.journal is not None:
                self.journal.removed(self.now(), name)
            self.replica.remove(name)
            self.flush()
            self._changed()

    def _changed(self) -> None:
        for changed in self._watchers:
            changed.set()

    # ---- what workers say

    def heard(self, instance: types.InstanceId, count: int) -> None:
        if self.journal is not None:
            self.journal.heard(instance, count)

    def on_event(self, event: events.Event) -> None:
        """The only way to the brain. A brain that raises has no trustworthy state left: the process ends."""
        try:
            due = [event]
            while due:
                due = [*self._handle(due[0]), *due[1:]]
            self.flush()  # before the links send what was commanded
        except Exception as e:
            if self._broken is None or self._broken.done():
                raise
            self._broken.set_exception(e)

    def _handle(self, event: events.Event) -> list[events.Event]:
        if self._event_log is not None:
            self._event_log.event(event)
        if self.journal is not None:
            self.journal.happened(event)
        due = self.replica.react(event)
        if isinstance(event, events.TransferEnded) and event.error:
            self._load_failed(event)
        self._served = self._served or self.ready
        self._changed()
        return due

    def on_tokens(self, instance: types.InstanceId, said: pb.Tokens | pb.Decoded) -> None:
        now = self.now()
        if self.journal is not None:
            self.journal.said(now, instance, said)
        for event in self.replica.told(instance, said, now):
            self.on_event(event)

    def on_lost(self, instance: types.InstanceId, reason: str) -> None:
        _log.warning("%s lost: %s", instance, reason)
        for event in self.replica.unconfirmed(instance):
            self.on_event(event)
        self.on_event(events.InstanceLost(self.now(), instance, reason))

    def _load_failed(self, event: events.TransferEnded) -> None:
        """Told to the operator; fatal while nothing has ever served, for then it is the checkpoint."""
        _log.error("%s could not load the model: %s", event.instance, event.error)
        if not self._served and self._broken is not None and not self._broken.done():
            self._broken.set_exception(BlitzError(f"the model cannot be loaded: {event.error}"))

    def on_refused(self, instance: types.InstanceId, message: str, model: str = "") -> None:
        if model:
            _log.error("%s cannot serve %s: %s", instance, model, message)
            self.refusals[instance, model] = message
            self._changed()
            return
        _log.error("%s refused to serve: %s", instance, message)
        if self._broken is not None and not self._broken.done() and all(link.refused for link in self.links.values()):
            self._broken.set_exception(BlitzError(f"no worker can serve: {message}"))

    # ---- life

    def begin(self, journal: Journal | None, at: float, resumed: bool, due: Sequence[events.Event] = ()) -> None:
        """Opens the event log and sets the clock. `resumed`: the replica is that of a controller which died; `due` is
        what it had to tell the brain yet.
        """
        self.journal, self._started = journal, time.monotonic() - at
        for link in self.links.values():
            link.outlive("" if journal is None else journal.name, at)
        if self.config.serve.event_log:
            self._event_log = EventLog(Path(self.config.serve.event_log), self.about, resumed)
            self.replica.event_log = self._event_log
        for event in due:
            self.on_event(event)
        if resumed:
            self._served = True  # before, as far as one knows: a load that fails is not the end
            self._orders.await_clients(at)

    async def run(self) -> None:
        """Ticks and talks to workers until cancelled. Raises what broke the brain; BlitzError if no worker serves."""
        self._broken = asyncio.get_running_loop().create_future()
        links = (link.run() for link in self.links.values())
        async with background(*links, self._tick(), _result(self._broken)) as ended:
            await ended

    async def _tick(self) -> None:
        while True:
            self.on_event(events.Ticked(self.now()))
            self._keep()
            await asyncio.sleep(_TICK_S)

    def flush(self) -> None:
        """What was told to the replica can be told again to another one."""
        if self.journal is not None:
            try:
                self.journal.flush()
            except OSError as e:
                _log.error("%s cannot be written, so requests will not survive a crash: %s", self.journal.path, e)
                self.journal.discard()
                self.journal = None
        if self._event_log is not None:
            self._event_log.flush()

    def _keep(self) -> None:
        """All that was heard is written down: workers may forget it. What nobody came back for ends."""
        self.flush()
        for link in self.links.values():
            link.confirm()
        self._remove_gone()
        self._orders.prune(self.now())
        for answers in self._orders.abandoned(self.now()):
            self.leave(answers)
        if self.journal is not None and self.journal.overgrown:
            compact(self.journal, self.now(), self.replica)

    def give_up(self) -> None:
        """Ends what still runs, and whoever waits, with UNAVAILABLE."""
        self.over = True
        self._changed()
        for answer in self._orders:
            self._orders.over(answer)
            answer.fail("UNAVAILABLE", "the server shut down before the answer was complete")

    def close(self) -> None:
        """Closes the logs; nothing is left to resume. AssertionError if the brain is inconsistent."""
        if self.journal is not None:
            self.journal.discard()
            self.journal = None
        if self._event_log is not None:
            self._event_log.close()
            self._event_log = None
        self.replica.cluster.check()


async def _result(future: asyncio.Future[None]) -> None:
    await future


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", required=True, help="i0=HOST:PORT,i1=HOST:PORT,... in rank order")
    parser.add_argument("--model-dir", required=True, type=Path, action="append",
                        help="converted checkpoint (see: blitzjax convert); again for every further model")
    parser.add_argument("--served-model-name", action="append", default=[], metavar="NAME",
                        help="of the --model-dir in the same place (default: the checkpoint's)")
    parser.add_argument("--config", type=Path, help="TOML file")
    parser.add_argument("--config-json", help="the whole configuration as JSON tables; instead of --config")
    parser.add_argument("--journal", type=Path, help="what a crashed controller leaves behind, to be resumed from there")
    parser.add_argument("--socket", type=Path, metavar="PATH",
                        help="also listen on this Unix socket, without TLS, for processes of this machine")
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
        key = access.api_key()
        credentials = access.server_credentials(config.serve.ssl_certfile, config.serve.ssl_keyfile)
        workers = _workers(args.workers)
        models = [load_model(directory, name) for directory, name in _named(args.model_dir, args.served_model_name)]
        controller = with_journal(lambda: Controller(config, models, workers), args.journal)
    except BlitzError as e:
        print(f"blitzjax controller: {e}", file=sys.stderr)
        return 2
    except OSError as e:  # event log or journal
        print(f"blitzjax controller: cannot write {e.filename}: {e.strerror}", file=sys.stderr)
        return 2
    try:
        asyncio.run(serve(controller, key, credentials, args.socket))
    except BlitzError as e:
        print(f"blitzjax controller: {e}", file=sys.stderr)
        return 1
    return 0


def _config(args: argparse.Namespace) -> Config:
    if args.config_json is None:
        return configs.load(args.config, args.set)
    try:
        tables = json.loads(args.config_json)
    except ValueError as e:
        raise ConfigError(f"--config-json is not JSON: {e}") from e
    if not isinstance(tables, dict):
        raise ConfigError("--config-json must be an object of tables")
    return configs.from_tables(tables)


def _named(directories: Sequence[Path], names: Sequence[str]) -> list[tuple[Path, str]]:
    """Each directory with its name; all have the checkpoint's when none is given."""
    if names and len(names) != len(directories):
        raise ConfigError(f"{len(directories)} models have {len(names)} names; give each one, or none")
    return list(zip(directories, names or [""] * len(directories), strict=True))


def _workers(text: str) -> dict[str, str]:
    """"i0=host:port,i1=host:port" -> {"i0": "host:port", ...}."""
    pairs = [item.partition("=") for item in text.split(",") if item]
    workers = {name: address for name, _, address in pairs}
    if not pairs or len(workers) < len(pairs) or not all(name and is_address(address) for name, address in workers.items()):
        raise ConfigError(f"--workers wants i0=HOST:PORT,i1=HOST:PORT,..., got {text!r}")
    return workers


if __name__ == "__main__":
    sys.exit(main())
