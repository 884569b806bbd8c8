"""A member of a lane dies or hangs: every lane ends, what was gathered stays, the same plan does the rest."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from lane_plans import SOURCES, TWO_DOMAINS, UNITS, answers, begin, fill
from transfer_peers import Cluster, cluster_of

TIMEOUT_S = 10.0  # of a collective: long for one that gets on, and the test waits for it


@pytest.fixture(scope="module")
def cluster(tmp_module: Path) -> Iterator[Cluster]:
    with cluster_of(tmp_module, 6, 1, TIMEOUT_S) as cluster:
        cluster.join()
        yield cluster


@pytest.mark.parametrize("victim,how", [(2, signal.SIGKILL), (4, signal.SIGSTOP), (0, signal.SIGKILL)],
                         ids=["first hop killed", "tail stopped", "source killed"])
def test_a_lost_member_ends_every_lane(cluster: Cluster, victim: int, how: signal.Signals) -> None:
    """The control plane's part is done by hand: when a lane fails, the others are cancelled."""
    plan = TWO_DOMAINS
    wanted = fill(cluster, plan, seed=7)
    begin(cluster, plan, holds=(4, 4))
    assert all([cluster.peers[rank].wait_unit() for _ in range(2)] == [0, 1] for rank in plan.targets)
    cluster.peers[victim].process.send_signal(how)
    survivors = [rank for rank in plan.ranks if rank != victim]
    for rank in survivors:
        cluster.peers[rank].send("cancel")
    done = answers(cluster, survivors)
    for rank in (rank for rank in plan.targets if rank != victim):
        held = cluster.peers[rank].ask("crcs")
        assert 2 <= len(held) < UNITS and held == wanted[:len(held)]
        assert "error" in done[rank] or done[rank]["done"]["reached"] == len(held)
    if how == signal.SIGSTOP:
        cluster.peers[victim].process.send_signal(signal.SIGCONT)
        cluster.peers[victim].answer()
    else:
        cluster.peers[victim].start()
        cluster.peers[victim].ask("join")
    assert all(peer.alive() for peer in cluster.peers)
    cluster.peers[victim].ask("fill", units=UNITS if victim in SOURCES else 0, seed=7)
    lowest = min(len(cluster.peers[rank].ask("crcs")) for rank in plan.targets)
    begin(cluster, plan, start=lowest)
    assert all(a["done"]["reached"] == UNITS for a in answers(cluster, plan.ranks).values())
    assert all(cluster.peers[rank].ask("crcs") == wanted for rank in plan.targets)
