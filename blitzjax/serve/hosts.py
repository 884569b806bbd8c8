"""The workers of this machine, and where those of others are.

Invariant: every machine of a cluster computes the same addresses from the same arguments. `blitzjax serve` on the first
machine runs controller and coordination service besides; on the others only workers, which join that service.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from blitzjax.addresses import check_free, host_of, is_here, joined, resolved
from blitzjax.config import Config
from blitzjax.errors import BlitzError, ConfigError
from blitzjax.serve.metrics import endpoint
from blitzjax.serve.processes import Process, say, worker_env
from blitzjax.serve.rundir import RunDir

POLL_S = 0.05
_ASK_S = 2.0  # for the first machine, and between two tries
_PORTS = (20000, 32000)  # below Linux's ephemeral ports: nobody's outgoing connection takes one between two lives


@dataclass(frozen=True, slots=True)
class Launch:
    """Where and how processes start; the default is everything on loopback.

    `hosts[k]` and `prefixes[k]` move worker k to another address, inside another network namespace say; the
    coordination service must then listen on a `coordinator_host` that they reach. Of a cluster on several machines, `here`
    are the workers that start on this one, and every machine is told the same `ports`.
    """

    run_dir: Path | None = None  # logs; None: a temporary directory, which goes with a cluster that nothing happened to
    hosts: tuple[str, ...] = ()
    prefixes: tuple[tuple[str, ...], ...] = ()
    coordinator_host: str = "127.0.0.1"
    ports: tuple[int, ...] = ()  # of the coordination service, then of each worker; (): free ones
    here: range | None = None  # None: all
    leaf: str = ""  # of this machine, see events.InstanceJoined
    env: Mapping[str, str] = field(default_factory=dict)  # for workers, over everything else
    worker: tuple[str, ...] = (sys.executable, "-m", "blitzjax.cli", "worker")
    coordinator: tuple[str, ...] = (sys.executable, "-m", "blitzjax.transfer.coordinator")
    console: bool = False  # the controller writes to our stderr instead of its log


def across(config: Config, hosts: Sequence[str], index: int) -> Launch:
    """How machine `index` of `hosts`, names or addresses, starts its part: the pool is divided evenly, in order.

    A name stays a name, looked up at every connection: a machine may get its address later, or another one when it comes
    back. Raises ConfigError.
    """
    pool, base = config.cluster.pool, config.cluster.base_port
    if not 0 <= index < len(hosts):
        raise ConfigError(f"--host-index must be in [0, {len(hosts) - 1}] with {len(hosts)} --hosts, got {index}")
    if not all(hosts) or len(set(hosts)) < len(hosts):
        raise ConfigError(f"--hosts wants HOST,HOST,..., each of them once, got {','.join(hosts)!r}")
    if pool % len(hosts):
        raise ConfigError(f"a pool of {pool} workers cannot be divided over {len(hosts)} hosts; give --pool a multiple")
    each = pool // len(hosts)
    found = [_address(host) for host in hosts]
    for host, address in zip(hosts, found, strict=True):
        if address is not None and found.index(address) < hosts.index(host):
            raise ConfigError(f"--hosts: {hosts[found.index(address)]} and {host} are the same machine, {address}")
    _check_own(hosts[index], found, index)
    return Launch(hosts=tuple(hosts[k // each] for k in range(pool)), coordinator_host=hosts[0],
                  ports=(base, *(base + 1 + k % each for k in range(pool))),
                  here=range(index * each, (index + 1) * each))


def _address(host: str) -> str | None:
    """None, and told, for a name that has none."""
    try:
        return resolved(host)
    except OSError as e:
        say(f"--hosts: cannot resolve {host} ({e.strerror}); waiting until it has an address")
        return None


def _check_own(host: str, found: Sequence[str | None], index: int) -> None:
    """Raises ConfigError for an address that is another machine's; a name may become ours."""
    own, here = found[index], [k for k, address in enumerate(found) if address is not None and is_here(address)]
    if own is None or index in here:
        return
    hint = f"; --host-index {' or '.join(map(str, here))} is one" if here else ""
    if own == host:
        raise ConfigError(f"--host-index {index} of --hosts is {host}, no address of this machine{hint}")
    say(f"--host-index {index} of --hosts is {host} ({own}), no address of this machine{hint}; waiting until it is")


def check_ports(launch: Launch) -> None:
    """Of a part of a cluster on several machines. Raises BlitzError when it cannot listen where it must."""
    assert launch.here is not None
    wanted = [(launch.hosts[k], launch.ports[k + 1]) for k in launch.here]
    if 0 in launch.here:
        wanted.append((launch.coordinator_host, launch.ports[0]))
    for host, port in wanted:
        with contextlib.suppress(OSError):
            if not is_here(host):
                continue  # it may be, later
            try:
                check_free(joined(host, port))
            except BlitzError as e:
                raise BlitzError(f"{e}; does this command run here already, with this --host-index? cluster.base_port "
                                 "moves all ports of this kind, the same on all hosts") from e


class Workers:
    """Processes of the workers that run here. A supervisor owns them; others hold its lock."""

    def __init__(self, config: Config, launch: Launch, ports: Sequence[int]):
        """`ports` as in Launch. Nothing starts."""
        pool = config.cluster.pool
        self._config, self._launch, self._writes = config, launch, RunDir(launch.run_dir)
        self.run_dir = self._writes.path
        self.coordinator = joined(launch.coordinator_host, ports[0])
        self.addresses = tuple(joined(self._host(k), ports[k + 1]) for k in range(pool))
        here = range(pool) if launch.here is None else launch.here
        self.processes = {k: self._process(k, number, len(here)) for number, k in enumerate(here)}

    def __str__(self) -> str:
        """What starts here, and what is to come from other machines."""
        if len(self.processes) == len(self.addresses):
            return f"{len(self.addresses)} workers"
        here = ", ".join(f"i{k} at {self.addresses[k]}" for k in self.processes)
        others = [host_of(address) for k, address in enumerate(self.addresses) if k not in self.processes]
        return f"workers {here}; others are to come from {', '.join(dict.fromkeys(others))}"

    def tidy(self) -> None:
        """A temporary directory goes, unless a worker started again: then somebody may ask why."""
        if not any(process.lives > 1 for process in self.processes.values()):
            self._writes.remove()

    def _host(self, k: int) -> str:
        return self._launch.hosts[k] if self._launch.hosts else "127.0.0.1"

    def _process(self, k: int, number: int, count: int) -> Process:
        launch, cluster = self._launch, self._config.cluster
        prefix = launch.prefixes[k] if launch.prefixes else ()
        cores = sorted(os.sched_getaffinity(0))
        core = ("--core", str(cores[number % len(cores)])) if cluster.pin_cores else ()
        leaf = (f"--leaf={launch.leaf}",) if launch.leaf else ()
        argv = (*prefix, *launch.worker, "--listen", self.addresses[k], "--rank", str(k), "--world",
                str(cluster.pool), "--coordinator", self.coordinator, *leaf, *core)
        env = worker_env(self._config, number, count) | dict(launch.env)
        return Process(f"worker-{k}", argv, env, self.run_dir / f"worker-{k}.log")


class WorkerHost:
    """What runs on a machine that has neither controller nor coordination service."""

    def __init__(self, config: Config, launch: Launch):
        self.workers = Workers(config, launch, launch.ports)
        self._serve = config.serve
        self._stopping = False

    async def run(self) -> None:
        """Starts the workers, and again what dies, until `stop`. A child's death signal follows the calling thread.

        Raises BlitzError when it cannot listen for probes.
        """
        processes, serve = self.workers.processes.values(), self._serve
        first = asyncio.create_task(self._await_first())
        async with endpoint(lambda: "", self._whole, serve.host, serve.metrics_port):
            while not self._stopping:
                for process in processes:
                    if process.poll():
                        process.tell()
                    process.start_when_due()
                await asyncio.sleep(POLL_S)
            for process in processes:
                process.kill()
        first.cancel()
        self.workers.tidy()

    async def _await_first(self) -> None:
        """Our workers wait for the first machine as long as it takes: whoever started them should know."""
        address, told = self.workers.coordinator, False
        while not await _answers(address):
            if not told:
                say(f"waiting for {address}: the same command must run there, with --host-index 0, --hosts and --pool as here")
            told = True
            await asyncio.sleep(_ASK_S)
        if told:
            say(f"{address} answers now")

    def _whole(self) -> bool:
        return all(process.pid is not None for process in self.workers.processes.values())

    def stop(self) -> None:
        self._stopping = True


async def _answers(address: str) -> bool:
    """Whether something listens there."""
    try:
        async with asyncio.timeout(_ASK_S):
            _, writer = await asyncio.open_connection(host_of(address), address.rpartition(":")[2])
    except OSError:  # TimeoutError is one
        return False
    writer.close()
    return True


def free_ports(count: int) -> list[int]:
    """Distinct TCP ports that nothing listens on now."""
    with contextlib.ExitStack() as held:
        return [_bind(held) for _ in range(count)]


def _bind(held: contextlib.ExitStack) -> int:
    while True:
        port = random.randrange(*_PORTS)
        sock = held.enter_context(socket.socket())
        with contextlib.suppress(OSError):
            sock.bind(("0.0.0.0", port))
            return port
