"""Run as a process: `native_process.py DIRECTORY`, a bfloat16 model's decode step in an engine of its own.

Prints "compiled" or "loaded", "native" or "plain" for the product it used, and a digest of the result.
"""

from __future__ import annotations

import hashlib
import sys

import jax
import numpy as np

from blitzjax.config import EngineConfig
from blitzjax.engine import native
from blitzjax.engine.params import LayerStore, fill, unit_arrays
from blitzjax.engine.stages import Stages
from blitzjax.types import ModelSpec, Span

SPEC = ModelSpec("tiny", "llama", 1, 64, 4, 2, 16, 128, 272, 512, 10000.0, 1e-5, True, "bfloat16")
ROWS, CONTEXT = 4, 512

if __name__ == "__main__":
    native._BUILD_S = 600.0
    config = EngineConfig(dtype="bfloat16", max_model_len=CONTEXT, max_num_seqs=ROWS, executable_cache=sys.argv[1])
    store = LayerStore(SPEC, jax.devices()[:1])
    rng = np.random.default_rng(0)
    for unit in range(SPEC.units):
        fill(store, unit, {a.name: rng.normal(size=a.shape).astype(np.float32) for a in unit_arrays(SPEC, unit)})
        store.commit(unit)
    stages = Stages(SPEC, config, store.mesh)
    tokens, lengths = np.arange(ROWS, dtype=np.int32)[:, None], np.arange(ROWS, dtype=np.int32)
    x, aux = stages.embed(store.params(SPEC.embed_unit), tokens, lengths[:, None])
    x, ((k, v),) = stages.decode(Span(0, 1), [store.params(0)], x, aux, [stages.blank(ROWS, CONTEXT)], lengths)
    digest = hashlib.sha256(b"".join(np.asarray(a).tobytes() for a in (x, k, v))).hexdigest()
    text = stages._stage("decode", 0, 1, ROWS, CONTEXT).as_text()
    print("compiled" if stages.cache.compiled else "loaded", "native" if "blitzjax_matmul" in text else "plain", digest)
