"""Multicast chains between real processes: bytes in are bytes out, whatever the chain and the watermarks."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path

import pytest

from transfer_peers import ANSWER_TIMEOUT_S, Cluster, Peer, cluster_of

UNITS = 7  # of peer.UNIT_BYTES


@pytest.fixture(scope="module", params=[1, 2], ids=["1lane", "2lanes"])
def cluster(request: pytest.FixtureRequest, tmp_module: Path) -> Iterator[Cluster]:
    (tmp := tmp_module / str(request.param)).mkdir()
    with cluster_of(tmp, 4, request.param) as cluster:
        cluster.join()
        yield cluster


def begin(cluster: Cluster, ranks: list[int], start: int = 0, stop: int = UNITS, generation: int | None = None,
          hold: int = 0, **more: object) -> None:
    generation = cluster.generation() if generation is None else generation
    for rank in ranks:
        cluster.peers[rank].send("multicast", ranks=ranks, generation=generation, start=start, stop=stop,
                                 hold=hold if rank == ranks[0] else 0, **more)


def multicast(cluster: Cluster, ranks: list[int], **more: object) -> list[dict]:
    begin(cluster, ranks, **more)
    return [cluster.peers[rank].answer() for rank in ranks]


def wait_for_steps(peer: Peer) -> None:
    """Until it has made another one; the first compiles."""
    before, deadline = peer.ask("count"), time.monotonic() + ANSWER_TIMEOUT_S
    while peer.ask("count") == before:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("ranks", [[0, 1], [2, 0, 1], [3, 2, 1, 0]], ids=["1to1", "1to2", "1to3"])
def test_receivers_get_the_source_bytes_while_others_serve(cluster: Cluster, ranks: list[int]) -> None:
    for peer in cluster.peers:
        peer.ask("fill", units=0, seed=0)
    wanted = cluster.peers[ranks[0]].ask("fill", units=UNITS, seed=len(ranks))
    begin(cluster, ranks, hold=4)
    for rank in ranks[1:]:
        cluster.peers[rank].wait_unit()
    for rank, peer in enumerate(cluster.peers):
        if rank not in ranks:
            wait_for_steps(peer)
    cluster.peers[ranks[0]].send("go")
    answers = [cluster.peers[rank].answer() for rank in ranks]
    assert [a["done"]["reached"] for a in answers] == [UNITS] * len(ranks)
    assert [a["done"]["touched"] for a in answers[1:]] == [list(range(UNITS))] * (len(ranks) - 1)
    for rank in ranks[1:]:
        assert cluster.peers[rank].ask("crcs") == wanted


def test_chains_of_the_same_ranks_in_any_order_share_their_connections(cluster: Cluster) -> None:
    generation, counts = cluster.generation(), []
    for seed, ranks in enumerate(permutations((0, 1, 3))):
        for rank in ranks:
            cluster.peers[rank].ask("fill", units=0, seed=0)
        wanted = cluster.peers[ranks[0]].ask("fill", units=UNITS, seed=seed)
        multicast(cluster, list(ranks), generation=generation)
        assert [cluster.peers[rank].ask("crcs") for rank in ranks] == [wanted] * 3
        counts.append([sockets(cluster.peers[rank].process.pid) for rank in sorted(ranks)])
    assert counts[1:] == counts[:1] * 5, counts


def sockets(pid: int) -> int:
    directory = f"/proc/{pid}/fd"
    return sum(os.readlink(f"{directory}/{fd}").startswith("socket:") for fd in os.listdir(directory))


@pytest.mark.parametrize("chunk", [64 + 64, 200_064, 1 << 20])
def test_any_chunk_size_works(cluster: Cluster, chunk: int) -> None:
    cluster.peers[1].ask("fill", units=1, seed=5)
    wanted = cluster.peers[0].ask("fill", units=2, seed=5)
    multicast(cluster, [0, 1], start=1, stop=2, chunk=chunk)
    assert cluster.peers[1].ask("crcs") == wanted


def test_receivers_at_different_watermarks_keep_what_they_hold(cluster: Cluster) -> None:
    wanted = cluster.peers[0].ask("fill", units=UNITS, seed=1)
    ahead = cluster.peers[1].ask("fill", units=5, seed=2)  # other bytes: overwriting would show
    cluster.peers[2].ask("fill", units=3, seed=1)
    answers = multicast(cluster, [0, 1, 2], start=3)
    assert [a["done"]["touched"] for a in answers] == [[], [5, 6], [3, 4, 5, 6]]
    assert cluster.peers[1].ask("crcs") == ahead + wanted[5:]
    assert cluster.peers[2].ask("crcs") == wanted


def test_too_few_units_is_an_error_before_anything_moves(cluster: Cluster) -> None:
    cluster.peers[0].ask("fill", units=3, seed=1)
    generation = cluster.generation()
    cluster.peers[0].send("multicast", ranks=[0, 1], generation=generation, start=0, stop=UNITS)
    assert "holds 3 units" in cluster.peers[0].answer()["error"]


def test_cancelled_source_ends_the_stream_in_step(cluster: Cluster) -> None:
    cluster.peers[0].ask("fill", units=UNITS, seed=1)
    for rank in (1, 2):
        cluster.peers[rank].ask("fill", units=0, seed=0)
    generation = cluster.generation()
    for _ in range(2):  # the clique stays usable
        begin(cluster, [0, 1, 2], generation=generation, hold=4)
        for rank in (1, 2):  # a receiver that is cancelled alone gives the source two units
            assert [cluster.peers[rank].wait_unit() for _ in range(3)] == [0, 1, 2]
        for rank in (0, 1, 2):
            cluster.peers[rank].send("cancel")
        answers = [cluster.peers[rank].answer() for rank in (0, 1, 2)]
        assert [a["done"]["reached"] for a in answers] == [4] * 3
        for rank in (1, 2):
            assert len(cluster.peers[rank].ask("crcs")) == 4
            cluster.peers[rank].ask("fill", units=0, seed=0)


def test_corrupt_unit_is_refused_and_named(cluster: Cluster) -> None:
    wanted = cluster.peers[0].ask("fill", units=UNITS, seed=1, lies=2)
    for rank in (1, 2):
        cluster.peers[rank].ask("fill", units=0, seed=0)
    answers = multicast(cluster, [0, 1, 2])
    assert answers[0]["done"]["reached"] == UNITS
    for rank, answer in zip((1, 2), answers[1:], strict=True):
        assert "unit 2" in answer["error"] and "checksum" in answer["error"]
        assert cluster.peers[rank].ask("crcs") == wanted[:2]
