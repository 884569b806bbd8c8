"""Tensor-parallel instances: all shards move in one multicast, and hand-offs keep their sharding. Some decode several
layers a program: live, theirs run one at a time. And matrices of int8, with their scales.
"""

from __future__ import annotations

import time

import pytest

from blitzjax import config as configs
from blitzjax.engine.convert import write_random
from blitzjax.serve.local import LocalCluster
from rig import SPEC, prompts


@pytest.mark.parametrize("tp,fused_layers,dtype", [(2, 3, "float32"), (4, 0, "float32"), (1, 0, "int8")])
def test_cluster_answers_like_itself_before_scaling(tmp_path_factory, tp: int, fused_layers: int, dtype: str) -> None:
    directory = tmp_path_factory.mktemp("sharded") / "tiny"
    write_random(directory, SPEC, seed=3)
    config = configs.load(None, (
        "serve.port=0", "scale.policy=manual", "cluster.pool=2", f"engine.dtype={dtype}", "engine.max_model_len=128",
        f"engine.tensor_parallel={tp}", f"engine.fused_layers={fused_layers}", "engine.max_num_seqs=4",
        "engine.max_num_batched_tokens=64", "transfer.chunk_bytes=1024",
        f"engine.executable_cache={tmp_path_factory.getbasetemp() / 'executables'}"))
    asked = prompts(8, seed=2, longest=100)
    with LocalCluster(config, directory) as cluster, cluster.client() as client:
        cluster.wait_ready(300)
        deadline = time.monotonic() + 300
        while sum(i.in_world for i in client.status().instances) < 2:
            assert time.monotonic() < deadline, "both workers join"
            time.sleep(0.05)
        alone = [client.generate(p, max_tokens=8, ignore_eos=True).token_ids for p in asked]
        client.scale(2, live="zigzag")
        answers = [client.generate(p, max_tokens=8, ignore_eos=True) for p in asked]
        assert [a.token_ids for a in answers] == alone
        assert client.scale(2, live="zigzag", wait=True, timeout_s=300).serving == 2
        assert [client.generate(p, max_tokens=8, ignore_eos=True).token_ids for p in asked] == alone
