"""A cluster refuses to come up on a damaged checkpoint and says which tensor is damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from blitzjax import config as configs
from blitzjax.engine.convert import TINY, write_random
from blitzjax.errors import BlitzError
from blitzjax.serve.local import LocalCluster


def corrupt(weights: Path) -> None:
    data = bytearray(weights.read_bytes())
    data[200_000] ^= 1
    weights.write_bytes(data)


def truncate(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:100_000])


@pytest.mark.parametrize("damage,named", [(corrupt, "layer 1: gate_up"), (truncate, "layer 0: o")])
def test_damage_is_named_and_ends_the_start(tmp_path, tmp_path_factory, damage, named: str) -> None:
    write_random(tmp_path / "tiny", TINY, seed=1)
    damage(tmp_path / "tiny" / "weights.bin")
    config = configs.load(None, (
        "serve.port=0", "cluster.pool=2", "engine.dtype=float32", "engine.max_model_len=128", "engine.max_num_seqs=2",
        f"engine.executable_cache={tmp_path_factory.getbasetemp() / 'executables'}"))
    with LocalCluster(config, tmp_path / "tiny") as cluster, pytest.raises(BlitzError, match=named):
        cluster.wait_ready(300)
