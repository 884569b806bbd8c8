"""One run: a trace through the brain of the live cluster, with simulated instances and a virtual clock.

Several models have the same costs and share the pool. Those that no instance serves at the beginning have their one
host copy then, evenly spread, if the system keeps such copies.

Invariant: every arrival ends once, answered or rejected, and the same arguments give the same run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import assert_never

from blitzjax.arrivals import Arrival
from blitzjax.config import ClusterConfig, Config, EngineConfig, ScaleConfig, ServeConfig
from blitzjax.control.cluster import Cluster
from blitzjax.sim.clock import Clock
from blitzjax.sim.costs import MachineCosts, ModelCosts, bytes_per_s
from blitzjax.sim.hosts import Fleetports, HostCopies
from blitzjax.sim.instance import SimInstance
from blitzjax.sim.links import Fabric
from blitzjax.sim.loading import Loading
from blitzjax.sim.outcome import Outcome
from blitzjax.sim.systems import System
from blitzjax.commands import (
    Abort, Assign, CancelTransfer, Command, DropCopy, EndLive, KeepCopy, LoadFromDisk, Migrate, PrepareTransfer,
    Reject, Release, StartLive, StartTransfer, UseCopy,
)
from blitzjax.events import (
    Drained, Event, InstanceJoined, PrefillDone, RequestArrived, RequestFinished, Ticked, WorldJoined,
)
from blitzjax.types import InstanceId, ModelSpec, Request, Roles


@dataclass(frozen=True, slots=True)
class Setup:
    """What runs where. `instances` is the size of the pool, `start` how many of them serve each model at the beginning;
    0: none, and none again when nobody has asked for `scale.zero_after_s`.
    """

    machine: MachineCosts
    model: ModelCosts
    system: System
    instances: int
    start: int = 1
    down_after_s: float = 0.333  # the authors' scale-down window for the 8B and 24B models
    tick_s: float = 0.05
    roles: Roles = "mixed"
    decode_share: float = 0.375  # split roles: of a fixed provision; the authors' 3 of 8, 6 of 16
    scale: ScaleConfig = ScaleConfig()  # policy knobs that nothing else here says
    most: int | None = None  # instances that may hold one model; None: all
    models: int = 1

    @property
    def specs(self) -> tuple[ModelSpec, ...]:
        spec = self.model.spec
        names = [spec.name] if self.models == 1 else [f"{spec.name}-{k}" for k in range(self.models)]
        return tuple(replace(spec, name=name) for name in names)

    @property
    def serving(self) -> int:
        """Instances that hold each model when the run begins. With split roles `start` of each kind."""
        share, split = self.system.share, self.roles == "split"
        if share is None:
            return self.start * (1 + split)
        return max(1 + split, round(self.instances * share) // self.models)

    @property
    def decoding(self) -> int:
        """How many of these decode."""
        if self.roles == "mixed":
            return 0
        return self.start if self.system.share is None else max(1, round(self.serving * self.decode_share))


def config_of(setup: Setup) -> Config:
    """The configuration of the live cluster that this setup means."""
    model, system, n = setup.model, setup.system, setup.serving
    most = (setup.most or setup.instances) if system.share is None else n
    return Config(
        serve=ServeConfig(max_queued_requests=1 << 30),
        engine=EngineConfig(max_model_len=model.spec.max_len, max_num_seqs=model.slots,
                            max_num_batched_tokens=model.step_tokens, page_size=model.page_size,
                            kv_pages=model.kv_tokens // model.page_size, answer_share=1.0,
                            tensor_parallel=model.tensor_parallel),
        scale=replace(setup.scale, policy="auto", min_instances=n - setup.decoding, max_instances=most,
                      live=system.live, source=system.source, forecast_s=system.forecast_s,
                      drain_by_moving=system.drain_by_moving,
                      prefill_tokens_per_s=model.prefill_tokens_per_s,
                      down_after_s=setup.down_after_s, roles=setup.roles, min_decode=max(1, setup.decoding),
                      host_copies=system.source != "disk",
                      migrate_tokens_per_s=setup.model.tensor_parallel * bytes_per_s(setup.machine.nic_gbps)
                      / model.kv_token_bytes),
        cluster=ClusterConfig(pool=setup.instances, max_world=1 << 30))


def simulate(setup: Setup, arrivals: Iterator[Arrival],
             progress: Callable[[float, int], None] = lambda at_s, ended: None,
             watch: Callable[[Event, list[Command]], None] | None = None) -> Outcome:
    """Runs until the last request ended. `progress(virtual seconds, requests ended)` is called every virtual minute,
    `watch(event, commands)` with all that the brain hears and says."""
    return _Run(setup, arrivals, progress, watch).run()


class _Run:
    def __init__(self, setup: Setup, arrivals: Iterator[Arrival],
                 progress: Callable[[float, int], None],
                 watch: Callable[[Event, list[Command]], None] | None) -> None:
        self.setup = setup
        self._arrivals, self._progress, self._watch = iter(arrivals), progress, watch
        self._config = config_of(setup)
        self._clock = Clock()
        self._ports = Fleetports(setup.machine, setup.model.tensor_parallel)
        self._specs = setup.specs
        self._names = [f"i{k:04}" for k in range(setup.instances)]
        for number, name in enumerate(self._names):
            self._ports.add(name, number)
        self._brain = Cluster(self._config, self._specs, {name: self._ports.port(name) for name in self._names})
        self._copies = HostCopies(setup.system.host_ttl_s)
        self._instances: dict[InstanceId, SimInstance] = {}
        self._fabric = Fabric(self._clock)
        self._loading = Loading(self._clock, self._fabric, setup.machine, setup.model, self._ports, self._copies,
                                self._instances, self._report, self._is_whole, setup.system.scatter)
        self._whole: Counter[str] = Counter()  # model → instances that have all of it
        self._requests: dict[str, Request] = {}  # arrived and not ended
        self._exhausted = False  # no further arrivals
        self.outcome = Outcome(setup)

    def run(self) -> Outcome:
        spread = self._spread_copies()
        for number, name in enumerate(self._names):
            self._join(name, number, spread.get(name, []))
        self._arrive_next(0)
        self._tick()
        self._clock.run()
        assert not self._requests, f"{len(self._requests)} requests never ended"
        for instance in self._instances.values():
            instance.check()
        self._brain.check()
        self.outcome.close(self._clock.now, self._ports.links())
        return self.outcome

    # ---- what happens

    def _spread_copies(self) -> dict[InstanceId, list[str]]:
        """Instance → models that it keeps when the run begins."""
        spread: dict[InstanceId, list[str]] = {}
        if self.setup.serving or not self._config.scale.host_copies:
            return spread
        on_host: dict[str, list[InstanceId]] = {}
        for name, ports in self._ports.of.items():
            on_host.setdefault(ports.host, []).append(name)
        hosts = list(on_host.values())
        for number, spec in enumerate(self._specs):
            turn, host = divmod(number, len(hosts))
            keeper = hosts[host][turn % len(hosts[host])]
            spread.setdefault(keeper, []).append(spec.name)
            self._copies.keep(spec.name, keeper)
        return spread

    def _join(self, name: InstanceId, number: int, keeps: list[str]) -> None:
        setup, ports = self.setup, self._ports.of[name]
        instance = SimInstance(name, self._config, setup.model, self._clock, self._report, self._instances.__getitem__,
                               self._send_rows, self._send_kv, setup.machine.rpc_s,
                               setup.model.unit_bytes[setup.model.spec.embed_unit] / ports.ssd.capacity)
        self._instances[name] = instance
        if number < setup.serving * setup.models:
            instance.units, instance.model = setup.model.spec.units, self._specs[number % setup.models].name
            self._copies.hold(ports.host, instance.model)
            self._whole[instance.model] += 1
            self.outcome.occupy(name, 0.0)
        engine = self._config.engine
        self._handle(InstanceJoined(0.0, name, "1", ports.host, instance.units, engine.kv_pages, engine.page_size,
                                    engine.max_num_seqs, instance.model, copies=tuple(keeps)))
        self._handle(WorldJoined(0.0, name))

    def _arrive_next(self, number: int) -> None:
        arrival = next(self._arrivals, None)
        if arrival is None:
            self._exhausted = True
        else:
            self._clock.at(arrival.at, self._arrived, number, arrival)

    def _arrived(self, number: int, arrival: Arrival) -> None:
        now = self._clock.now
        name = f"r{number}"
        request = Request(name, self._specs[arrival.model].name, arrival.prompt_tokens, arrival.answer_tokens, now)
        self._requests[name] = request
        if not self._whole[request.model]:
            self.outcome.came_cold(name)
        self._handle(RequestArrived(now, request))
        self._arrive_next(number + 1)

    def _tick(self) -> None:
        now = self._clock.now
        self._handle(Ticked(now))
        if self.outcome.sample_is_due(now):
            hosts = list(dict.fromkeys(ports.host for ports in self._ports.of.values()))
            copies = self._copies.count(hosts, [spec.name for spec in self._specs], now)
            self.outcome.sample(now, copies, len(self._requests))
            if round(now) % 60 == 0:
                self._progress(now, self.outcome.ended)
        if not self._exhausted or self._requests:
            self._clock.after(self.setup.tick_s, self._tick)

    def _report(self, event: Event) -> None:
        """Something that an instance says."""
        match event:
            case PrefillDone(at=at, request_id=request_id):
                self.outcome.first_token(request_id, at)
            case RequestFinished(at=at, request_id=request_id, reason="length"):
                self.outcome.finished(self._requests.pop(request_id), at)
            case Drained(at=at, instance=name):
                self.outcome.vacate(name, at)
                model = self._instances[name].model
                self._whole[model] -= 1
                self._copies.leave(self._ports.of[name].host, model, at)
        self._handle(event)

    def _is_whole(self, name: InstanceId, ticket: int) -> None:
        self._whole[self._instances[name].model] += 1
        self.outcome.loaded(name, ticket, self._clock.now)

    def _send_rows(self, source: InstanceId, target: InstanceId, tokens: int) -> float:
        """Of a prompt, between live partners: → seconds until they are there. They are few beside parameters, so they
        do not take part in sharing.
        """
        size, route = 2.0 * tokens * self.setup.model.spec.dim, self._ports.route(source, target)
        for link in route:
            link.carried += size
        return self.setup.machine.handoff_s + size / min(link.capacity for link in route)

    def _send_kv(self, source: InstanceId, target: InstanceId, tokens: float,
                 then: Callable[[], None]) -> Callable[[], None]:
        """Shares the ports with whatever else moves. → how to stop it."""
        size = tokens * self.setup.model.kv_token_bytes
        flow = self._fabric.begin(self._ports.route(source, target), [size], lambda mark: then())
        return lambda: self._fabric.stop(flow)

    # ---- the brain

    def _handle(self, event: Event) -> None:
        commands = self._brain.handle(event)
        if self._watch is not None:
            self._watch(event, commands)
        if commands:
            for command in commands:
                if isinstance(command, (PrepareTransfer, LoadFromDisk, UseCopy)):  # X | Y would be made each time
                    self.outcome.scaling(command, self._clock.now)
            self._clock.after(self.setup.machine.rpc_s, self._deliver, commands)

    def _deliver(self, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case Assign(instance=name, request_id=request_id, attempt=attempt):
                    self._instances[name].assign(self._requests[request_id], attempt)
                case Release(instance=name, keep=True):
                    self._keep(name, command)
                case Abort() | Migrate() | StartLive() | EndLive() | Release():
                    self._instances[command.instance].obey(command)
                case PrepareTransfer() | StartTransfer() | LoadFromDisk() | KeepCopy() | UseCopy() | DropCopy():
                    self._loading.obey(command)
                case Reject(request_id=request_id):
                    self.outcome.rejected(self._requests.pop(request_id))
                case CancelTransfer():
                    raise AssertionError("no transfer breaks here")
                case _:
                    assert_never(command)

    def _keep(self, name: InstanceId, release: Release) -> None:
        """What the model's last instance has goes into its host's memory before it is one no more."""
        instance = self._instances[name]
        self._copies.keep(instance.model, name)
        self._fabric.begin([self._ports.of[name].pcie], [self.setup.model.param_bytes],
                           lambda mark: instance.obey(release))
