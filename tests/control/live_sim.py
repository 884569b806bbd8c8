"""Event simulation of one overloaded instance and one loading instance around the real LiveQueue.

Time is in units of one layer's compute. Layer k (0-based) is on NEW at `delay + k * load`, the last one counts `tail`
later: embedding and head come behind it. All batches are queued at 0.
"""

from __future__ import annotations

import heapq
import math

from blitzjax.control.zigzag import Handed, LiveQueue


def live(mode: str, layers: int, load: float, batches: int, delay: float = 0.0, tail: float = 0.0) -> list[float]:
    """Completion time of every batch, in order of arrival, with mode "zigzag" or "best_effort"."""
    return _Pair(mode, layers, load, batches, delay, tail).run()


def alone(layers: int, batches: int) -> list[float]:
    """OLD serves everything."""
    return [layers * (i + 1.0) for i in range(batches)]


def stop_the_world(layers: int, load: float, batches: int, delay: float = 0.0, tail: float = 0.0) -> list[float]:
    """NEW serves whole batches from the shared queue once its last layer is there."""
    free = [0.0, delay + (layers - 1) * load + tail]
    ends = []
    for _ in range(batches):
        side = 0 if free[0] <= free[1] else 1
        free[side] += layers
        ends.append(free[side])
    return ends


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def p95(values: list[float]) -> float:
    """Nearest-rank 95th percentile."""
    return sorted(values)[math.ceil(0.95 * len(values)) - 1]


class _Pair:
    """Both sides of the pair."""

    def __init__(self, mode: str, layers: int, load: float, batches: int, delay: float, tail: float) -> None:
        self.queue: LiveQueue[int] = LiveQueue(layers, mode)
        self.layers = layers
        self.ends = [math.inf] * batches
        self.old_busy = False
        self.new_busy = False
        self.events: list[tuple[float, int, str, int]] = [
            (delay + k * load + tail * (k == layers - 1), 0, "loaded", k + 1) for k in range(layers)]
        for batch in range(batches):
            self.queue.add(batch)

    def run(self) -> list[float]:
        self.arrive_until(0.0)
        self.step_new(0.0)  # NEW begins before OLD's first pull reaches it
        self.pull(0.0)
        while self.events:
            at = self.events[0][0]
            self.arrive_until(at)
            self.pull(at)  # OLD asks ahead of its end, so its pull is there before NEW's next layer begins
            self.step_new(at)
            self.pull(at)
        assert len(self.queue) == 0 and math.inf not in self.ends
        return self.ends

    def arrive_until(self, at: float) -> None:
        """Everything that happens at or before `at`."""
        happened = {"loaded": self.on_loaded, "new": self.on_new, "old": self.on_old}
        while self.events and self.events[0][0] <= at:
            moment, _, kind, value = heapq.heappop(self.events)
            happened[kind](moment, value)

    def step_new(self, at: float) -> None:
        if not self.new_busy and (step := self.queue.next()) is not None:
            self.new_busy = True
            heapq.heappush(self.events, (at + 1, 1, "new", step[0]))

    def pull(self, at: float) -> None:
        if not self.old_busy and isinstance(handed := self.queue.pull(), Handed):
            self.old_busy = True
            heapq.heappush(self.events, (at + self.layers - handed.next_layer, 2, "old", handed.item))

    def on_loaded(self, at: float, layers: int) -> None:
        self.queue.loaded(layers)

    def on_new(self, at: float, batch: int) -> None:
        self.new_busy = False
        if self.queue.ran(batch):
            self.ends[batch] = at

    def on_old(self, at: float, batch: int) -> None:
        self.old_busy = False
        self.ends[batch] = at


def table(layers: int = 30, load: float = 5, batches: int = 24, delays: tuple[float, ...] = (0, 5, 45)) -> str:
    """Mean and p95 completion per mode and delay, for people."""
    lines = [f"L={layers} load={load} N={batches}"]
    for delay in delays:
        rows = {"zigzag": live("zigzag", layers, load, batches, delay),
                "best_effort": live("best_effort", layers, load, batches, delay),
                "stop_the_world": stop_the_world(layers, load, batches, delay), "none": alone(layers, batches)}
        lines += [f"delay {delay:4} {name:15} mean {mean(ends):7.1f} p95 {p95(ends):7.1f} max {max(ends):7.1f}"
                  for name, ends in rows.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
