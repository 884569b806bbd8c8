from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from blitzjax.control import multicast
from blitzjax.control.topology import Topology

UNITS = 6


def topology(**hosts: str) -> Topology:
    """instance="host" or "host@gbps"."""
    built = Topology()
    for instance, place in hosts.items():
        host, _, gbps = place.partition("@")
        built.add(instance, host, float(gbps or 100))
    return built


def chains(top: Topology, sources: dict[str, int], targets: dict[str, int]) -> list[tuple[str, ...]]:
    plan = multicast.plan(7, "toy", [*sources.items()], [*targets.items()], top, UNITS, lambda members: 0)
    assert plan.ticket == 7 and plan.model == "toy"
    return [c.instances for c in plan.chains]


def test_one_source_makes_one_chain_fastest_target_first() -> None:
    top = topology(s="h0", a="h1@50", b="h1@200", c="h1@100")
    assert chains(top, {"s": 6}, {"a": 0, "b": 0, "c": 0}) == [("s", "b", "c", "a")]


def test_as_many_chains_as_sources_or_targets() -> None:
    top = topology(s="h0", t="h0", a="h0", b="h0", c="h0")
    assert chains(top, {"s": 6, "t": 6}, {"a": 0, "b": 0, "c": 0}) == [("s", "a", "c"), ("t", "b")]
    assert chains(top, {"s": 6, "t": 6}, {"a": 0}) == [("s", "a")]


def test_targets_follow_a_tail_on_their_host() -> None:
    top = topology(s="h0", t="h1", a="h1", b="h0", c="h1")
    assert chains(top, {"s": 6, "t": 6}, {"a": 0, "b": 0, "c": 0}) == [("s", "b"), ("t", "a", "c")]


def test_every_chain_gets_a_tail_even_across_hosts() -> None:
    top = topology(s="h0", t="h1", a="h0", b="h0")
    assert chains(top, {"s": 6, "t": 6}, {"a": 0, "b": 0}) == [("s", "a"), ("t", "b")]


def test_sending_and_incomplete_sources_are_pruned() -> None:
    top = topology(s="h0", t="h0", u="h0", a="h0", b="h0")
    top.begin(1, ("s", "b"))
    assert chains(top, {"s": 6, "t": 6, "u": 5}, {"a": 0}) == [("t", "a")]
    assert chains(top, {"s": 6}, {"a": 0}) == []
    top.end(1, "s")
    assert chains(top, {"s": 6}, {"a": 0}) == [("s", "a")]
    assert chains(top, {"s": 6}, {}) == []


def test_a_chain_starts_at_the_lowest_watermark_of_its_targets() -> None:
    top = topology(s="h0", a="h0", b="h0")
    plan = multicast.plan(1, "toy", [("s", 6)], [("a", 4), ("b", 2)], top, UNITS, lambda members: len(members))
    (chain,) = plan.chains
    assert (chain.start_unit, chain.stop_unit, chain.generation) == (2, 6, 3)


@given(st.integers(0, 4), st.integers(0, 6), st.lists(st.integers(0, 2), min_size=10, max_size=10))
def test_plans_cover_every_target_once_and_ignore_argument_order(sources: int, targets: int, hosts: list[int]) -> None:
    names = [f"i{k}" for k in range(sources + targets)]
    top = topology(**{name: f"h{host}@{100 + 50 * (host % 2)}" for name, host in zip(names, hosts)})
    held, missing = {n: UNITS for n in names[:sources]}, {n: 0 for n in names[sources:]}
    made = chains(top, held, missing)
    assert len(made) == min(sources, targets) if sources else made == []
    assert sorted(itertools.chain(*(c[1:] for c in made))) == (sorted(missing) if sources else [])
    assert made == chains(top, dict(reversed(held.items())), dict(reversed(missing.items())))
