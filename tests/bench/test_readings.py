"""How the scale-up bench reads event logs and token times, on readings made by hand."""

from __future__ import annotations

import pytest

from bench import decoding, prompts, readiness
from bench.probe import Sizes
from blitzjax.serve.eventlog import Record
from blitzjax.commands import PrepareTransfer, StartTransfer
from blitzjax.events import LayerLoaded, ScaleRequested, TransferReady
from blitzjax.types import Chain, MulticastPlan


def multicast(ticket: int, at: float, ready: float, layer: float, layers: int) -> list[Record]:
    """Everything ready after `ready` seconds, then one layer each `layer` seconds."""
    plan = MulticastPlan(ticket, "m", (Chain(("i0", "i1"), 0, layers + 2, 0),))
    out = [Record(at, ScaleRequested(at, 2))]
    out += [Record(at, PrepareTransfer(i, plan)) for i in ("i0", "i1")]
    out += [Record(at + ready, TransferReady(at + ready, i, ticket)) for i in ("i0", "i1")]
    out += [Record(at + ready, StartTransfer(i, ticket)) for i in ("i0", "i1")]
    for unit in range(layers):
        loaded = at + ready + (1 + unit) * layer
        out.append(Record(loaded, LayerLoaded(loaded, "i1", unit + 1)))
    return out


def test_ready_is_what_the_bytes_do_not_explain() -> None:
    sizes = Sizes(layers=10, layer_bytes=1000, embed_bytes=8000)
    log = multicast(1, 100.0, 0.12, 0.2, 10) + multicast(2, 200.0, 0.03, 0.1, 10)
    first, second = readiness.load_times(log)
    assert (first.ticket, second.ticket) == (1, 2)
    assert first.bytes_per_s(sizes) == pytest.approx(5000)
    assert first.first_layer_s() == pytest.approx(0.12 + 0.2)
    assert first.ready_s(sizes) == pytest.approx(0.12)
    assert second.ready_s(sizes) == pytest.approx(0.03)
    assert second.prepared - second.requested == pytest.approx(0.03)


def test_gaps_lie_inside_the_window_and_inside_one_answer() -> None:
    times = [[0.0, 1.0, 2.0, 4.0], [0.5, 1.5, 9.0]]
    assert decoding.gaps(times, 0.4, 4.0) == [1.0, 1.0]
    assert decoding.gaps(times, 0.0, 10.0) == [1.0, 1.0, 2.0, 1.0, 7.5]


def test_prompts_are_distinct_exact_and_repeatable() -> None:
    encode = str.encode
    asked = prompts.of_lengths(encode, prompts.mixed_lengths(32, 5), 5)
    assert asked == prompts.of_lengths(encode, prompts.mixed_lengths(32, 5), 5)
    assert [len(p) for p in asked] == prompts.mixed_lengths(32, 5)
    assert len(set(asked)) == 32
    assert max(map(len, asked)) > 512
