"""Workers with cache directories of their own: what one has compiled, others need not."""

from __future__ import annotations

import itertools
import re
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rig import caught

from blitzjax import config as configs
from blitzjax.engine.convert import TINY, write_random
from blitzjax.serve.local import LocalCluster
from blitzjax.serve.hosts import Launch

READY = re.compile(r"is ready for \S+ in [\d.]+ s: (\d+) stages compiled, (\d+) loaded, (\d+) fetched")


def ready(cluster: LocalCluster, worker: int, lives: int) -> tuple[int, int, int]:
    """Stages compiled, loaded and fetched in the last of so many lives of the worker."""
    deadline = time.monotonic() + 300
    while len(found := READY.findall(cluster.tail(f"worker-{worker}", 10_000))) < lives:
        assert time.monotonic() < deadline, cluster.tail(f"worker-{worker}")
        time.sleep(0.05)
    compiled, loaded, fetched = map(int, found[-1])
    return compiled, loaded, fetched


def apart(root: Path, model: Path, shares: bool) -> LocalCluster:
    """Two workers, each with a home, and so an executable cache, of its own."""
    for k in range(2):
        (root / f"home-{k}").mkdir(parents=True)
    config = configs.load(None, (
        "serve.port=0", "scale.policy=manual", "cluster.pool=2", "cluster.threads=1", "engine.dtype=float32",
        "engine.max_model_len=128", "engine.max_num_seqs=2", "engine.max_num_batched_tokens=32",
        "engine.executable_cache=~/executables", f"engine.share_executables={str(shares).lower()}"))
    return LocalCluster(config, model, Launch(
        run_dir=root / "run", prefixes=tuple(("env", f"HOME={root / f'home-{k}'}") for k in range(2)),
        worker=(sys.executable, "-m", "blitzjax.cli", "worker")))


def restart_without_cache(cluster: LocalCluster, root: Path, worker: int) -> None:
    shutil.rmtree(root / f"home-{worker}" / "executables")
    cluster.signal_worker(worker)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("models") / "tiny"
    write_random(directory, replace(TINY, layers=4), seed=3)
    return directory


def test_cold_workers_divide_the_work_and_a_new_one_compiles_nothing(model: Path, tmp_path: Path) -> None:
    with apart(tmp_path, model, shares=True) as cluster, cluster.client() as client:
        cluster.wait_ready(300)
        before = client.generate([1, 2, 3], max_tokens=6, ignore_eos=True)
        cold = [ready(cluster, k, 1) for k in range(2)]
        stages = sum(cold[0])
        assert sum(cold[1]) == stages
        assert sum(compiled for compiled, _, _ in cold) < 2 * stages

        lives = itertools.count(2)

        def again() -> tuple[int, int, int]:
            restart_without_cache(cluster, tmp_path, 1)
            return ready(cluster, 1, next(lives))

        assert caught(lambda: again() == (0, 0, stages))  # a peer that gets no time for 5 s is not waited for
        (damaged, *_) = sorted((tmp_path / "home-0" / "executables").glob("*.xla"))
        *whole, last = damaged.read_bytes()
        damaged.write_bytes(bytes([*whole, last ^ 1]))
        assert caught(lambda: again() == (1, 0, stages - 1))  # what came damaged is compiled
        assert f"{damaged.name} came damaged" in cluster.tail("worker-1", 10_000)

        assert client.scale(2, wait=True, timeout_s=300).serving == 2
        cluster.signal_worker(0)  # the other one answers with what it was given
        assert client.generate([1, 2, 3], max_tokens=6, ignore_eos=True).token_ids == before.token_ids


def test_workers_that_do_not_share_compile_for_themselves(model: Path, tmp_path: Path) -> None:
    with apart(tmp_path, model, shares=False) as cluster:
        for k in range(2):
            compiled, loaded, fetched = ready(cluster, k, 1)
            assert compiled and not loaded and not fetched
