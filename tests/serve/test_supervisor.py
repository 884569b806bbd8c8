"""What LocalCluster leaves behind, and what it survives, besides processes that die."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from toy import TOY_COORDINATOR, TOY_WORKER, eventually, toy_config, toy_launch, wait_whole

from blitzjax.errors import UnknownModel
from blitzjax.serve.local import LocalCluster
from blitzjax.serve.hosts import Launch

_LAUNCH = Launch(worker=TOY_WORKER, coordinator=TOY_COORDINATOR)  # in a temporary directory


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_logs_go_with_a_cluster_that_nothing_happened_to(model_dir: Path, temporary: Path) -> None:
    with LocalCluster(toy_config(), model_dir, _LAUNCH) as cluster:
        wait_whole(cluster)
        assert cluster.run_dir.parent == temporary and (cluster.run_dir / "worker-0.log").exists()
    assert list(temporary.iterdir()) == []


def test_logs_stay_for_whoever_asks_what_happened(model_dir: Path) -> None:
    with LocalCluster(toy_config(), model_dir, _LAUNCH) as restarted:
        wait_whole(restarted)
        before = restarted.worker_pid(1)
        restarted.signal_worker(1)
        eventually(lambda: restarted.worker_pid(1) not in (None, before))
    with pytest.raises(ZeroDivisionError), LocalCluster(toy_config(), model_dir, _LAUNCH) as failed:
        1 / 0
    assert restarted.run_dir.exists() and failed.run_dir.exists()


def test_a_cluster_outlives_its_directory(model_dir: Path, temporary: Path) -> None:
    """What cleans temporary files away after some days must not end it."""
    with LocalCluster(toy_config(), model_dir, toy_launch(temporary / "run")) as cluster, cluster.client() as client:
        wait_whole(cluster)
        shutil.rmtree(cluster.run_dir)
        before = cluster.worker_pid(0)
        cluster.signal_worker(0)
        eventually(lambda: cluster.worker_pid(0) not in (None, before))
        wait_whole(cluster)
        assert len(client.generate([1, 2, 3], max_tokens=3).token_ids) == 3


def test_told_to_go_before_it_began_it_goes(model_dir: Path) -> None:
    cluster = LocalCluster(toy_config(), model_dir, _LAUNCH)
    cluster.terminate()
    with cluster:
        cluster.wait(5)
        assert cluster.controller_pid() is None


def test_told_to_go_while_it_begins_it_goes(model_dir: Path, temporary: Path) -> None:
    with LocalCluster(toy_config(), model_dir, _LAUNCH) as cluster:
        eventually(lambda: cluster.controller_pid() is not None)
        cluster.terminate()
        assert cluster.wait(20) == 0
    assert list(temporary.iterdir()) == []


def test_one_checkpoint_under_two_names(model_dir: Path) -> None:
    with LocalCluster(toy_config(), [model_dir] * 2, _LAUNCH, ("chat", "base")) as cluster, cluster.client() as client:
        wait_whole(cluster)
        assert [m.name for m in client.status().models] == ["chat", "base"]
        assert [client.generate("a", model=name, max_tokens=2).text for name in ("chat", "base")] == ["bc", "bc"]
        with pytest.raises(UnknownModel, match="served: chat, base"):
            client.generate("a", model="toy")
