"""A worker process for the transfer tests: obeys JSON lines on stdin, answers on the original stdout.

gloo prints on stdout, so answers go to a private copy of it. A local jit runs in a thread and counts its steps.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import json
import os
import signal
import sys
import threading
import time

parser = argparse.ArgumentParser()
parser.add_argument("--coordinator", default="")
parser.add_argument("--rank", type=int, default=0)
parser.add_argument("--size", type=int, default=1)
parser.add_argument("--lanes", type=int, default=1)
parser.add_argument("--timeout-s", type=float, default=100.0)  # of a collective
args = parser.parse_args()

faulthandler.register(signal.SIGUSR1)  # where does it hang?
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
os.environ["XLA_FLAGS"] = f"--xla_cpu_collective_timeout_seconds={round(args.timeout_s)}"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from blitzjax.errors import TransferError  # noqa: E402
from blitzjax.transfer.broadcast import Part, Share, prepare  # noqa: E402
from blitzjax.transfer import handoff  # noqa: E402
from blitzjax.transfer.pieces import aligned_empty, digest  # noqa: E402
from blitzjax.transfer.world import World  # noqa: E402

PATIENCE_S = 100.0  # nobody else's silence for less is a failure here
UNIT_BYTES = [300_001, 200_000, 200_000, 200_000, 200_000, 200_000, 64]


class ToySlabs:
    """Random bytes per unit and lane; a receiver's slabs come into being when they are first asked for."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        self.units = 0
        self.lies = -1
        self._slabs: dict[tuple[int, int], np.ndarray] = {}

    def fill(self, units: int, seed: int) -> None:
        self.units = units
        for unit in range(units):
            for lane in range(self.lanes):
                rng = np.random.default_rng([seed, unit, lane])
                self.slab(unit, lane)[:] = rng.integers(0, 256, self.slab_bytes(unit), np.uint8)

    def slab_bytes(self, unit: int) -> int:
        return UNIT_BYTES[unit]

    def slab(self, unit: int, lane: int) -> np.ndarray:
        return self._slabs.setdefault((unit, lane), aligned_empty(self.slab_bytes(unit)))

    def checksum(self, unit: int, lane: int) -> int:
        return digest(self.slab(unit, lane)) ^ (unit == self.lies)

    def commit(self, unit: int, checksums: tuple[int, ...] = ()) -> None:
        assert unit == self.units
        self.units += 1

    def crcs(self) -> list[list[int]]:
        return [[digest(self.slab(u, lane)) for lane in range(self.lanes)] for u in range(self.units)]


def spec(shape: list[int], dtype: str) -> jax.ShapeDtypeStruct:
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype), sharding=here)


def random_array(shape: list[int], dtype: str, seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.dtype(dtype))


class Peer:
    def __init__(self) -> None:
        self.world = World(args.coordinator, args.rank, args.size, "127.0.0.1", args.lanes, 32, PATIENCE_S, PATIENCE_S)
        self.slabs = ToySlabs(args.lanes)
        self.handoff = handoff.HandOff("127.0.0.1", jax.devices())
        self.steps = 0
        self.cancel = threading.Event()
        self.go = threading.Event()

    def serve(self) -> None:
        step = jax.jit(lambda x: jnp.tanh(x @ x))
        x = jnp.eye(16)
        while True:
            x = step(x).block_until_ready()
            self.steps += 1
            time.sleep(0.005)

    def count(self) -> int:
        return self.steps

    def join(self) -> float:
        began = time.perf_counter()
        self.world.join()
        return time.perf_counter() - began

    def leave(self) -> None:
        self.world.leave()

    def fill(self, units: int, seed: int, lies: int = -1) -> list[list[int]]:
        self.slabs = ToySlabs(args.lanes)
        self.slabs.fill(units, seed)
        self.slabs.lies = lies
        return self.slabs.crcs()

    def crcs(self) -> list[list[int]]:
        return self.slabs.crcs()

    def multicast(self, ranks: list[int], generation: int, start: int, stop: int, chunk: int = 65536,
                  pace_s: float = 0.0, hold: int = 0, meet_s: float = PATIENCE_S, part: tuple[int, int] = (0, 1),
                  ring: tuple[int, ...] = (), parts: tuple[int, ...] = (), ring_generation: int = 0) -> dict[str, object]:
        """A source that must `hold` waits before the end of that unit, the first being 1, until told to go on."""
        self.cancel.clear(), self.go.clear()
        self.world.collective_timeout_s = meet_s
        touched: list[int] = []
        asked = itertools.count(1)
        began = time.perf_counter()
        share = Share(Part(*part), tuple(ring), tuple(parts), ring_generation)
        session = prepare(self.world, ranks, generation, args.lanes, chunk, share)
        prepared_s = time.perf_counter() - began

        def on_unit(unit: int) -> None:
            assert unit < self.slabs.units
            touched.append(unit)
            say({"unit": unit})

        def cancelled() -> bool:
            time.sleep(pace_s)
            if next(asked) == hold:
                self.go.wait()
            return self.cancel.is_set()

        reached = session.run(self.slabs, start, stop, on_unit, cancelled)
        return {"reached": reached, "touched": touched, "prepared_s": prepared_s,
                "seconds": time.perf_counter() - began}

    def offer(self, shapes: list[list[int]], dtype: str, seed: int) -> list[object]:
        arrays = [random_array(s, dtype, seed + i) for i, s in enumerate(shapes)]
        offered = self.handoff.offer(arrays)
        return [offered.address, *offered.uuids]

    def take(self, address: str, uuid: int, shapes: list[list[int]], dtype: str, seed: int, timeout_s: float) -> bool:
        arrays = self.handoff.take(address, uuid, [spec(s, dtype) for s in shapes], timeout_s)
        wanted = [random_array(s, dtype, seed + i) for i, s in enumerate(shapes)]
        return all(a.dtype == w.dtype and np.asarray(a).tobytes() == np.asarray(w).tobytes()
                   for a, w in zip(arrays, wanted, strict=True))

    def withdraw(self, uuid: int, timeout_s: float) -> bool:
        handoff._WITHDRAW_TIMEOUT_S = timeout_s
        return self.handoff.withdraw(uuid)


speaking = threading.Lock()


def say(answer: dict[str, object]) -> None:
    with speaking:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> None:
    peer = Peer()
    threading.Thread(target=peer.serve, daemon=True).start()
    work: list[dict] = []
    arrived = threading.Semaphore(0)

    def obey() -> None:  # the one dispatcher thread
        while True:
            arrived.acquire()
            order = work.pop(0)
            try:
                say({"done": getattr(peer, order.pop("op"))(**order)})
            except TransferError as e:
                say({"error": str(e)})

    threading.Thread(target=obey, daemon=True).start()
    for line in sys.stdin:
        order = json.loads(line)
        if order["op"] in ("go", "cancel"):
            if order["op"] == "cancel":
                peer.cancel.set()
            peer.go.set()
        else:
            work.append(order)
            arrived.release()
    os._exit(0)


main()
