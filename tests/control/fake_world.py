"""Workers that answer the brain's commands without computing anything: what a real worker does, step by step.

Each worker has an inbox of commands and an outbox of events, both FIFO; nothing is ordered between workers. Time moves
only with `tick`. Tests choose what happens next, `settle` lets everything happen that can.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from blitzjax import commands, events, types as t
from blitzjax.config import Config, EngineConfig, ScaleConfig, ServeConfig
from blitzjax.control.cluster import Cluster
from blitzjax.control.status import InstanceStatus
from blitzjax.types import Phase

SPEC = t.ModelSpec(name="toy", family="llama", layers=4, dim=8, heads=1, kv_heads=1, head_dim=8, ffn_dim=8, vocab=32,
                   max_len=256, rope_theta=1e4, norm_eps=1e-5, tied_embeddings=True, dtype="float32")
SPECS = tuple(replace(SPEC, name=name, layers=layers) for name, layers in (("toy", 4), ("big", 6), ("tiny", 2)))
UNITS = {spec.name: spec.units for spec in SPECS}
PAGES, PAGE_SIZE, SLOTS = 64, 16, 4


def config(**scale: object) -> Config:
    """Manual scaling by default, so that a test says itself when instances come and go."""
    knobs = {"policy": "manual", "min_instances": 1, "max_instances": 8, **scale}
    return Config(serve=ServeConfig(max_queued_requests=40), scale=ScaleConfig(**knobs),
                  engine=EngineConfig(max_model_len=256, max_num_seqs=SLOTS, max_num_batched_tokens=64))


@dataclass(slots=True)
class Job:
    """A transfer as one of its members sees it."""

    ticket: int
    model: str
    chain: t.Chain
    disk: bool
    started: bool
    copy: bool = False


@dataclass(slots=True)
class Worker:
    id: str
    incarnation: int = 0
    up: bool = False
    model: str = ""  # that it is an instance of
    units: int = 0
    copies: dict[str, int] = field(default_factory=dict)  # units of other models, kept in host memory
    jobs: list[Job] = field(default_factory=list)
    requests: dict[str, int] = field(default_factory=dict)  # id → attempt
    answered: set[str] = field(default_factory=set)
    served: set[int] = field(default_factory=set)  # transfers that it went through to the end
    sending: dict[str, str] = field(default_factory=dict)  # request → where its KV goes
    partner: t.LivePair | None = None
    said_drained: bool = False
    inbox: deque[commands.Command] = field(default_factory=deque)
    outbox: deque[events.Event] = field(default_factory=deque)

    def holds(self, model: str) -> int:
        """Units, in an instance or in a copy."""
        return self.units if self.model == model else self.copies.get(model, 0)


class World:
    """A brain and its workers i0, i1, ... on two hosts. `log` keeps every command."""

    def __init__(self, workers: int, config: Config,
                 cluster: Callable[[Config, Sequence[t.ModelSpec]], Cluster] = Cluster,
                 specs: Sequence[t.ModelSpec] = (SPEC,)):
        self.at = 0.0
        self.specs = specs
        self.brain = cluster(config, specs)
        self.workers = {f"i{k}": Worker(f"i{k}") for k in range(workers)}
        self.log: list[commands.Command] = []
        self.open: dict[str, int] = {}  # accepted and not ended → last attempt
        self.ended: dict[str, str] = {}
        self.cancelled: set[str] = set()
        self.disk_fails: set[str] = set()
        self.multicast_fails: set[str] = set()

    # ---- the brain

    def send(self, event: events.Event) -> list[commands.Command]:
        """Gives the brain an event and the workers its commands; checks the brain and every promise about requests."""
        if isinstance(event, events.RequestArrived):
            assert event.request.id not in self.open
            self.open[event.request.id] = 0
        if isinstance(event, events.RequestFinished) and self.open.get(event.request_id) == event.attempt:
            if event.reason != "abort" or event.request_id in self.cancelled:  # else the attempt ended, not the request
                self.end(event.request_id, event.reason)
        orders = self.brain.handle(event)
        self.brain.check()
        for command in orders:
            self.log.append(command)
            self.carry_out(command)
        return orders

    def carry_out(self, command: commands.Command) -> None:
        if isinstance(command, commands.Reject):
            assert command.request_id not in self.cancelled
            self.end(command.request_id, command.code)
            return
        if isinstance(command, commands.Assign):
            assert command.request_id in self.open, "assigned after its end"
            assert command.request_id not in self.cancelled, "assigned after its cancellation"
            self.open[command.request_id] += 1
            assert command.attempt == self.open[command.request_id]
        worker = self.workers[command.instance]
        if worker.up:
            worker.inbox.append(command)
        else:  # a test told the brain of it by hand
            assert self.of(command.instance).phase is not Phase.FAILED, f"to a worker that is gone: {command}"

    def end(self, request_id: str, how: str) -> None:
        assert request_id in self.open, f"{request_id} ended twice: {self.ended.get(request_id)}, {how}"
        del self.open[request_id]
        self.ended[request_id] = how

    def tick(self, seconds: float = 0.5) -> list[commands.Command]:
        self.at += seconds
        return self.send(events.Ticked(self.at))

    def arrive(self, request_id: str, prompt: int = 32, answer: int = 16, priority: int = 0,
               model: str = "toy") -> list[commands.Command]:
        request = t.Request(request_id, model, prompt, answer, self.at, priority)
        return self.send(events.RequestArrived(self.at, request))

    def cancel(self, request_id: str) -> list[commands.Command]:
        self.cancelled.add(request_id)
        return self.send(events.RequestCancelled(self.at, request_id))

    def scale(self, target: int, live: t.LiveMode | None = None, source: t.Source | None = None,
              model: str = "toy") -> list[commands.Command]:
        return self.send(events.ScaleRequested(self.at, target, live, source, model))

    # ---- workers come and go

    def join(self, name: str, units: int = 0, world: bool = True, model: str = "toy",
             copies: Sequence[str] = (), host: str = "", leaf: str = "") -> list[commands.Command]:
        worker = self.workers[name]
        self.workers[name] = worker = Worker(name, worker.incarnation + 1, True, model if units else "", units,
                                             {copy: UNITS[copy] for copy in copies})
        for other in self.workers.values():  # what was on its way to an earlier life of it is decoded on
            other.sending = {request: target for request, target in other.sending.items() if target != name}
        host = host or f"h{int(name[1:]) % 2}"
        orders = self.send(events.InstanceJoined(self.at, name, str(worker.incarnation), host, units, PAGES, PAGE_SIZE,
                                                 SLOTS, worker.model, copies=tuple(copies), leaf=leaf))
        return orders + (self.send(events.WorldJoined(self.at, name)) if world else [])

    def kill(self, name: str) -> list[commands.Command]:
        """The worker and everything that it has not said is gone."""
        self.workers[name] = Worker(name, self.workers[name].incarnation)
        return self.send(events.InstanceLost(self.at, name, "killed"))

    # ---- single steps; each returns whether anything happened

    def deliver(self, name: str, times: int = 1) -> bool:
        """The brain hears the worker's next event, perhaps more than once."""
        outbox = self.workers[name].outbox
        if not outbox:
            return False
        event = replace(outbox.popleft(), at=self.at)
        for _ in range(times):
            self.send(event)
        return True

    def obey(self, name: str) -> bool:
        """The worker carries out its next command."""
        worker = self.workers[name]
        if not worker.inbox:
            return False
        self.execute(worker, worker.inbox.popleft())
        return True

    def execute(self, worker: Worker, command: commands.Command) -> None:
        say = worker.outbox.append
        match command:
            case commands.Assign(request_id=request_id, attempt=attempt):
                worker.answered.discard(request_id)
                worker.sending.pop(request_id, None)
                worker.requests[request_id] = attempt
            case commands.Abort(request_id=request_id):
                if request_id in worker.requests:
                    self.leave(worker, request_id, "abort")
            case commands.Migrate(request_id=request_id, attempt=attempt, target=target):
                if worker.requests.get(request_id) == attempt:
                    worker.sending[request_id] = target
                else:
                    say(events.RequestFailed(self.at, worker.id, request_id, attempt, "its KV is not here any more"))
            case commands.LoadFromDisk(ticket=ticket, start_unit=start, model=model):
                self.become(worker, model)
                assert start == worker.units < UNITS[model]
                worker.jobs.append(Job(ticket, model, t.Chain((worker.id,), start, UNITS[model], 0), True, True))
            case commands.KeepCopy(ticket=ticket, model=model):
                assert worker.model != model
                worker.copies.setdefault(model, 0)
                worker.jobs.append(Job(ticket, model, t.Chain((worker.id,), 0, UNITS[model], 0), True, True, True))
            case commands.UseCopy(ticket=ticket, model=model):
                assert worker.copies[model] == UNITS[model] and not worker.jobs
                self.become(worker, model, worker.copies.pop(model))
                say(events.LayerLoaded(self.at, worker.id, worker.units))
                say(events.TransferEnded(self.at, worker.id, ticket, worker.units, ""))
            case commands.DropCopy(model=model):
                if worker.model == model:  # a part of an instance that it never became
                    assert not worker.requests
                    worker.model, worker.units = "", 0
                worker.copies.pop(model, None)
            case commands.PrepareTransfer(plan=plan):
                chain = next(c for c in plan.chains if worker.id in c.instances)
                if worker.id == chain.instances[0]:
                    assert worker.holds(plan.model) == UNITS[plan.model]
                elif plan.copy:
                    assert worker.model != plan.model
                    worker.copies.setdefault(plan.model, 0)
                else:
                    self.become(worker, plan.model)
                worker.jobs.append(Job(plan.ticket, plan.model, chain, False, False, plan.copy))
                say(events.TransferReady(self.at, worker.id, plan.ticket))
            case commands.StartTransfer(ticket=ticket):
                for job in worker.jobs:
                    job.started |= job.ticket == ticket
            case commands.CancelTransfer(ticket=ticket):
                for job in [j for j in worker.jobs if j.ticket == ticket]:
                    self.leave_transfer(worker, job, "cancelled")
            case commands.StartLive(pair=pair):
                assert worker.partner is None
                worker.partner, worker.said_drained = pair, False
                if pair.old == worker.id:  # it runs its first prompt and leaves the others to the pair
                    for request_id in [r for r in worker.requests if r not in worker.answered][1:]:
                        say(events.RequestReturned(self.at, worker.id, request_id, worker.requests.pop(request_id)))
            case commands.EndLive(pair=pair):
                if worker.partner == pair:
                    worker.partner = None
            case commands.Release(keep=keep):
                assert all(job.model != worker.model for job in worker.jobs)
                if keep:
                    assert worker.units == UNITS[worker.model] and worker.model not in worker.copies
                    worker.copies[worker.model] = worker.units
                worker.model, worker.units, worker.partner = "", 0, None
                worker.requests.clear()
                worker.answered.clear()
                worker.sending.clear()
                say(events.Drained(self.at, worker.id))
            case _:
                raise AssertionError(command)

    def become(self, worker: Worker, model: str, units: int = 0) -> None:
        """It is an instance of `model` from now on; what it had of another one must be gone."""
        assert model not in worker.copies
        if worker.model != model:
            assert not worker.units and not worker.requests
            worker.model, worker.units = model, units

    def leave(self, worker: Worker, request_id: str, reason: t.FinishReason) -> None:
        attempt = worker.requests.pop(request_id)
        worker.answered.discard(request_id)
        worker.sending.pop(request_id, None)
        worker.outbox.append(events.RequestFinished(self.at, worker.id, request_id, attempt, reason))

    def leave_transfer(self, worker: Worker, job: Job, error: str) -> None:
        worker.jobs.remove(job)
        worker.outbox.append(events.TransferEnded(self.at, worker.id, job.ticket, worker.holds(job.model), error))

    def load(self, name: str) -> bool:
        """The worker's transfer gives it one more unit, or ends."""
        worker = self.workers[name]
        job = next((j for j in worker.jobs if j.started), None)
        if job is None:
            return False
        members = [self.workers[i] for i in job.chain.instances]
        if not all(job.ticket in m.served or any(j.ticket == job.ticket and j.started for j in m.jobs)
                   for m in members):
            return False  # the collective waits for somebody
        failing = worker.id in (self.disk_fails if job.disk else self.multicast_fails)
        if failing:
            self.leave_transfer(worker, job, "broken")
        elif worker.holds(job.model) < UNITS[job.model]:
            if job.copy:
                worker.copies[job.model] += 1
            else:
                worker.units += 1
                worker.outbox.append(events.LayerLoaded(self.at, worker.id, worker.units))
        else:
            worker.served.add(job.ticket)
            self.leave_transfer(worker, job, "")
        return True

    def compute(self, name: str) -> bool:
        """The worker's first request gets its first token, or its last; a complete instance only. What was sent to an
        instance that is gone is decoded on.
        """
        worker = self.workers[name]
        request_id = next((r for r in worker.requests
                           if r not in worker.sending or not self.takes_kv(worker, self.workers[worker.sending[r]])), None)
        if request_id is None or worker.units < UNITS[worker.model]:
            return False
        if request_id in worker.answered:
            self.leave(worker, request_id, "length")
        else:
            worker.answered.add(request_id)
            worker.outbox.append(events.PrefillDone(self.at, worker.id, request_id, worker.requests[request_id]))
        return True

    def migrate(self, name: str) -> bool:
        """The worker's first outgoing KV arrives, unless its target is gone."""
        worker = self.workers[name]
        request_id, target = next(((r, self.workers[i]) for r, i in worker.sending.items()
                                   if self.takes_kv(worker, self.workers[i])), (None, worker))
        if request_id is None:
            return False
        del worker.sending[request_id]
        worker.answered.discard(request_id)
        attempt = target.requests[request_id] = worker.requests.pop(request_id)
        target.answered.add(request_id)
        target.outbox.append(events.KVMigrated(self.at, target.id, request_id, attempt))
        return True

    def takes_kv(self, source: Worker, target: Worker) -> bool:
        return target.up and target.model == source.model and target.units == UNITS[target.model]

    def pull(self, name: str, reports: str = "both") -> bool:
        """OLD takes its partner's oldest unanswered request, or says that there is none. `reports`: who tells."""
        old = self.workers[name]
        if old.partner is None or old.partner.old != name or old.said_drained:
            return False
        new = self.workers[old.partner.new]
        if not new.up or new.partner != old.partner:
            return False
        request_id = next((r for r in new.requests if r not in new.answered), None)
        if request_id is None:
            old.said_drained = new.units == UNITS[new.model]
            if old.said_drained:
                old.outbox.append(events.LiveDrained(self.at, name))
            return old.said_drained
        attempt = new.requests.pop(request_id)
        old.requests[request_id] = attempt
        if reports in ("both", "new"):
            new.outbox.append(events.RequestHanded(self.at, new.id, request_id, attempt, name))
        if reports in ("both", "old"):  # the link names the reporter
            old.outbox.append(events.RequestHanded(self.at, name, request_id, attempt, name))
        return True

    # ---- many steps

    def settle(self, rounds: int = 200, compute: bool = False) -> None:
        """Commands, events and transfers happen until nothing is left; with `compute`, requests too."""
        for _ in range(rounds):
            happened = False
            for name in self.workers:
                happened |= self.obey(name) | self.deliver(name) | self.load(name)
                if compute:
                    happened |= self.pull(name) | self.migrate(name) | self.compute(name)
            if not happened:
                return
        raise AssertionError("the world does not settle")

    def exchange(self) -> None:
        """Commands and events only: transfers and requests stand still."""
        while any([self.obey(name) | self.deliver(name) for name in self.workers]):
            pass

    def of(self, name: str) -> InstanceStatus:
        return next(i for i in self.brain.status().instances if i.id == name)

    def phases(self) -> list[Phase]:
        return [i.phase for i in self.brain.status().instances]

    def sent(self, kind: type) -> list[commands.Command]:
        return [c for c in self.log if isinstance(c, kind)]


def pool(workers: int, specs: Sequence[t.ModelSpec] = SPECS[:2], **scale: object) -> World:
    """Joined workers and several models, none of which needs an instance while nobody asks."""
    world = World(workers, config(**{"min_instances": 0, **scale}), specs=specs)
    for k in range(workers):
        world.join(f"i{k}")
    world.settle()
    world.log.clear()
    return world


def copies(world: World, model: str) -> list[str]:
    """Workers that keep bytes of the model in host memory and were not told to drop them."""
    return [w.id for w in world.workers.values() if model in w.copies
            and commands.DropCopy(w.id, model) not in w.inbox]


def whole(world: World, model: str) -> list[str]:
    """Workers that hold every unit of the model, in whatever way."""
    return [w.id for w in world.workers.values() if w.holds(model) == UNITS[model]]


def serving(workers: int, instances: int = 1, **scale: object) -> World:
    """`workers` joined workers, the first `instances` of which hold the model."""
    world = World(workers, config(min_instances=instances, **scale))
    for k in range(workers):
        world.join(f"i{k}", SPEC.units if k < instances else 0)
    world.settle()
    world.log.clear()
    return world
