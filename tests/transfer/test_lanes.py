"""Chains that are lanes: each brings a part of every unit, rings gather them; real processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lane_plans import (
    ONE_DOMAIN, SOURCES, THREE_IN_A_DOMAIN, THREE_LANES, TWO_DOMAINS, UNITS, Plan, answers, begin, fill,
)
from transfer_peers import Cluster, cluster_of


@pytest.fixture(scope="module", params=[1, 2], ids=["1device", "2devices"])
def cluster(request: pytest.FixtureRequest, tmp_module: Path) -> Iterator[Cluster]:
    (tmp := tmp_module / str(request.param)).mkdir()
    with cluster_of(tmp, 7, request.param) as cluster:
        cluster.join()
        yield cluster


@pytest.mark.parametrize("plan", [ONE_DOMAIN, TWO_DOMAINS, THREE_IN_A_DOMAIN, THREE_LANES],
                         ids=["2x1", "2x2", "uneven", "3lanes"])
def test_targets_gather_the_sources_bytes(cluster: Cluster, plan: Plan) -> None:
    wanted = fill(cluster, plan, seed=1)
    begin(cluster, plan, paces=(0.05, 0.0, 0.02))  # lanes need not keep step
    for rank, answer in answers(cluster, plan.ranks).items():
        assert "error" not in answer, (rank, answer)
        assert answer["done"]["reached"] == UNITS
        assert answer["done"]["touched"] == ([] if rank not in plan.targets else list(range(UNITS)))
    assert all(cluster.peers[rank].ask("crcs") == wanted for rank in plan.targets)


@pytest.mark.parametrize("chunk", [64 + 64, 100_096, 1 << 20])
def test_any_chunk_size_works(cluster: Cluster, chunk: int) -> None:
    wanted = fill(cluster, ONE_DOMAIN, seed=5, units=2)
    begin(cluster, ONE_DOMAIN, stop=2, chunk=chunk)
    assert all(a["done"]["reached"] == 2 for a in answers(cluster, ONE_DOMAIN.ranks).values())
    assert all(cluster.peers[rank].ask("crcs") == wanted for rank in ONE_DOMAIN.targets)


def test_targets_at_different_watermarks_get_the_rest_and_keep_what_they_hold(cluster: Cluster) -> None:
    wanted = fill(cluster, TWO_DOMAINS, seed=1)
    held = {2: 5, 3: 5, 4: 3, 5: 2}
    for rank, units in held.items():  # the first domain's are other bytes: overwriting would show
        cluster.peers[rank].ask("fill", units=units, seed=2 if rank in (2, 3) else 1)
    ahead = cluster.peers[2].ask("crcs")
    begin(cluster, TWO_DOMAINS, start=2)
    done = answers(cluster, TWO_DOMAINS.ranks)
    for rank in TWO_DOMAINS.targets:
        assert done[rank]["done"]["touched"] == list(range(held[rank], UNITS))
        assert cluster.peers[rank].ask("crcs") == (ahead if rank in (2, 3) else wanted[:5]) + wanted[5:]


def test_lanes_of_different_bytes_are_refused(cluster: Cluster) -> None:
    fill(cluster, ONE_DOMAIN, seed=1)
    cluster.peers[1].ask("fill", units=UNITS, seed=2)
    begin(cluster, ONE_DOMAIN)
    done = answers(cluster, ONE_DOMAIN.ranks)
    for rank in ONE_DOMAIN.targets:
        assert "unit 0" in done[rank]["error"] and "checksum" in done[rank]["error"]
        assert cluster.peers[rank].ask("crcs") == []


def test_cancelled_sources_end_all_lanes_at_one_unit(cluster: Cluster) -> None:
    wanted = fill(cluster, TWO_DOMAINS, seed=1)
    plan, generation = TWO_DOMAINS, cluster.generation()
    for holds, cancelled in (((4, 4), plan.ranks), ((5, 4), SOURCES)):  # the cliques stay usable
        begin(cluster, plan, holds=holds, generation=generation)
        for rank in plan.targets:
            assert [cluster.peers[rank].wait_unit() for _ in range(3)] == [0, 1, 2]
        for rank in cancelled:
            cluster.peers[rank].send("cancel")
        done = answers(cluster, plan.ranks)
        assert tuple(done[rank]["done"]["reached"] for rank in SOURCES) == holds
        for rank in plan.targets:
            assert done[rank]["done"]["reached"] == 4
            assert cluster.peers[rank].ask("crcs") == wanted[:4]
            cluster.peers[rank].ask("fill", units=0, seed=0)
