"""The λScale-like system: receivers with complementary blocks serve together before any of them has the whole model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from blitzjax.arrivals import Arrival
from blitzjax.commands import Command
from blitzjax.events import Event, PrefillDone, TransferEnded
from blitzjax.sim import costs
from blitzjax.sim.outcome import Outcome
from blitzjax.sim.pipelines import rotations
from blitzjax.sim.shell import Setup, simulate
from blitzjax.sim.systems import SYSTEMS

M24 = costs.MODELS["mistral-24b"]
SPREAD = replace(costs.MACHINES["A"], hosts=64, gpus=2)  # one 24B instance a host: every hop crosses the network
BURST = [Arrival(0.5 + 0.001 * k, 1000 + 37 * (k % 11), 20 + k % 7) for k in range(100)]
WHOLE_S = 23.6 * 8 / 100


def run(start: int, instances: int) -> tuple[Outcome, list[Event]]:
    events: list[Event] = []

    def watch(event: Event, commands: list[Command]) -> None:
        events.append(event)

    setup = Setup(SPREAD, M24, SYSTEMS["lambda-scale"], instances, start)
    return simulate(setup, iter(BURST), watch=watch), events


def test_orders_begin_at_equal_shares_of_the_bytes_and_have_every_unit_once() -> None:
    assert rotations((4.0, 2.0, 2.0, 4.0), 2) == [[0, 1, 2, 3], [2, 3, 0, 1]]
    assert rotations((1.0, 1.0), 1) == [[0, 1]]
    orders = rotations(M24.unit_bytes, 3)
    assert all(sorted(order) == list(range(M24.spec.units)) for order in orders)
    assert len({order[0] for order in orders}) == 3


def test_receivers_give_first_tokens_before_any_of_them_is_whole() -> None:
    """Two sources, two targets: the halves are complementary after half of the time that a whole model takes."""
    out, events = run(start=2, instances=4)
    assert out.ended == len(BURST) and out.rejects == 0
    new = {up.instance for up in out.scale_ups}
    assert len(new) == 2 and len({up.ticket for up in out.scale_ups}) == 1
    begun = min(up.start for up in out.scale_ups)
    whole = min(up.stop for up in out.scale_ups)
    assert whole - begun == pytest.approx(WHOLE_S, rel=0.02)
    serving = [e.at for e in events if isinstance(e, TransferEnded) and e.instance in new]
    assert len(serving) == 2
    assert [at - begun for at in serving] == pytest.approx([WHOLE_S / 2] * 2, rel=0.06)
    early = {e.instance for e in events if isinstance(e, PrefillDone) and e.instance in new and e.at < whole}
    assert early == new


def test_with_one_source_nothing_is_complementary_and_receivers_serve_when_they_are_whole() -> None:
    out, events = run(start=1, instances=3)
    stops = {up.instance: up.stop for up in out.scale_ups}
    assert len(stops) == 2 and out.ended == len(BURST)
    assert all(e.at >= stops[e.instance] for e in events if isinstance(e, PrefillDone) and e.instance in stops)


def test_a_prompt_crosses_every_hop_of_its_pipeline_and_every_request_ends_once() -> None:
    """Three sources and three targets, hops that take long: no token is given before two of them are crossed."""
    slow = replace(SPREAD, handoff_s=0.2)
    events: list[Event] = []
    setup = Setup(slow, M24, SYSTEMS["lambda-scale"], 6, 3)
    many = [replace(a, at=a.at / 2) for a in BURST * 2]
    out = simulate(setup, iter(sorted(many, key=lambda a: a.at)), watch=lambda event, commands: events.append(event))
    assert out.ended == len(many) and out.rejects == 0
    new = {up.instance: up.stop for up in out.scale_ups}
    serving = {e.instance: e.at for e in events if isinstance(e, TransferEnded) and e.instance in new}
    early = [e for e in events if isinstance(e, PrefillDone) and e.instance in new and e.at < new[e.instance]]
    assert len(new) == 3 and early
    assert all(e.at - serving[e.instance] > 2 * 0.2 + M24.prefill_s(1000) for e in early)
