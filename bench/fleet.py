"""A cluster under test and what a client sees of it: workers on rate-limited hosts, a watcher, scale-down between rounds.

Everything is measured from outside, through the public API, except for the controller's own event log.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import netns
from blitzjax import config as configs
from blitzjax.errors import BlitzError
from blitzjax.serve.asking import Result
from blitzjax.serve.client import AsyncClient
from blitzjax.serve.local import LocalCluster
from blitzjax.serve.hosts import Launch
from blitzjax.v1 import inference_pb2 as pb

_SUBNET = "10.77.0.0/24"  # of the hosts
_CONTROLLER_IP = "10.77.0.250"  # of this machine on their bridge
_READY_S = 180.0  # a first start compiles every stage
_QUIET_S = 60.0
_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Fleet:
    cluster: LocalCluster
    directory: Path  # logs
    hosts: tuple[netns.Host, ...]  # of the workers; empty: loopback

    @property
    def address(self) -> str:
        return self.cluster.address

    @property
    def event_log(self) -> Path:
        return self.directory / "events.jsonl"

    def spare(self, instance: str) -> None:
        """From now on the network costs the core that `instance` computes on nothing but its own system calls."""
        cores = sorted(os.sched_getaffinity(0))
        own = cores[int(instance.removeprefix("i")) % len(cores)]
        if self.hosts and len(cores) > 1:
            netns.steer(self.hosts, next(core for core in cores if core != own))


@contextlib.contextmanager
def fleet(checkpoint: Path | Sequence[Path], pool: int, rate_mbit: int | None, tables: Mapping[str, Mapping[str, object]]
          ) -> Iterator[Fleet]:
    """`pool` workers, one of them serving, scaled by hand only. `tables` are configuration on top of that.

    With a rate, worker k lives in network namespace k; controller and client are outside, on the same bridge.
    """
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(scratch())
        config = _config(directory, pool, tables)
        launch, hosts = Launch(run_dir=directory), []
        if rate_mbit is not None:
            hosts = stack.enter_context(netns.hosts(pool, rate_mbit))
            _join_bridge(hosts)
            launch = Launch(run_dir=directory, hosts=tuple(h.ip for h in hosts), coordinator_host=_CONTROLLER_IP,
                            prefixes=tuple(tuple(h.command([])) for h in hosts))
        cluster = stack.enter_context(LocalCluster(config, checkpoint, launch))
        cluster.wait_ready(_READY_S)
        _wait_for_pool(cluster, pool)
        yield Fleet(cluster, directory, tuple(hosts))


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A directory that goes with the block; one that fails leaves it, for the logs in it."""
    directory = Path(tempfile.mkdtemp(prefix="blitzjax-bench-"))
    yield directory
    shutil.rmtree(directory)


def _config(directory: Path, pool: int, tables: Mapping[str, Mapping[str, object]]) -> configs.Config:
    default: dict[str, dict[str, object]] = {
        "serve": {"port": 0, "event_log": str(directory / "events.jsonl")},
        "engine": {"prefix_caching": False},  # the same prompts are asked again, to be run again
        "scale": {"policy": "manual", "min_instances": 1, "max_instances": pool},
        "cluster": {"pool": pool, "pin_cores": True, "threads": 1}}
    names = default.keys() | tables.keys()
    return configs.from_tables({name: {**default.get(name, {}), **tables.get(name, {})} for name in names})


def _join_bridge(hosts: Sequence[netns.Host]) -> None:
    """Gives this machine an address among the hosts. Two runs would share the subnet and miss each other's hosts."""
    bridge = hosts[0].namespace.partition("-")[0] + "br"
    taken = subprocess.run(["ip", "route", "show", _SUBNET], check=True, capture_output=True, text=True).stdout
    if taken:
        raise SystemExit(f"another run uses {_SUBNET} ({taken.strip()}); wait until it is over")
    subprocess.run(["ip", "addr", "add", f"{_CONTROLLER_IP}/24", "dev", bridge], check=True, capture_output=True)


def _wait_for_pool(cluster: LocalCluster, pool: int) -> None:
    """Every worker compiled and in the world: what an idle pool is."""
    deadline = time.monotonic() + _READY_S
    with cluster.client() as client:
        while sum(i.in_world and i.phase != "failed" for i in client.status().instances) < pool:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the pool is not complete after {_READY_S:g} s; logs are in {cluster.run_dir}:\n"
                                   f"{client.status()}")
            time.sleep(_POLL_S)


async def settle(client: AsyncClient, target: int) -> None:
    """Returns when `target` instances serve, all others are idle and nothing runs."""
    await client.scale(target, live="off", source="multicast")
    deadline = time.monotonic() + _QUIET_S
    while True:
        status = await client.status()
        phases = sorted(i.phase for i in status.instances)
        quiet = status.running_requests == status.queued_requests == 0
        if quiet and phases.count("serving") == target and phases.count("idle") == len(phases) - target:
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"not {target} instances after {_QUIET_S:g} s: {status}")
        await asyncio.sleep(_POLL_S)


@dataclass(frozen=True, slots=True)
class Sight:
    at_s: float  # time.monotonic when the picture arrived here
    status: pb.ClusterStatus

    def phases(self) -> dict[str, str]:
        return {i.id: i.phase for i in self.status.instances}

    def layers(self, instances: Sequence[str]) -> int:
        """The most layers that one of `instances` has."""
        return max((i.layers_loaded for i in self.status.instances if i.id in instances), default=0)


class Watch:
    """Every picture of the cluster since the watch began."""

    def __init__(self) -> None:
        self.sights: list[Sight] = []

    async def run(self, client: AsyncClient) -> None:
        async for status in client.watch():
            self.sights.append(Sight(time.monotonic(), status))

    def at(self, moment_s: float) -> Sight:
        """What was known at `moment_s`."""
        return next((s for s in reversed(self.sights) if s.at_s <= moment_s), self.sights[0])

    def first(self, serving: int, since_s: float) -> float | None:
        """When `serving` instances served."""
        return next((s.at_s for s in self.sights if s.at_s >= since_s
                     and list(s.phases().values()).count("serving") >= serving), None)


@contextlib.asynccontextmanager
async def watching(address: str) -> AsyncIterator[Watch]:
    """A connection of its own, so that pictures do not wait behind answers."""
    watch = Watch()
    async with AsyncClient(address) as client:
        task = asyncio.create_task(watch.run(client))
        try:
            while not watch.sights and not task.done():
                await asyncio.sleep(_POLL_S)
            yield watch
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, BlitzError):
                await task


@dataclass(frozen=True, slots=True)
class Answer:
    """One request as its client saw it; `result` is None when it failed."""

    sent_s: float
    result: Result | None
    error: str = ""

    @property
    def whole(self) -> Result:
        """Of one that did not fail."""
        assert self.result is not None, self.error
        return self.result

    @property
    def first_token_s(self) -> float:
        return self.sent_s + self.whole.ttft_s

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.result.token_ids if self.result else ()


async def ask(client: AsyncClient, prompt: Sequence[int], max_tokens: int, delay_s: float = 0.0) -> Answer:
    """Greedy, exactly `max_tokens` tokens."""
    await asyncio.sleep(delay_s)
    sent = time.monotonic()
    try:
        return Answer(sent, await client.generate(prompt, max_tokens=max_tokens, temperature=0.0, ignore_eos=True))
    except BlitzError as e:
        return Answer(sent, None, f"{e.code}: {e}")
