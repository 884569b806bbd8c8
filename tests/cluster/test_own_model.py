"""A decoder of a user's own package is served and live-scaled: every process imports it, tokens are its own."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import own_models
from blitzjax import config as configs
from blitzjax.cli_serve import checkpoint
from blitzjax.models.examples import alternating
from blitzjax.serve.client import Client
from blitzjax.serve.local import LocalCluster


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What `blitzjax serve my_package.my_model:build --checkpoint DIR` converts and serves."""
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "my_model.py").write_text(Path(alternating.__file__).read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BLITZJAX_CACHE", str(tmp_path / "cache"))
    own_models.save(own_models.filled(seed=1), tmp_path / "trained")
    return checkpoint("my_package.my_model:build", "float32", tmp_path / "trained")


def in_phase(client: Client, phase: str) -> int:
    """Instances with layers."""
    return sum(i.phase == phase and i.layers_loaded > 0 for i in client.status().instances)


def test_own_model_is_served_and_scaled_live(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    rng, model = random.Random(3), own_models.filled(seed=1)
    asked = [[rng.randrange(256) for _ in range(length)] for length in (5, 40, 90) * 4]
    expected = [own_models.greedy(model, prompt, 6) for prompt in asked[:3]]
    config = configs.load(None, (
        "serve.port=0", "scale.policy=manual", "cluster.pool=2", "cluster.threads=1", "engine.dtype=float32",
        "engine.max_model_len=128", "engine.max_num_seqs=2", "engine.max_num_batched_tokens=32",
        "transfer.chunk_bytes=512", f"engine.executable_cache={tmp_path_factory.getbasetemp() / 'executables'}"))
    with LocalCluster(config, directory) as cluster, cluster.client() as client:
        cluster.wait_ready(300)
        answers = [client.generate(prompt, max_tokens=6, ignore_eos=True) for prompt in asked]
        assert [list(a.token_ids) for a in answers[:3]] == expected
        deadline = time.monotonic() + 300
        while len(client.status().instances) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        helped = False
        while not helped:  # a busy machine may miss it
            assert time.monotonic() < deadline
            client.scale(1, wait=True, timeout_s=300)
            client.scale(2, live="zigzag")
            while not in_phase(client, "live") and in_phase(client, "serving") < 2:
                time.sleep(0.01)
            with ThreadPoolExecutor(len(asked)) as senders:
                during = list(senders.map(lambda p: client.generate(p, max_tokens=6, ignore_eos=True), asked))
            assert [a.token_ids for a in during] == [a.token_ids for a in answers]
            helped = any(0 < a.usage.layers_helped < 4 for a in during)  # two kinds of layers, on two instances
            assert client.scale(2, live="zigzag", wait=True, timeout_s=300).serving == 2
        assert [client.generate(p, max_tokens=6, ignore_eos=True).token_ids for p in asked] == [
            a.token_ids for a in answers]
