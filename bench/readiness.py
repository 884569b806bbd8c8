"""How soon does a chosen pool worker compute? Scale command to first layer usable, less what the bytes themselves take.

Read from the controller's event log, so all times are of one clock and include the way of the events to it:

    ScaleRequested ... StartTransfer ... LayerLoaded(1: first layer) ... LayerLoaded(L: last layer)
    |------------ first layer usable --------------|-- steady rate, L - 1 layers --|

    ready = first layer usable - first layer's bytes / steady rate
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench import figures, fleet
from bench.probe import Sizes
from blitzjax.serve import eventlog
from blitzjax.serve.client import AsyncClient
from blitzjax.serve.eventlog import Record
from blitzjax.commands import PrepareTransfer, StartTransfer
from blitzjax.events import LayerLoaded, ScaleRequested, TransferReady


@dataclass(slots=True)
class LoadTimes:
    """One multicast, in seconds of the controller's clock. `loaded[n]`: the first receiver holds n units."""

    ticket: int
    requested: float
    prepared: float = 0.0  # the last TransferReady
    started: float = 0.0  # StartTransfer
    loaded: dict[int, float] = field(default_factory=dict)

    def bytes_per_s(self, sizes: Sizes) -> float:
        return (sizes.layers - 1) * sizes.layer_bytes / (self.loaded[sizes.layers] - self.loaded[1])

    def first_layer_s(self) -> float:
        return self.loaded[1] - self.requested

    def ready_s(self, sizes: Sizes) -> float:
        return self.first_layer_s() - sizes.layer_bytes / self.bytes_per_s(sizes)


async def exercise(address: str, rounds: int) -> None:
    """Scale-ups 1 → 2 and back, with nobody waiting."""
    async with AsyncClient(address) as client:
        for _ in range(rounds):
            await fleet.settle(client, 1)
            await client.scale(2, source="multicast", wait=True, timeout_s=60)
        await fleet.settle(client, 1)


def load_times(records: Iterable[Record]) -> Iterator[LoadTimes]:
    """Every multicast of a log, in the order in which they began."""
    requested, current = 0.0, None
    for record in records:
        match record.item:
            case ScaleRequested(at):
                requested = at
            case PrepareTransfer(_, plan):
                if current is None or current.ticket != plan.ticket:
                    if current is not None:
                        yield current
                    current = LoadTimes(plan.ticket, requested)
            case TransferReady(at, _, ticket) if current is not None and ticket == current.ticket:
                current.prepared = at
            case StartTransfer() if current is not None:
                current.started = record.at
            case LayerLoaded(at, _, units) if current is not None:
                current.loaded.setdefault(units, at)
    if current is not None:
        yield current


def report(log: Path, rounds: int, sizes: Sizes) -> dict[str, object]:
    """Of the first `rounds` multicasts in the log; the very first one of a cluster is shown apart as well."""
    seen = [t for t in load_times(eventlog.read(log)) if sizes.layers in t.loaded][:rounds]
    if not seen:
        return {"ready_ms": None}
    ready = [t.ready_s(sizes) * 1e3 for t in seen]
    for k, (times, ms) in enumerate(zip(seen, ready, strict=True)):
        print(f"  scale-up {k + 1}: prepared after {(times.prepared - times.requested) * 1e3:.0f} ms, first layer usable "
              f"after {times.first_layer_s() * 1e3:.0f} ms, of which {sizes.layer_bytes / 1e6:.1f} "
              f"MB at {times.bytes_per_s(sizes) * 8 / 1e6:.0f} Mbit/s; ready in {ms:.0f} ms")
    return {"ready_ms": figures.rounded(statistics.median(ready)), "ready": {
        "first_ms": figures.rounded(ready[0]), "rounds_ms": [figures.rounded(ms) for ms in ready],
        "prepared_ms": _median_ms([t.prepared - t.requested for t in seen]),
        "first_layer_usable_ms": _median_ms([t.first_layer_s() for t in seen])}}


def _median_ms(seconds: list[float]) -> float:
    return figures.rounded(statistics.median(seconds) * 1e3)
