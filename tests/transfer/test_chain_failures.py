"""Deaths around a chain: nobody else dies, complete units stay, and a new generation finishes the work."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from transfer_peers import HEARTBEAT_S, Cluster, cluster_of

UNITS = 7
TIMEOUT_S = 10.0  # of a collective: long for one that gets on, and the test waits for it


@pytest.fixture(scope="module")
def cluster(tmp_module: Path) -> Iterator[Cluster]:
    with cluster_of(tmp_module, 4, 1, TIMEOUT_S) as cluster:
        cluster.join()
        yield cluster


def begin(cluster: Cluster, ranks: list[int], start: int = 0, hold: int = 0) -> None:
    generation = cluster.generation()
    for rank in ranks:
        cluster.peers[rank].send("multicast", ranks=ranks, generation=generation, start=start, stop=UNITS,
                                 hold=hold if rank == ranks[0] else 0)


def empty(cluster: Cluster, ranks: list[int]) -> None:
    for rank in ranks:
        cluster.peers[rank].ask("fill", units=0, seed=0)


def errors(cluster: Cluster, ranks: list[int]) -> list[str]:
    """All of `ranks` report a failure, though the library itself would wait for half an hour, and live on."""
    found = [cluster.peers[rank].answer()["error"] for rank in ranks]
    assert all(cluster.peers[rank].alive() for rank in ranks)
    return found


def come_back(cluster: Cluster, rank: int) -> None:
    cluster.peers[rank].start()
    assert cluster.peers[rank].ask("join") < HEARTBEAT_S / 2, "nobody need notice that it was gone"


def finish(cluster: Cluster, ranks: list[int], start: int, wanted: object) -> None:
    begin(cluster, ranks, start)
    for rank in ranks:
        assert cluster.peers[rank].answer()["done"]["reached"] == UNITS
    assert all(cluster.peers[rank].ask("crcs") == wanted for rank in ranks)


@pytest.mark.parametrize("victim", [1, 0], ids=["target", "source"])
def test_killed_member_costs_only_its_chain(cluster: Cluster, victim: int) -> None:
    """Chain 0 → 1 → 2 loses a member; survivors go on with 3, the victim comes back and is served last."""
    survivors = [rank for rank in (0, 1, 2) if rank != victim]
    empty(cluster, [1, 2])
    wanted = cluster.peers[3].ask("fill", units=UNITS, seed=7)
    assert cluster.peers[0].ask("fill", units=UNITS, seed=7) == wanted
    begin(cluster, [0, 1, 2], hold=4)
    assert [cluster.peers[2].wait_unit() for _ in range(2)] == [0, 1]
    cluster.peers[victim].kill()
    if victim != 0:
        cluster.peers[0].send("go")
    errors(cluster, survivors)
    held = cluster.peers[2].ask("crcs")
    assert 2 <= len(held) < UNITS and held == wanted[:len(held)]

    receivers = [rank for rank in survivors if rank != 0]
    start = min(len(cluster.peers[rank].ask("crcs")) for rank in receivers)
    finish(cluster, [3, *receivers], start, wanted)
    come_back(cluster, victim)
    finish(cluster, [2, victim], 0, wanted)
    assert all(peer.alive() for peer in cluster.peers)


def test_member_that_died_before_the_first_tick_is_reported(cluster: Cluster) -> None:
    """By those who wait for it before they begin: gloo would take its own 30 s."""
    cluster.peers[0].ask("fill", units=UNITS, seed=7)
    empty(cluster, [1])
    cluster.peers[2].kill()
    generation = cluster.generation()
    for rank in (0, 1):
        cluster.peers[rank].send("multicast", ranks=[0, 1, 2], generation=generation, start=0, stop=UNITS,
                                 meet_s=3.0)
    assert all("did not meet" in error for error in errors(cluster, [0, 1]))
    come_back(cluster, 2)


def test_stopped_member_times_out_and_a_failed_generation_is_refused(cluster: Cluster) -> None:
    wanted = cluster.peers[0].ask("fill", units=UNITS, seed=7)
    empty(cluster, [1, 2])
    generation = cluster.generation()
    order = {"ranks": [0, 1, 2], "generation": generation, "start": 0, "stop": UNITS}
    cluster.peers[0].send("multicast", hold=4, **order)
    for rank in (1, 2):
        cluster.peers[rank].send("multicast", **order)
    cluster.peers[2].wait_unit()
    cluster.peers[1].process.send_signal(signal.SIGSTOP)
    cluster.peers[0].send("go")
    errors(cluster, [0, 2])
    cluster.peers[1].process.send_signal(signal.SIGCONT)
    assert "error" in cluster.peers[1].answer()
    cluster.peers[0].send("multicast", **order)
    assert "failed before" in cluster.peers[0].answer()["error"]
    finish(cluster, [0, 2, 1], 0, wanted)


def test_rank_that_leaves_can_join_again(cluster: Cluster) -> None:
    wanted = cluster.peers[0].ask("fill", units=UNITS, seed=9)
    empty(cluster, [3])
    cluster.peers[3].ask("leave")
    assert "error" in _prepare(cluster, 3)
    cluster.peers[3].ask("join")
    finish(cluster, [0, 3], 0, wanted)
    assert all(peer.alive() for peer in cluster.peers)


def _prepare(cluster: Cluster, rank: int) -> dict:
    cluster.peers[rank].send("multicast", ranks=[0, rank], generation=0, start=0, stop=UNITS)
    return cluster.peers[rank].answer()


def test_worker_killed_while_the_world_forms_may_come_back(tmp_path: Path) -> None:
    with cluster_of(tmp_path, 3, 1) as cluster:
        for rank in (0, 1):
            cluster.peers[rank].send("join")
        time.sleep(2.0)
        cluster.peers[1].kill()
        cluster.peers[1].start()
        cluster.peers[1].send("join")
        time.sleep(1.0)
        cluster.peers[2].send("join")
        for peer in cluster.peers:
            assert "done" in peer.answer()
        wanted = cluster.peers[0].ask("fill", units=UNITS, seed=3)
        finish(cluster, [0, 1, 2], 0, wanted)
