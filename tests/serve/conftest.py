"""Fixtures around toy.py: its checkpoint, and a cluster of toy workers with a client."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "reference"))

from toy import toy_config, toy_launch, wait_whole, write_model  # noqa: E402

from blitzjax.serve.local import LocalCluster  # noqa: E402


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def cluster(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Two toy workers, one instance serving. The brain's own check() runs when the controller ends."""
    with LocalCluster(toy_config(), model_dir, toy_launch(tmp_path_factory.mktemp("run"))) as cluster:
        wait_whole(cluster)
        yield cluster
        assert cluster.stop(300) == 0, cluster.tail("controller")


@pytest.fixture
def client(cluster: LocalCluster):
    with cluster.client() as client:
        yield client
