"""The prefill rate that the policy counts with, learned from first tokens, unless the configuration has one."""

from __future__ import annotations

import pytest
from fake_world import World, serving

from blitzjax.control.pace import FIRST_TOKENS_PER_S, Pace
from blitzjax.types import Phase


def test_busy_time_counts_and_idle_time_does_not() -> None:
    pace = Pace()
    assert pace.tokens_per_s == FIRST_TOKENS_PER_S
    pace.began("a", 10.0)
    pace.ran("a", 12.0, 100, more=True)
    pace.ran("a", 14.0, 300, more=False)  # two more seconds
    pace.ran("a", 99.0, 10_000, more=False)  # nobody knows since when it ran
    assert pace.tokens_per_s == pytest.approx((FIRST_TOKENS_PER_S + 400) / 5)
    pace.began("a", 100.0)
    pace.unknown("a")
    pace.ran("a", 101.0, 10_000, more=False)
    assert pace.tokens_per_s == pytest.approx((FIRST_TOKENS_PER_S + 400) / 5)


def test_what_is_seen_outweighs_what_was_believed_and_what_is_old() -> None:
    pace, at = Pace(), 0.0
    for rate in (200.0, 5000.0):
        pace.began("a", at)
        for _ in range(200):
            at += 0.5
            pace.ran("a", at, int(rate / 2), more=True)
        assert pace.tokens_per_s == pytest.approx(rate, rel=0.03)
        pace.unknown("a")


def answered_at(world: World, tokens_per_s: float) -> None:
    """One prompt after the other is answered at this rate by the only instance."""
    for n in range(60):
        world.arrive(f"{tokens_per_s:g}-{n}", prompt=32, answer=1)
        world.exchange()
        world.at += 32 / tokens_per_s
        world.compute("i0"), world.deliver("i0")  # its first token
        world.compute("i0"), world.deliver("i0")  # its end


@pytest.mark.parametrize(("seen", "configured", "grows"), [
    (50.0, 0.0, True), (5000.0, 0.0, False), (50.0, 1000.0, False), (5000.0, 100.0, True)])
def test_the_policy_scales_by_the_learned_rate_unless_one_is_configured(seen: float, configured: float,
                                                                         grows: bool) -> None:
    world = serving(2, policy="auto", prefill_tokens_per_s=configured, max_instances=2)
    answered_at(world, seen)
    for n in range(5):
        world.arrive(f"r{n}", prompt=32, answer=1)  # 160 tokens: 3.2 s of work at 50 a second, and 0.03 s at 5000
    world.tick()
    assert (world.of("i1").phase is not Phase.IDLE) == grows
