"""What a configured worker consists of: per model a store, stages and an engine thread; a loader, a hand-off server,
and its world.

It is an instance of at most one model at a time, the last one that a command to load named; of any other it may keep a
host copy. Invariant: exactly one controller session is attached at a time; events of a worker without one are dropped,
unless it waits to be resumed (sessions.py), since the next one begins with InstanceJoined and all it needs to know.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
import uuid
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jax

from blitzjax import config as configs
from blitzjax import commands, events, types
from blitzjax.engine import messages as m
from blitzjax.engine.checkpoint import with_dtype
from blitzjax.engine.instance import Instance, Output
from blitzjax.engine.loading import Holder, Loader
from blitzjax.engine.memory import common
from blitzjax.engine.params import LayerStore
from blitzjax.engine.stages import Stages
from blitzjax.engine.warmup import run_each
from blitzjax.errors import BlitzError, CheckpointError, ConfigError, TransferError
from blitzjax.serve import codec
from blitzjax.serve.couriers import KVCourier, KVReply
from blitzjax.serve.peers import Peers
from blitzjax.serve.partner_links import OldLink, PartnerLink
from blitzjax.serve.sessions import Outbox, Session
from blitzjax.transfer.handoff import HandOff
from blitzjax.transfer.world import World
from blitzjax.v1 import worker_pb2 as pb

log = logging.getLogger("blitzjax.worker")
_REJOIN_S = 1.0
_LOOKS = 5  # at an engine, until it counts as stuck


@dataclass(frozen=True, slots=True)
class Served:
    """One model that this worker is compiled for. `store` is empty unless it holds the model."""

    configured: str  # model_json of its Configure or deploy
    store: LayerStore
    instance: Instance


class Node:
    """Built by the first Configure; raises BlitzError when that cannot work here."""

    def __init__(self, configure: pb.Configure, args: Namespace):
        self.name = configure.instance
        self.incarnation = uuid.uuid4().hex
        self.config = configs.from_tables(json.loads(configure.config_json))
        self._configured = configure.config_json
        self._session = Session()
        self._deploying = threading.Lock()
        self._undeploys: Counter[str] = Counter()  # of each model, that were asked for
        self._deployments = ThreadPoolExecutor(1, thread_name_prefix="deploy")
        self._addresses = {p.instance: p.address for p in configure.peers}
        self._peers = Peers(self.name, configure.peers)
        self._host, self._leaf, self._core = args.host_ip, args.leaf, args.core
        self._models: dict[str, Served] = {}
        self._holders: dict[str, Holder] = {}
        self._current = ""  # the model that this is an instance of, or was last
        with computing_on(args.core):
            self._devices = _devices(self.config.engine)
        self._handoff = HandOff(args.host_ip, self._devices)
        for model in configure.models:
            self._add(model)
        self.world = World(args.coordinator, args.rank, args.world, args.host_ip, len(self._devices),
                           self.config.cluster.max_world, self.config.transfer.collective_timeout_s,
                           self.config.cluster.heartbeat_s)
        self.loader = Loader(self.name, self.config, self._holders, self.world,
                             {p.instance: p.rank for p in configure.peers}, self._emit)
        threading.Thread(target=self._run, args=(self.loader.run,), name="dispatcher", daemon=True).start()
        threading.Thread(target=self._run, args=(self._join,), name="join", daemon=True).start()
        if self.config.engine.step_timeout_s:
            threading.Thread(target=self._run, args=(self._watch,), name="watchdog", daemon=True).start()

    # ---- models -----------------------------------------------------------------------------------------------------

    def _add(self, model: pb.Model) -> None:
        """Compiles for one model and starts its engine thread. Raises BlitzError, also if another has its name."""
        started = time.monotonic()
        spec = with_dtype(codec.model_spec(model.model_json), self.config.engine.dtype)
        known = self._models.get(spec.name)
        if known is not None:
            if known.configured != model.model_json:
                raise ConfigError(f"{self.name} runs another model or configuration; restart the worker")
            return
        with computing_on(self._core):
            store = LayerStore(spec, self._devices)
            fetch = self._peers.fetch if self.config.engine.share_executables else lambda name: None
            stages = Stages(spec, self.config.engine, store.mesh, fetch=fetch)
        missing = stages.load()
        if missing:
            log.info("%s compiles %d stages for %s, unless others have them", self.name, missing, spec.name)
        with computing_on(self._core):
            stages.compile_all(self._peers.begin)
            scale = self.config.scale
            if scale.roles == "split" or scale.drain_by_moving or store.own_memory and self.config.engine.prefix_caching:
                stages.compile_moves()
            self._peers.close()
            if store.own_memory:
                self._warm(stages)
            checkpoint = Path(model.checkpoint) if model.checkpoint else None
            instance = Instance(self.name, self.config, store, stages, self._handoff,
                                lambda output: self._session.put(encoded(output), lambda: instance.forgetful),
                                lambda partner: self._connect(spec.name, partner), self._send_kv, checkpoint=checkpoint,
                                tokenizer=lambda: self._tokenizer(spec.name))
            threading.Thread(target=self._run, args=(instance.run,), name="engine", daemon=True).start()
        self._holders[spec.name] = Holder(store, checkpoint, lambda: instance.post(m.UnitsArrived()))
        self._models[spec.name] = Served(model.model_json, store, instance)
        log.info("%s is ready for %s in %.2f s: %d stages compiled, %d loaded, %d fetched, for %d x %s", self.name, spec.name,
                 time.monotonic() - started, stages.cache.compiled, stages.cache.loaded, stages.cache.fetched,
                 len(self._devices), self._devices[0].device_kind)

    def _warm(self, stages: Stages) -> None:
        """Not beside another model's instance, whose requests would wait and whose memory is counted."""
        if any(served.store.held_bytes for served in self._models.values()):
            return
        try:
            run_each(stages)
        except jax.errors.JaxRuntimeError as e:
            log.warning("%s did not run all stages of %s once, the first requests will: %s", self.name, stages.spec.name, e)

    def _deploy(self, model: pb.Model, name: str, undeploys: int) -> None:
        """One more model, in a thread of its own: what serves goes on. If it is to go by then, nothing is said."""
        try:
            with self._deploying:
                self._add(model)
        except Exception as e:
            if not isinstance(e, BlitzError):
                log.exception("cannot deploy %s", name)
            message = str(e) if isinstance(e, BlitzError) else repr(e)
            done = pb.WorkerEvent(refused=pb.Refused(instance=self.name, message=message, model=name))
        else:
            done = encoded(events.ModelReady(time.time(), self.name, name))
        self._session.put(done, lambda: self._undeploys[name] != undeploys)

    def _undeploy(self, name: str) -> None:
        """Forgets what was compiled for a model of which nothing is left here."""
        with self._deploying:
            self._drop(name)

    def _drop_all_but(self, configured: Collection[str]) -> None:
        """Others were undeployed while no controller was connected."""
        for name in [name for name, served in self._models.items() if served.configured not in configured]:
            self._drop(name)

    def _drop(self, name: str) -> None:
        self._holders.pop(name, None)
        gone = self._models.pop(name, None)
        if gone is not None:
            gone.instance.post(m.Stop())

    def own_tokenizer(self, model: str) -> bytes | None:
        """Of the checkpoint on this host, if there is one."""
        holder = self._holders.get(model)
        if holder is None or holder.checkpoint is None:
            return None
        path = holder.checkpoint / "tokenizer.json"
        return path.read_bytes() if path.is_file() else None

    def _tokenizer(self, model: str) -> str:
        content = self.own_tokenizer(model) or self._peers.tokenizer(model)
        self._peers.close()
        if content is None:
            raise CheckpointError(f"neither {self.name}'s host nor another worker's has the tokenizer of {model}")
        return content.decode()

    def holdings(self) -> pb.Holdings:
        """What is in memory now."""
        return pb.Holdings(holdings=[
            pb.Holding(model=name, units=served.store.units, bytes=served.store.held_bytes, copy=served.store.is_copy)
            for name, served in list(self._models.items()) if served.store.held_bytes or served.store.units])

    # ---- sessions ---------------------------------------------------------------------------------------------------

    def attach(self, configure: pb.Configure, outbox: Outbox) -> None:
        """A controller takes over. Unless it resumes the session, earlier requests are forgotten, as are parts of copies.

        One that does need not wait for what is being deployed: whatever it deployed, it or its predecessor told the session.
        """
        if configure.config_json != self._configured or configure.instance != self.name:
            raise ConfigError(f"{self.name} runs another model or configuration; restart the worker")
        self._session.claim(configure)
        if not configure.resume:
            with self._deploying:
                self._drop_all_but({model.model_json for model in configure.models})
                for model in configure.models:
                    self._add(model)
        if self._session.connect(configure, outbox, self._renewed) and self.world.joined:
            self._emit(events.WorldJoined(time.time(), self.name))

    def _renewed(self) -> pb.WorkerEvent:
        self._forget_requests()
        copies = []
        for name, served in list(self._models.items()):
            if served.store.is_copy and served.store.units == served.store.spec.units:
                copies.append(name)
            elif served.store.is_copy:
                self.loader.post(commands.DropCopy(self.name, name))
        engine, current = self.config.engine, self._models.get(self._current)
        room = common([s.instance.room for s in list(self._models.values())], engine)
        units = current.store.units if current is not None and not current.store.is_copy else 0
        return codec.encode_event(events.InstanceJoined(
            time.time(), self.name, self.incarnation, self._host, units, room.pages, engine.page_size,
            room.slots, self._current if units else "", tuple(self._models), tuple(copies),
            self.world.generation, self._leaf))

    def detach(self, outbox: Outbox) -> None:
        """The connection broke: work goes on for a while, for a controller that resumes the session."""
        connection = self._session.disconnect(outbox)
        if connection is None:
            return
        if not self._session.resumable:
            self._give_up(connection)
            return
        timer = threading.Timer(self.config.serve.resume_timeout_s, self._give_up, (connection,))
        timer.daemon = True
        timer.start()

    def _give_up(self, connection: int) -> None:
        self._session.end(connection, self._forget_requests)

    def _forget_requests(self) -> None:
        for served in list(self._models.values()):
            served.instance.forget_requests()

    def take(self, command: pb.WorkerCommand, outbox: Outbox) -> None:
        """What is slow comes first: the session is locked while it takes a command, and an engine cannot say anything."""
        work = command.assign.work
        if work.sampling.grammar and work.request.model in self._models:
            self._models[work.request.model].instance.prepare(work.sampling.grammar)
        self._session.take(outbox, command, lambda: self._told(command))

    def _told(self, command: pb.WorkerCommand) -> None:
        match command.WhichOneof("command"):
            case "deploy":
                name = codec.model_spec(command.deploy.model_json).name
                self._deployments.submit(self._deploy, command.deploy, name, self._undeploys[name])
            case "undeploy":
                self._undeploys[command.undeploy.model] += 1
                self._deployments.submit(self._undeploy, command.undeploy.model)
            case _:
                self.obey(codec.decode_command(command, self.name))

    def obey(self, command: commands.Command | types.Work) -> None:
        match command:
            case (commands.PrepareTransfer(plan=types.MulticastPlan(ticket=ticket, model=model))
                  | commands.LoadFromDisk(ticket=ticket, model=model) | commands.UseCopy(ticket=ticket, model=model)
                  | commands.KeepCopy(ticket=ticket, model=model)) if model not in self._models:
                self._emit(events.TransferEnded(time.time(), self.name, ticket, 0, f"{model} is not here"))
            case commands.PrepareTransfer(plan=plan):
                chain = next(c for c in plan.chains if self.name in c.instances)
                if chain.instances[0] != self.name and not plan.copy:
                    self._current = plan.model
                self.loader.post(command)
            case commands.LoadFromDisk(model=model) | commands.UseCopy(model=model):
                self._current = model
                self.loader.post(command)
            case commands.StartTransfer() | commands.CancelTransfer() | commands.KeepCopy() | commands.DropCopy():
                self.loader.post(command)
            case types.Work():
                self._models[command.request.model].instance.post(command)
            case _ if self._current in self._models:
                self._models[self._current].instance.post(command)

    def partnered(self, partner: pb.Partner, outbox: Outbox) -> OldLink:
        old = OldLink(partner.instance, partner.model, outbox)
        self._tell(old.model, m.Partnered(old))
        return old

    def obey_partner(self, old: OldLink, command: pb.WorkerCommand) -> None:
        match command.WhichOneof("command"):
            case "pull":
                self._tell(old.model, m.Pulled(old, command.pull.seq))
            case "taken":
                self._tell(old.model, m.Taken(old, command.taken.seq))
            case "loan":
                self._tell(old.model, m.Lent(old, codec.decode(m.Loan, command.loan)))

    def partner_left(self, old: OldLink) -> None:
        self._tell(old.model, m.PartnerLost(old))

    def kv_offered(self, message: pb.KVOffer, outbox) -> m.KVOffer:
        offer = codec.decode(m.KVOffer, message)
        self._models[offer.work.request.model].instance.post(m.KVOffered(offer, KVReply(outbox)))
        return offer

    def kv_withdrawn(self, offer: m.KVOffer) -> None:
        self._tell(offer.work.request.model, m.KVWithdrawn(offer))

    def _tell(self, model: str, message: object) -> None:
        """What another worker says of a model; one that was undeployed meanwhile has nobody to tell."""
        served = self._models.get(model)
        if served is not None:
            served.instance.post(message)

    # ---- threads ----------------------------------------------------------------------------------------------------

    def _run(self, loop: Callable[[], None]) -> None:
        """A bug in a loop that others wait for must not leave a worker that looks alive: the process ends and is restarted.
        """
        try:
            loop()
        except BaseException:
            log.exception("%s: its %s thread died", self.name, threading.current_thread().name)
            logging.shutdown()
            os._exit(1)

    def _watch(self) -> None:
        """Raises BlitzError when an engine is stuck: such a worker answers pings, so nobody else would notice.

        Only looks count that found the same turn, one after the other, each after its full time: a process that was
        stopped has not been stuck meanwhile.
        """
        limit_s = self.config.engine.step_timeout_s
        looks: dict[str, tuple[int, int]] = {}  # model → its turn, looks that found it
        while True:
            time.sleep(limit_s / _LOOKS)
            for name, served in list(self._models.items()):
                turn, count = looks.get(name, (-1, 0))
                engine = served.instance
                count = count + 1 if engine.turns == turn and not engine.rests else 0
                looks[name] = engine.turns, count
                if count == _LOOKS:
                    raise BlitzError(f"a step of {name} has taken more than {limit_s:g} s")

    def _join(self) -> None:
        while not self.world.joined:
            try:
                self.world.join()
            except TransferError as e:
                log.warning("%s; trying again", e)
                time.sleep(_REJOIN_S)
        self._emit(events.WorldJoined(time.time(), self.name))

    def _emit(self, output: Output) -> None:
        self._session.put(encoded(output))

    def _connect(self, model: str, partner: types.InstanceId) -> PartnerLink:
        return PartnerLink(self._addresses[partner], self.name, partner, model, self._models[model].instance.post)

    def _send_kv(self, target: types.InstanceId, offer: m.KVOffer) -> KVCourier:
        return KVCourier(self._addresses[target], offer, self._models[offer.work.request.model].instance.post)


def encoded(output: Output) -> pb.WorkerEvent:
    event = pb.WorkerEvent()
    match output:
        case m.Tokens():
            codec.fill(event.tokens, output)
        case m.Decoded():
            codec.fill(event.decoded, output)
        case _:
            return codec.encode_event(output)
    return event


@contextlib.contextmanager
def computing_on(core: int | None) -> Iterator[None]:
    """Threads that start inside, XLA's too, run on `core` alone; None changes nothing."""
    before = os.sched_getaffinity(0)
    if core is not None:
        os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _devices(engine: configs.EngineConfig) -> list[jax.Device]:
    """GPUs reserve their share of memory here, unless the environment says otherwise under the old name or the new."""
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", f"{engine.memory_fraction:g}")
    devices, count = jax.local_devices(), engine.tensor_parallel
    if len(devices) < count:
        raise ConfigError(f"engine.tensor_parallel is {count} but this worker has {len(devices)} {devices[0].platform} "
                          f"device(s); on CPU set XLA_FLAGS=--xla_force_host_platform_device_count={count}")
    return devices[:count]
