"""The ledger of transfers: lanes of a plan break together, and nobody meets in a clique that failed."""

from __future__ import annotations

import itertools

import pytest

from blitzjax.control import transfers as transfers_module
from blitzjax.control.topology import Port, Topology
from blitzjax.control.transfers import Transfers
from blitzjax.commands import CancelTransfer, PrepareTransfer
from blitzjax.types import MulticastPlan, Ring

UNITS = 6
SOURCES, TARGETS = ("s", "t"), ("a", "b")


def two_and_two(max_generations: int) -> Transfers:
    """Two sources in one fast domain, two targets in another."""
    topology = Topology()
    for name in (*SOURCES, *TARGETS):
        host = "h0" if name in SOURCES else "h1"
        topology.add(name, Port(host, host, "", 100.0, 1600.0))
    return Transfers(topology, max_generations)


def prepare(transfers: Transfers) -> tuple[MulticastPlan | None, list[str]]:
    commands, spent = transfers.plan("toy", [(i, UNITS) for i in SOURCES], [(i, 0) for i in TARGETS], UNITS, "off")
    transfers.check()
    return next((c.plan for c in commands if isinstance(c, PrepareTransfer)), None), spent


def leave(transfers: Transfers, *members: str) -> None:
    for member in members:
        run = transfers.run_of(member)
        assert run is not None
        transfers.leave(run, member)
    transfers.check()


def test_lanes_that_failed_form_other_chains_and_another_ring() -> None:
    transfers = two_and_two(max_generations=2)
    first, _ = prepare(transfers)
    assert first is not None and first.rings == (Ring(("a", "b"), 0),)
    run = transfers.run_of("a")
    assert run is not None
    leave(transfers, "a")
    cancelled = transfers.break_off(run)
    assert {c.instance for c in cancelled if isinstance(c, CancelTransfer)} == {"s", "t", "b"}
    assert transfers.break_off(run) == []
    leave(transfers, "s", "t", "b")
    second, spent = prepare(transfers)
    assert second is not None and spent == []
    assert [chain.generation for chain in second.chains] == [1, 1] and second.rings == (Ring(("a", "b"), 1),)


def test_a_ring_that_the_world_has_no_clique_for_takes_its_lanes_with_it() -> None:
    transfers = two_and_two(max_generations=2)
    prepare(transfers)
    for victim in ("a", "b"):  # each is a member of the ring, and of one chain
        transfers.lose(victim)
        leave(transfers, *(i for i in (*SOURCES, *TARGETS) if transfers.busy(i)))
    assert prepare(transfers) == (None, ["a", "b"])


def test_a_ring_that_lost_a_member_is_counted_once() -> None:
    transfers = two_and_two(max_generations=64)
    prepare(transfers)
    transfers.lose("a")
    leave(transfers, "s", "t", "b")
    plan, _ = prepare(transfers)
    assert plan is not None and plan.rings == (Ring(("a", "b"), 1),)


def test_the_ledger_does_not_grow_for_ever_and_forgets_no_clique_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers_module, "_MAX_CLIQUES", 3)
    topology = Topology()
    pool = [f"i{k}" for k in range(5)]
    for name in pool:
        topology.add(name, Port(name, name, "", 1.0))
    transfers = Transfers(topology, max_generations=64)
    formed: set[tuple[frozenset[str], int]] = set()
    dead: set[tuple[frozenset[str], int]] = set()
    for number, (source, target) in enumerate(list(itertools.permutations(pool, 2)) * 3):
        commands, _ = transfers.plan("toy", [(source, UNITS)], [(target, 0)], UNITS, "off")
        assert isinstance(commands[0], PrepareTransfer)
        (chain,) = commands[0].plan.chains
        clique = (frozenset(chain.instances), chain.generation)
        assert clique not in dead and chain.generation < 64
        formed.add(clique)
        if number % 2:
            transfers.lose(target)
            dead |= {other for other in formed if target in other[0]}
        leave(transfers, *(i for i in (source, target) if transfers.busy(i)))
        assert len(transfers._generations) <= 3
