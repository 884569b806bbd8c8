"""What one instance's model computes, measured without a cluster: the time of a layer, and top-2 logit margins.

Runs as a process of its own on one core, like a worker. `python -m bench.probe layer CHECKPOINT DTYPE TOKENS` and
`python -m bench.probe margins CHECKPOINT < [[token, ...], ...]` answer with one line of JSON.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class Sizes:
    """What must arrive before an instance can run its first layer, and for each further one."""

    layers: int
    layer_bytes: int
    embed_bytes: int


def sizes(checkpoint: Path) -> Sizes:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    layer, *_, embed, _ = (unit["bytes"] for unit in manifest["units"])
    return Sizes(manifest["spec"]["layers"], layer, embed)


def layer_s(checkpoint: Path, dtype: str, tokens: int) -> float:
    """Compute of one layer for one prompt on one core."""
    return _ask("", "layer", str(checkpoint), dtype, str(tokens))


def margins(checkpoint: Path, contexts: Sequence[Sequence[int]]) -> list[float]:
    """Difference of the two largest float32 logits after each context; the checkpoint must be float32."""
    return _ask(json.dumps([list(c) for c in contexts]), "margins", str(checkpoint)) if contexts else []


def _ask(sent: str, *argv: str):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "bench.probe", *argv]
    done = subprocess.run(command, input=sent, env=env, cwd=ROOT, text=True, capture_output=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------------------------------------------------------------
# The process


def _layer(checkpoint: str, dtype: str, tokens: str) -> float:
    """Median over all layers and three prompts; CPU time, which on one core is the time when nobody else runs there."""
    import jax

    from blitzjax.config import EngineConfig
    from blitzjax.engine.checkpoint import Checkpoint, with_dtype
    from blitzjax.engine.params import LayerStore
    from blitzjax.engine.runner import Runner
    from blitzjax.engine.stages import Stages
    from blitzjax.types import Span

    opened = Checkpoint.open(Path(checkpoint))
    spec = with_dtype(opened.spec, dtype)
    store = LayerStore(spec, jax.local_devices()[:1])
    for unit in range(spec.units):
        opened.load_unit(unit, store)
    runner = Runner(Stages(spec, EngineConfig(dtype=dtype, max_model_len=2 * int(tokens)), store.mesh), store)
    times = []
    for _ in range(4):
        prefill = runner.begin(list(range(100, 100 + int(tokens))))
        for layer in range(spec.layers):
            began = time.process_time()
            runner.run_span(prefill, Span(layer, layer + 1))
            jax.block_until_ready(prefill.x)
            times.append(time.process_time() - began)
    return statistics.median(times[spec.layers:])


def _margins(checkpoint: str) -> list[float]:
    """Every context in one pass through all layers, padded at the end to one length: causal, so padding is unseen."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from blitzjax.engine.checkpoint import Checkpoint
    from blitzjax.engine.modules import bind
    from blitzjax.engine.params import LayerStore, unit_kind
    from blitzjax.models import family

    contexts = json.loads(sys.stdin.read())
    opened = Checkpoint.open(Path(checkpoint))
    spec = opened.spec
    store = LayerStore(spec, jax.local_devices()[:1])
    for unit in range(spec.units):
        opened.load_unit(unit, store)
    length = max(map(len, contexts))
    at = jnp.arange(length, dtype=jnp.int32)[None]
    aux = family(spec.family).aux(spec, at)
    embed = jax.jit(lambda p, t: bind(spec, "embed")(p)(t, at))
    layer = jax.jit(lambda p, x, kind: bind(spec, kind)(p)(x, aux, _attend), static_argnums=2)
    head = jax.jit(lambda p, x, table: bind(spec, "head")(p)(x, table))
    table = store.params(spec.embed_unit)["table"] if spec.tied_embeddings else None
    out = []
    for context in contexts:
        x = embed(store.params(spec.embed_unit), np.array([context + [0] * (length - len(context))], np.int32))
        for index in range(spec.layers):
            x = layer(store.params(index), x, unit_kind(spec, index))
        logits = np.asarray(head(store.params(spec.head_unit), x[:, len(context) - 1], table))[0]
        second, first = np.partition(logits, -2)[-2:]
        out.append(float(first - second))
    return out


def _attend(q, k, v, scoring):
    """q [1, T, H, hd], k and v [1, T, KV, hd] → f32[1, T, H * hd], in full float32."""
    import jax
    import jax.numpy as jnp

    highest = jax.lax.Precision.HIGHEST
    batch, length, heads, size = q.shape
    q = q.reshape(batch, length, k.shape[2], -1, size)
    products = jnp.einsum("btkgh,bskh->bkgts", q, k, precision=highest)
    weights = scoring.weights(products, size, jnp.arange(length))
    return jnp.einsum("bkgts,bskh->btkgh", weights, v, precision=highest).reshape(batch, length, heads * size)


def main(argv: Sequence[str]) -> int:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    kind, *rest = argv
    print(json.dumps(_layer(*rest) if kind == "layer" else _margins(*rest)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
