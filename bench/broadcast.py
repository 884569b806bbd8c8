"""How fast do parameters reach 1, 2 and 3 receivers, against a plain TCP copy between the same hosts?

Hosts are network namespaces on 1 Gbit/s links; a second part gives two of them a fast link to each other, and sends
them halves from two sources; a third runs on loopback, where the cores are the limit. Copies and multicasts are
interleaved, between the same buffers; every byte of a multicast is checked, of a copy none. Last line: one JSON object.

A rate is payload bits of one receiver over the time from the source's first send to the last receiver's last byte.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import queue
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench import netns
from bench.result import say

if TYPE_CHECKING:
    import numpy as np

LAYERS = 30  # SmolLM2-135M in bfloat16: 3,540,096 parameters per layer
LAYER_BYTES = 7_080_192
HOSTS = 4
LANES = 1
TIMEOUT_S = 20.0
ROOT = Path(__file__).parents[1]


# ---------------------------------------------------------------------------------------------------------------------
# The worker process: one host


class Layers:
    """Slabs of one host. Memory is allocated and touched once, for the copies and the multicasts alike."""

    def __init__(self, count: int) -> None:
        from blitzjax.transfer.pieces import aligned_empty

        self.units = 0
        self.lanes = LANES
        self.count = count
        self.memory = [aligned_empty(LAYER_BYTES) for _ in range(count)]
        self._checksums: dict[int, int] = {}
        self.fill(os.getpid())

    def fill(self, seed: int) -> None:
        import numpy as np

        rng = np.random.default_rng(seed)
        for slab in self.memory:
            slab[:] = rng.integers(0, 256, LAYER_BYTES, np.uint8)
        self._checksums.clear()

    def slab(self, unit: int, lane: int) -> np.ndarray:
        return self.memory[unit]

    def slab_bytes(self, unit: int) -> int:
        return LAYER_BYTES

    def checksum(self, unit: int, lane: int) -> int:
        from blitzjax.transfer.pieces import digest

        if unit not in self._checksums:
            self._checksums[unit] = digest(self.memory[unit])
        return self._checksums[unit]

    def commit(self, unit: int, checksums: tuple[int, ...] = ()) -> None:
        self.units = unit + 1


class Worker:
    """Obeys one JSON line at a time; times are seconds of the machine's monotonic clock."""

    def __init__(self, coordinator: str, rank: int, host_ip: str, layers: int) -> None:
        from blitzjax.transfer.world import World

        self.world = World(coordinator, rank, HOSTS, host_ip, LANES, 8, TIMEOUT_S, 10.0)
        self.host_ip = host_ip
        self.layers = Layers(layers)
        self.listener = socket.create_server((host_ip, 0))

    def join(self) -> int:
        """The port for plain copies."""
        self.world.join()
        return self.listener.getsockname()[1]

    def fill(self, seed: int) -> None:
        self.layers.fill(seed)

    def multicast(self, ranks: list[int], chunk_target_bytes: int, part: Sequence[int] = (0, 1),
                  ring: Sequence[int] = ()) -> dict[str, float]:
        """Down a chain of `ranks`; with a `ring` of targets, its members bring the parts 0, 1, ..."""
        from blitzjax.transfer.broadcast import Part, Share, chunk_size, prepare

        share = Share(Part(*part), tuple(ring), tuple(range(len(ring))))
        layers = self.layers
        layers.units = layers.count if ranks[0] == self.world.rank else 0
        prepare_s = -time.monotonic()
        session = prepare(self.world, ranks, 0, LANES, chunk_size(LAYER_BYTES, chunk_target_bytes, share.part), share)
        prepare_s += time.monotonic()
        times = [0.0] * layers.count
        began = time.monotonic()

        def on_unit(unit: int) -> None:
            times[unit] = time.monotonic()

        session.run(layers, 0, layers.count, on_unit, lambda: False)
        return {"began": began, "first": times[0], "ended": times[-1], "prepare_s": prepare_s}

    def receive(self, forward: list[tuple[str, int]]) -> dict[str, float]:
        """Plain copy: fills the slabs from one connection and sends each on to `forward`, in a second thread."""
        connection, _ = self.listener.accept()
        ready: queue.SimpleQueue[int] = queue.SimpleQueue()
        senders = self._start_sending(forward, ready)
        with connection:
            for unit, slab in enumerate(self.layers.memory):
                view = memoryview(slab)
                while view:
                    view = view[connection.recv_into(view):]
                ready.put(unit)
            ended = time.monotonic()
        for sender in senders:
            sender.join()
        return {"ended": ended}

    def send(self, targets: list[tuple[str, int]]) -> dict[str, float]:
        """Plain copy to all `targets` at once."""
        began = time.monotonic()
        for sender in self._start_sending(targets, None):
            sender.join()
        return {"began": began}

    def _start_sending(self, targets: list[tuple[str, int]], ready: queue.SimpleQueue[int] | None
                       ) -> list[threading.Thread]:
        threads = [threading.Thread(target=self._send, args=(tuple(target), ready)) for target in targets]
        for thread in threads:
            thread.start()
        return threads

    def _send(self, target: tuple[str, int], ready: queue.SimpleQueue[int] | None) -> None:
        with socket.create_connection(target) as connection:
            for unit in range(self.layers.count):
                connection.sendall(self.layers.memory[unit if ready is None else ready.get()])


def work(coordinator: str, rank: int, host_ip: str, layers: int) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # gloo prints on stdout
    worker = Worker(coordinator, rank, host_ip, layers)
    for line in sys.stdin:
        order = json.loads(line)
        answers.write(json.dumps(getattr(worker, order.pop("op"))(**order)) + "\n")
        answers.flush()
    os._exit(0)


# ---------------------------------------------------------------------------------------------------------------------
# The driver


class Remote:
    """A worker process as the driver sees it."""

    def __init__(self, rank: int, host: netns.Host | None, coordinator: str, layers: int) -> None:
        self.rank = rank
        self.ip = host.ip if host else "127.0.0.1"
        self.port = 0
        argv = [sys.executable, "-m", "bench.broadcast", "--worker", coordinator, str(rank), self.ip, str(layers)]
        self.process = subprocess.Popen(host.command(argv) if host else argv, env=_environment(), cwd=ROOT, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def order(self, op: str, **arguments: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"worker {self.rank} died with exit code {self.process.wait()}")
        return json.loads(line)


@contextlib.contextmanager
def cluster(hosts: Sequence[netns.Host | None], layers: int) -> Iterator[list[Remote]]:
    """One worker per host, joined in one world; the coordinator runs on the first host."""
    first = hosts[0]
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    address = f"{first.ip if first else '127.0.0.1'}:{port}"
    argv = [sys.executable, "-m", "blitzjax.transfer.coordinator", "--address", address, "--size", str(HOSTS)]
    processes = [subprocess.Popen(first.command(argv) if first else argv, env=_environment(), cwd=ROOT, text=True,
                                  stderr=subprocess.DEVNULL)]
    try:
        remotes = []
        for rank, host in enumerate(hosts):
            remotes.append(Remote(rank, host, address, layers))
            processes.append(remotes[-1].process)
        for remote in remotes:
            remote.order("join")
        for remote in remotes:
            remote.port = int(remote.answer())  # type: ignore[call-overload]
        yield remotes
    finally:
        for process in reversed(processes):
            process.kill()
            process.wait()


def copy_s(remotes: Sequence[Remote], chain: bool = False) -> float:
    """Seconds of a plain TCP copy from the first host to all others: at once, or as a chain of stores and forwards."""
    source, *targets = remotes
    for target, following in zip(targets, [*targets[1:], None]):
        target.order("receive", forward=[(following.ip, following.port)] if chain and following else [])
    source.order("send", targets=[(t.ip, t.port) for t in (targets[:1] if chain else targets)])
    ended = max(target.answer()["ended"] for target in targets)
    return ended - source.answer()["began"]


def multicast_s(remotes: Sequence[Remote], chunk_target_bytes: int) -> dict[str, float]:
    """Seconds of a multicast along `remotes`: all of it, until the last host has layer 1, and to prepare."""
    for remote in remotes:
        remote.order("multicast", ranks=[r.rank for r in remotes], chunk_target_bytes=chunk_target_bytes)
    source, *targets = [remote.answer() for remote in remotes]
    return {"seconds": max(t["ended"] for t in targets) - source["began"],
            "first_layer_s": max(t["first"] for t in targets) - source["began"],
            "prepare_s": max(t["prepare_s"] for t in (source, *targets))}


def measure_links(rounds: int, layers: int, chunk_target_bytes: int, rate_mbit: int) -> dict[str, object]:
    """1 → 1, 2, 3 over rate-limited links, against a plain copy 1 → 1, interleaved."""
    bits = layers * LAYER_BYTES * 8
    copies: list[float] = []
    runs: dict[int, list[dict[str, float]]] = {1: [], 2: [], 3: []}
    with netns.hosts(HOSTS, rate_mbit) as hosts, cluster(hosts, layers) as remotes:
        for k in range(rounds):
            copies.append(copy_s(remotes[:2]))
            for receivers, seen in runs.items():
                seen.append(multicast_s(remotes[:receivers + 1], chunk_target_bytes))
            times = ", ".join(f"{seen[-1]['seconds']:.2f}" for seen in runs.values())
            print(f"  round {k + 1}: copy {copies[-1]:.2f} s, multicast to 1, 2, 3 receivers {times} s")
    tcp_gbps = bits / statistics.median(copies) / 1e9
    found = {str(n): _summary(seen, bits, tcp_gbps) for n, seen in runs.items()}
    return {"tcp_gbps": round(tcp_gbps, 3), "receivers": found,
            "time_1to3_over_1to1": round(found["3"]["seconds"] / found["1"]["seconds"], 3)}


def halves_s(chains: Sequence[tuple[Remote, Remote]], chunk_target_bytes: int, sharded: bool) -> float:
    """Seconds until every target has everything: its source sends it all, or a part, and the targets gather the parts."""
    ring = [target.rank for _, target in chains] if sharded else []
    for k, chain in enumerate(chains):
        for remote in chain:
            remote.order("multicast", ranks=[r.rank for r in chain], chunk_target_bytes=chunk_target_bytes,
                         part=(k, len(chains)) if sharded else (0, 1), ring=ring if remote is chain[1] else [])
    answers = [(source.answer(), target.answer()) for source, target in chains]
    return max(target["ended"] for _, target in answers) - min(source["began"] for source, _ in answers)


def measure_sharded(rounds: int, layers: int, chunk_target_bytes: int, rate_mbit: int) -> dict[str, object]:
    """Two sources, two targets with a fast link to each other: two whole chains, then two lanes, interleaved."""
    whole, halves = [], []
    with netns.hosts(HOSTS, rate_mbit) as hosts:
        netns.join(hosts[2], hosts[3])
        with cluster(hosts, layers) as remotes:
            for remote in remotes:
                remote.order("fill", seed=remote.rank // 2)  # sources alike, targets otherwise
            for remote in remotes:
                remote.answer()
            chains = list(zip(remotes[:2], remotes[2:]))
            for k in range(rounds):
                whole.append(halves_s(chains, chunk_target_bytes, sharded=False))
                halves.append(halves_s(chains, chunk_target_bytes, sharded=True))
                print(f"  round {k + 1}: whole {whole[-1]:.2f} s, halves {halves[-1]:.2f} s")
    seconds = {"whole": round(statistics.median(whole), 3), "halves": round(statistics.median(halves), 3)}
    return {"sharded_s": seconds, "sharded_ratio": round(seconds["halves"] / seconds["whole"], 3)}


def measure_loopback(rounds: int, layers: int, chunk_target_bytes: int) -> dict[str, object]:
    """1 → 3 without links: sum over receivers, against a plain copy down the same chain, and one from source to all."""
    bits = layers * LAYER_BYTES * 8 * (HOSTS - 1)
    chains, stars, runs = [], [], []
    with cluster([None] * HOSTS, layers) as remotes:
        multicast_s(remotes, chunk_target_bytes)  # the clique forms, buffers are touched
        for k in range(rounds):
            chains.append(copy_s(remotes, chain=True))
            stars.append(copy_s(remotes))
            runs.append(multicast_s(remotes, chunk_target_bytes)["seconds"])
            print(f"  round {k + 1}: plain chain {chains[-1]:.3f} s, plain to all {stars[-1]:.3f} s, "
                  f"multicast {runs[-1]:.3f} s")
    gbps = {name: round(bits / statistics.median(seen) / 1e9, 2)
            for name, seen in (("tcp_chain", chains), ("tcp_star", stars), ("multicast", runs))}
    return {"loopback_ratio": round(gbps["multicast"] / gbps["tcp_chain"], 3), "loopback_gbps": gbps}


def _summary(seen: list[dict[str, float]], bits: int, tcp_gbps: float) -> dict[str, float]:
    seconds = statistics.median(run["seconds"] for run in seen)
    gbps = bits / seconds / 1e9
    return {"gbps": round(gbps, 3), "ratio": round(gbps / tcp_gbps, 3), "seconds": round(seconds, 3),
            "first_layer_s": round(statistics.median(run["first_layer_s"] for run in seen), 3),
            "first_prepare_s": round(seen[0]["prepare_s"], 3)}


def _environment() -> dict[str, str]:
    """XLA's flag is spelled out as the driver does without jax; `World.required_xla_flags` says the same."""
    return os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "2",
                         "XLA_FLAGS": f"--xla_cpu_collective_timeout_seconds={round(TIMEOUT_S)}"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.broadcast", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=LAYERS, help=f"of {LAYER_BYTES} bytes")
    parser.add_argument("--chunk-bytes", type=int, default=4 << 20, help="target size, as transfer.chunk_bytes")
    parser.add_argument("--rate-mbit", type=int, default=1000, help="of each host's link")
    parser.add_argument("--out", type=Path, help="write the JSON object to this file as well")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        coordinator, rank, host_ip, layers = args.worker
        work(coordinator, int(rank), host_ip, int(layers))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that processes and namespaces are cleaned up
    rounds = 1 if args.quick else args.rounds
    print(f"{args.layers} layers of {LAYER_BYTES / 1e6:.1f} MB, {rounds} rounds, medians")
    if reason := netns.missing():
        print(f"No network namespaces here ({reason}): loopback only, receivers are null")
        result: dict[str, object] = dict.fromkeys(("tcp_gbps", "receivers", "time_1to3_over_1to1", "sharded_s",
                                                   "sharded_ratio"))
    else:
        print(f"{HOSTS} hosts on {args.rate_mbit} Mbit/s links")
        result = measure_links(rounds, args.layers, args.chunk_bytes, args.rate_mbit)
        print("2 sources, 2 targets with a fast link to each other")
        result |= measure_sharded(rounds, args.layers, args.chunk_bytes, args.rate_mbit)
    print(f"{HOSTS} processes on loopback")
    result |= measure_loopback(rounds, args.layers, args.chunk_bytes)
    result |= {"rounds": rounds, "layers": args.layers, "chunk_target_bytes": args.chunk_bytes,
               "machine": f"{os.cpu_count()} cores {platform.machine()}, load {os.getloadavg()[0]:.1f}"}
    say("broadcast", result, argv, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
