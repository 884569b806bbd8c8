"""What a rank remembers of its cliques is bounded, and enough: planner and ranks agree on what can be used."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from blitzjax.commands import PrepareTransfer
from blitzjax.control import transfers as planner
from blitzjax.control.topology import Port, Topology
from blitzjax.control.transfers import Transfers
from blitzjax.errors import TransferError
from blitzjax.transfer import compat, world as worlds
from blitzjax.transfer.world import World

RANKS, GENERATIONS, UNITS = 5, 1 << 30, 6


@pytest.fixture
def met(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of meetings; nobody is waited for, and nothing is sent."""
    names: list[str] = []
    monkeypatch.setattr(compat, "wait_for_ranks", lambda distributed, name, ranks, timeout_s: names.append(name))
    monkeypatch.setattr(World, "_mesh", lambda *_: None)
    yield names


def rank(number: int) -> World:
    world = World("", number, RANKS, "", 1, GENERATIONS, 1.0, 1.0)
    world._devices, world._distributed = {number: []}, object()  # type: ignore[assignment]
    return world


def test_a_generation_that_failed_or_was_followed_is_refused(met: list[str]) -> None:
    world = rank(0)
    for generation, meetings in ((0, 1), (0, 1), (1, 2), (1, 2)):
        world.mesh([0, 1], generation)
        world.meet([0, 1], generation)
        assert len(met) == meetings
    world.retire([0, 1], 0)  # late
    world.meet([0, 1], 1)
    assert len(met) == 2
    world.retire([0, 1], 1)
    for generation in (0, 1):
        with pytest.raises(TransferError, match="failed before"):
            world.mesh([0, 1], generation)
    with pytest.raises(TransferError, match="failed before"):
        world.mesh([1, 0], 1)
    world.mesh([0, 1], 2)
    world.mesh([0, 2], 0)


def test_members_remember_enough_of_whatever_the_planner_forms(met: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert worlds._MAX_SETS >= planner._MAX_CLIQUES
    monkeypatch.setattr(worlds, "_MAX_SETS", 3)
    monkeypatch.setattr(planner, "_MAX_CLIQUES", 3)
    chance, topology = random.Random(0), Topology()
    names = [f"i{k}" for k in range(RANKS)]
    for name in names:
        topology.add(name, Port(name, name, "", 1.0))
    transfers, members = Transfers(topology, GENERATIONS), [rank(k) for k in range(RANKS)]
    used: set[tuple[int, str]] = set()
    for _ in range(1000):
        source, target = chance.sample(range(RANKS), 2)
        (command, *_), _ = transfers.plan("toy", [(names[source], UNITS)], [(names[target], 0)], UNITS, "off")
        assert isinstance(command, PrepareTransfer)
        (chain,) = command.plan.chains
        ranks, told = [source, target], []
        for k in ranks:
            members[k].mesh(ranks, chain.generation)
            met.clear()
            members[k].meet(ranks, chain.generation)
            told.append(tuple(met))
        assert told[0] == told[1], "one would wait for the other"
        assert not used & {(k, name) for k in ranks for name in told[0]}, "a name is good for one meeting"
        used |= {(k, name) for k in ranks for name in told[0]}
        run = transfers.run_of(names[target])
        assert run is not None
        happens = chance.choice(("well", "well", "well", "breaks", "dies", "another planner"))
        match happens:
            case "breaks":
                members[chance.choice(ranks)].retire(ranks, chain.generation)
                transfers.break_off(run)
            case "dies":
                transfers.lose(names[target])
                members[target] = rank(target)
                transfers.joined(names[target], members[target].generation)
                used = {(k, name) for k, name in used if k != target}
        for k in ranks:
            transfers.leave(run, names[k])
        if happens == "another planner":
            transfers = Transfers(topology, GENERATIONS)
            for k, member in enumerate(members):
                transfers.joined(names[k], member.generation)
        assert all(len(member._latest) <= 3 for member in members)
    assert any(member._least > 10 for member in members)
