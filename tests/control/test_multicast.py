from __future__ import annotations

import itertools
import time

from hypothesis import given
from hypothesis import strategies as st

from blitzjax.control import multicast
from blitzjax.control.topology import Port, Topology
from blitzjax.types import Chain, MulticastPlan, Ring

UNITS = 6


def topology(**hosts: str) -> Topology:
    """instance="host", "host@gbps", or "host/leaf"; a host named F... joins its instances at 1600 Gbps."""
    built = Topology()
    for instance, place in hosts.items():
        host, _, gbps = place.partition("@")
        host, _, leaf = host.partition("/")
        built.add(instance, Port(host, host, leaf, float(gbps or 100), 1600.0 if host[0] == "F" else 0.0))
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
    assert sorted(chains(top, {"s": 6, "t": 6}, {"a": 0, "b": 0})) == [("s", "a"), ("t", "b")]


def test_wide_domains_come_first_and_chains_stay_inside_a_leaf() -> None:
    top = topology(s="h0/x", t="h1/y", a="h2/y", b="h3/x", c="h2/y", d="h3/x", e="h4/x@300", f="h5/y")
    assert chains(top, {"s": 6, "t": 6}, dict.fromkeys("abcdef", 0)) == [("s", "e", "b", "d"), ("t", "a", "c", "f")]


def test_of_equal_groups_a_leaf_s_are_visited_together_and_leaves_with_a_source_first() -> None:
    top = topology(s="h0/y", a="h1/x", b="h2/y", c="h3/x", d="h4/x", e="h4/x", f="h5/y", g="h6/z@50", h="h7/x@50")
    assert chains(top, {"s": 6}, dict.fromkeys("abcdefgh", 0)) == [("s", "b", "f", "d", "e", "a", "c", "h", "g")]


def test_each_leaf_with_targets_has_a_source_of_its_own_where_there_is_one() -> None:
    top = topology(s="h0/x", t="h0/x", u="h1/y", a="h3/x", b="h4/y", c="h5/z")
    assert sorted(chains(top, dict.fromkeys("stu", 6), dict.fromkeys("ab", 0))) == [("s", "a"), ("u", "b")]
    assert sorted(chains(top, dict.fromkeys("stu", 6), dict.fromkeys("bc", 0))) == [("s", "c"), ("u", "b")]
    top = topology(s="h1", t="h2", a="h0", b="h1")
    assert sorted(chains(top, dict.fromkeys("st", 6), dict.fromkeys("ab", 0))) == [("s", "b"), ("t", "a")]


def test_what_shares_nvlink_with_a_source_goes_before_the_network() -> None:
    top = topology(s="F0", a="F1", b="F1", c="F0")
    assert chains(top, {"s": 6}, {"a": 0, "b": 0, "c": 0}) == [("s", "c", "a", "b")]


def test_a_source_that_sends_kv_serves_its_own_fast_domain_and_nothing_else() -> None:
    top = topology(p="F0", a="F0", b="F1", c="F1", d="F2", q="h3", e="h3")
    missing = [(i, 0) for i in "abce"]

    def made(*sources: str) -> list[tuple[str, ...]]:
        held = [(i, UNITS) for i in sources]
        return [c.instances for c in multicast.plan(1, "toy", held, missing, top, UNITS, lambda m: 0, "pq").chains]

    assert made("p", "d") == [("d", "b", "c", "e"), ("p", "a")]
    assert made("p") == [("p", "a", "b", "c", "e")]  # its first target sends on
    assert made("q") == []  # nothing faster than the network joins q to e


def sharded(top: Topology, sources: dict[str, int], targets: dict[str, int]) -> MulticastPlan:
    return multicast.plan(1, "toy", [*sources.items()], [*targets.items()], top, UNITS, lambda members: 0)


def lanes(top: Topology, sources: dict[str, int], targets: dict[str, int]) -> tuple[Chain, ...]:
    return sharded(top, sources, targets).chains


def test_two_sources_are_two_lanes_into_every_wide_domain() -> None:
    """Figure 14: each sends half of every unit, the domain gathers; six targets take half the time of one."""
    top = topology(s="F0", t="F0", a="F1", b="F1", c="F1", d="F2", e="F2", f="F2")
    plan = sharded(top, {"s": 6, "t": 6}, {"a": 2, "b": 0, "c": 0, "d": 0, "e": 0, "f": 0})
    assert plan.chains == (
        Chain(("s", "a", "c", "d", "f"), 0, 6, 0, 0, 2), Chain(("t", "b", "e"), 0, 6, 0, 1, 2))
    assert plan.rings == (Ring(("a", "b", "c"), 0), Ring(("d", "e", "f"), 0))


def test_a_ring_has_one_member_of_each_lane_and_the_last_takes_what_is_left_over() -> None:
    top = topology(s="F0", t="F0", **{i: "F1" for i in "abcdefg"})
    rings = sharded(top, {"s": 6, "t": 6}, dict.fromkeys("abcdefg", 0)).rings
    assert [ring.instances for ring in rings] == [("a", "b"), ("c", "d"), ("e", "f", "g")]


def test_domains_too_narrow_for_the_lanes_have_a_source_of_their_own_or_no_lanes_are_made() -> None:
    top = topology(s="F0", t="F0", u="F0", a="F1", b="F1", c="F2")
    made = lanes(top, {"s": 6, "t": 6, "u": 6}, {"a": 0, "b": 0, "c": 0})
    assert [(c.instances, c.lanes) for c in made] == [(("s", "a"), 2), (("t", "b"), 2), (("u", "c"), 1)]
    assert [c.lanes for c in lanes(top, {"s": 6, "t": 6}, {"a": 0, "b": 0, "c": 0})] == [1, 1]


def test_lanes_begin_near_their_targets() -> None:
    top = topology(s="F0/x", t="F0/x", p="h1/y", a="F0/x", b="F0/x", c="F0/x", d="h2/y")
    made = lanes(top, {"p": 6, "s": 6, "t": 6}, dict.fromkeys("abcd", 0))
    assert [(c.instances, c.lanes) for c in made] == [(("s", "a", "c"), 2), (("t", "b"), 2), (("p", "d"), 1)]


def test_a_thousand_targets_are_planned_in_50_ms() -> None:
    top = topology(**{f"i{k}": f"{'F' if k % 2 else 'h'}{k % 128}/l{k % 8}" for k in range(1020)})
    held, missing = {f"i{k}": UNITS for k in range(20)}, {f"i{k}": 0 for k in range(20, 1020)}
    best = min(_timed(top, held, missing) for _ in range(3))
    assert best < 0.05, f"{best * 1e3:.0f} ms"


def _timed(top: Topology, held: dict[str, int], missing: dict[str, int]) -> float:
    started = time.thread_time()
    made = chains(top, held, missing)
    took = time.thread_time() - started
    assert sorted(itertools.chain(*(c[1:] for c in made))) == sorted(missing)
    return took


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


@given(st.integers(1, 5), st.integers(1, 16), st.lists(st.integers(0, 9), min_size=21, max_size=21), st.integers(1, 4),
       st.integers(0, 3))
def test_no_chain_enters_a_leaf_twice(sources: int, targets: int, hosts: list[int], leaves: int, local: int) -> None:
    names = [f"i{k}" for k in range(sources + targets)]
    top = topology(**{name: f"{'F' if host % 2 else 'h'}{host}/l{host % leaves}" for name, host in zip(names, hosts)})
    held, missing = [(i, UNITS) for i in names[:sources]], [(i, 0) for i in names[sources:]]
    for chain in multicast.plan(1, "toy", held, missing, top, UNITS, lambda members: 0, names[:local]).chains:
        visited = [leaf for leaf, _ in itertools.groupby(top.ports[i].leaf for i in chain.instances)]
        entered = visited[1:] if chain.lanes > 1 else visited  # lanes go the same way, and so back to where one began
        assert len(set(entered)) == len(entered), (chain, visited)


@given(st.integers(0, 4), st.integers(0, 6), st.lists(st.integers(0, 2), min_size=10, max_size=10),
       st.sampled_from("hF"))
def test_plans_cover_every_target_once_and_ignore_argument_order(sources: int, targets: int, hosts: list[int],
                                                                 kind: str) -> None:
    names = [f"i{k}" for k in range(sources + targets)]
    top = topology(**{name: f"{kind}{host}/l{host % 2}@{100 + 50 * (host % 2)}" for name, host in zip(names, hosts)})
    held, missing = {n: UNITS for n in names[:sources]}, {n: 0 for n in names[sources:]}
    made = chains(top, held, missing)
    assert len(made) == min(sources, targets) if sources and kind == "h" else len(made) <= min(sources, targets)
    plan = sharded(top, held, missing)
    gang = [c for c in plan.chains if c.lanes > 1]
    lane_of = {i: c.lane for c in gang for i in c.instances[1:]}
    assert sorted(itertools.chain(*(ring.instances for ring in plan.rings))) == sorted(lane_of)
    for ring in plan.rings:
        assert {lane_of[i] for i in ring.instances} == set(range(len(gang)))
        assert len({top.ports[i].domain for i in ring.instances}) == 1
    reached = [{top.ports[i].domain for i in c.instances[1:]} for c in gang]
    assert all(domains == reached[0] for domains in reached) and len(gang) in (0, *(c.lanes for c in gang))
    assert sorted(itertools.chain(*(c[1:] for c in made))) == (sorted(missing) if sources else [])
    assert made == chains(top, dict(reversed(held.items())), dict(reversed(missing.items())))
