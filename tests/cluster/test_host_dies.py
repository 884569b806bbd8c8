"""All workers of a host die at once: what they kept is kept elsewhere, what they ran runs elsewhere, and they come back.

Two hosts, which are two addresses of the loopback device, with two workers each, and two models that nobody serves.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from rig import PATIENT, written

from blitzjax import config as configs
from blitzjax.serve.local import LocalCluster
from blitzjax.serve.hosts import Launch
from test_models_from_zero import SPECS, Pool, all_right, ask, in_the_middle_of_a_scale_up

HOSTS = {"127.0.0.1": (0, 1), "127.0.0.2": (2, 3)}


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    directories = written(tmp_path_factory, SPECS)
    config = configs.load(None, (
        "serve.port=0", "scale.policy=manual", "scale.min_instances=0", "cluster.pool=4", "cluster.threads=1",
        "engine.dtype=float32", "engine.max_model_len=64", "engine.max_num_seqs=2", "engine.max_num_batched_tokens=32",
        "transfer.chunk_bytes=1024", "transfer.collective_timeout_s=3.0", *PATIENT,
        f"serve.event_log={tmp_path_factory.mktemp('log') / 'events.jsonl'}",
        f"engine.executable_cache={tmp_path_factory.getbasetemp() / 'executables'}"))
    launch = Launch(hosts=tuple(host for host, workers in HOSTS.items() for _ in workers))
    with LocalCluster(config, directories, launch) as cluster:
        cluster.wait_ready(300)
        pool = Pool(cluster)
        pool.settle_at_zero()
        assert all_right(pool, ask(pool))  # known from instances that nothing happens to
        pool.back_to_zero()
        yield pool
        assert cluster.stop() == 0, cluster.tail("controller")


def host_of(worker: int) -> str:
    return next(host for host, workers in HOSTS.items() if worker in workers)


def copies_apart(pool: Pool) -> dict[str, str]:
    """Each model is kept on another host. → model, host. What was kept while a host was down goes where it belongs when
    its last instance does.
    """
    pool.settle_at_zero()
    if host_of(pool.keeper("left")) == host_of(pool.keeper("right")):
        pool.client.scale(1, model="right", wait=True, timeout_s=300)
        pool.client.scale(0, model="right")
        pool.settle_at_zero()
    hosts = {model: host_of(pool.keeper(model)) for model in ("left", "right")}
    assert hosts["left"] != hosts["right"]
    return hosts


def test_the_copies_of_a_host_are_made_again_on_another(pool: Pool) -> None:
    hosts = copies_apart(pool)
    pool.kill(*HOSTS[hosts["left"]])
    pool.wait(lambda: all(m.host_copy and not m.copying for m in pool.client.status().models), "kept again")
    assert {host_of(pool.keeper(model)) for model in ("left", "right")} == {hosts["right"]}
    assert all_right(pool, ask(pool))
    pool.back_to_zero()


@pytest.mark.parametrize("holds", ["the source and a target", "a target and the other model's copy"])
def test_a_host_dies_in_a_scale_up(pool: Pool, holds: str) -> None:
    """Three instances of one model are to come from its copy, two on its host and one on the other."""
    hosts, answers = in_the_middle_of_a_scale_up(
        pool, lambda: copies_apart(pool), lambda: all(loading(pool, host) for host in HOSTS))
    pool.kill(*HOSTS[hosts["left" if holds == "the source and a target" else "right"]])
    assert all_right(pool, answers)
    pool.back_to_zero()


def loading(pool: Pool, host: str) -> bool:
    """An instance there has some of its layers."""
    return any(i.phase in ("loading", "live") and i.layers_loaded for i in pool.client.status().instances
               if int(i.id[1:]) in HOSTS[host])
