"""A toy checkpoint (no weights, token id = byte) and clusters of toy workers around the real controller."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from blitzjax import config as configs
from blitzjax.engine.locations import FORMAT_VERSION
from blitzjax.serve.local import LocalCluster
from blitzjax.serve.hosts import Launch
from blitzjax.types import ModelSpec

sys.path.append(str(Path(__file__).parents[1] / "reference"))  # children import this file without conftest.py

from byte_tokenizer import byte_tokenizer  # noqa: E402

EOS, BOS, VOCAB = 256, 257, 258
RESUME_S = 300  # a server waits so long for clients that may come back, and workers for a controller
AT_ONCE_S = 100.0  # for a machine that stands still now and then: well below what else would end it
SPEC = ModelSpec(name="toy", family="toy", layers=4, dim=1, heads=1, kv_heads=1, head_dim=1, ffn_dim=1, vocab=VOCAB,
                 max_len=4096, rope_theta=1e4, norm_eps=1e-6, tied_embeddings=False, dtype="float32",
                 eos_token_ids=(EOS,))
TEMPLATE = ("{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
            "{% if add_generation_prompt %}a{% endif %}")
TOY_WORKER = (sys.executable, str(Path(__file__).with_name("toy_worker.py")))
TOY_COORDINATOR = (sys.executable, "-c", """
import signal, sys, grpc
from concurrent.futures import ThreadPoolExecutor
server = grpc.server(ThreadPoolExecutor(1))
server.add_insecure_port(sys.argv[sys.argv.index("--address") + 1])
server.start()
signal.pause()
""")


def write_model(directory: Path, tokenizer: bool = True, template: str | None = TEMPLATE,
                spec: ModelSpec = SPEC) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    units = [{"bytes": 10} for _ in range(spec.units)]
    (directory / "manifest.json").write_text(json.dumps({"version": FORMAT_VERSION, "spec": asdict(spec), "units": units}, indent=1))
    if tokenizer:
        byte_tokenizer({"<|eos|>": EOS, "<|bos|>": BOS}).save(str(directory / "tokenizer.json"))
        (directory / "tokenizer_config.json").write_text(json.dumps(
            {"eos_token": {"content": "<|eos|>"}, "bos_token": "<|bos|>", "chat_template": template}))
    return directory


def toy_config(*overrides: str) -> configs.Config:
    """Nobody who only gets no time is taken for gone or hung."""
    return configs.load(None, ("serve.port=0", "scale.policy=manual", "scale.live=off", "cluster.pool=2",
                               "engine.max_model_len=512", "engine.max_num_seqs=4", "serve.shutdown_timeout_s=5.0",
                               f"serve.resume_timeout_s={RESUME_S}", "serve.hang_timeout_s=120", *overrides))


def toy_launch(run_dir: Path, **env: str) -> Launch:
    gate = {"TOY_GATE": str(run_dir / "gate")}
    return Launch(run_dir=run_dir, worker=TOY_WORKER, coordinator=TOY_COORDINATOR, env=gate | env)


@contextlib.contextmanager
def held(cluster: LocalCluster) -> Iterator[None]:
    """No answer of its workers gets beyond its first token, and no load begins, until the block ends."""
    gate = cluster.run_dir / "gate"
    gate.touch()
    try:
        yield
    finally:
        gate.unlink()


def wait_whole(cluster: LocalCluster) -> None:
    """An instance serves and every worker has joined."""
    cluster.wait_ready(300)
    with cluster.client() as client:
        eventually(lambda: len(client.status().instances) == cluster.config.cluster.pool)


def eventually(condition: Callable[[], bool], timeout_s: float = 300.0) -> None:
    """Waits for what other processes do."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)
