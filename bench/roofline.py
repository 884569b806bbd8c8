"""How near is the engine to what the device can do? Decode against memory bandwidth, prefill against the matrix rate.

Both limits are measured here, in the same run, on the same device: the fastest of reading and of copying a large array,
and products of large square matrices, in bfloat16 or float32. They are XLA's, which on CPUs leave room above.
Decode is the engine's own step, of requests whose caches are almost full: all layers, head, sampling, tokens on the
host. Its floor is the time to read every parameter and every token's KV once. Prefill is one prompt through all layers,
chunk by chunk; its floor is the products' and attention's operations.

    python -m bench.roofline --model llama-3-8b           any JAX device; weights are random, values do not matter
    python -m bench.roofline --torch-python PYTHON        beside transformers, in the environment of that interpreter

Medians of steps, best of the limits: a busy machine makes shares smaller, never larger. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import figures
from bench.result import say
from blitzjax.config import EngineConfig
from blitzjax.engine.convert import random_unit
from blitzjax.engine.kvcache import SlotCache
from blitzjax.engine.params import LayerStore, fill, model_bytes, unit_bytes, unit_kind
from blitzjax.engine.runner import Runner
from blitzjax.engine.sampling import greedy_draws
from blitzjax.engine.stages import Stages
from blitzjax.types import ModelSpec, Span

MODELS = {
    "llama-3-8b": ModelSpec("llama-3-8b", "llama", 32, 4096, 32, 8, 128, 14336, 128256, 8192, 5e5, 1e-5, False,
                            "bfloat16"),
    "qwen2.5-1.5b": ModelSpec("qwen2.5-1.5b", "qwen2", 28, 1536, 12, 2, 128, 8960, 151936, 32768, 1e6, 1e-6, True,
                              "bfloat16"),
    "smollm2-135m": ModelSpec("smollm2-135m", "llama", 30, 576, 9, 3, 64, 1536, 49152, 8192, 1e5, 1e-5, True, "bfloat16"),
}
_LIMIT_RUNS = 5
_ENQUEUED = 10  # calls that an accelerator is given at once: to start one and to wait for it takes a tenth of its time
_PEER_TIMEOUT_S = 1800.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What the device does at best."""

    bytes_per_s: float
    flops_per_s: float


def decode_bytes(spec: ModelSpec, batch: int, seen: int, token_bytes: int) -> int:
    """Read in one step: every parameter but the rows of an untied table that nobody looks up, and each token's KV."""
    unused = 0 if spec.tied_embeddings else unit_bytes(spec, spec.embed_unit)
    return model_bytes(spec) - unused + batch * seen * token_bytes


def prefill_flops(spec: ModelSpec, tokens: int) -> float:
    """Two operations a weight and token, head once; scores and sums of a causal pass, half of tokens x tokens."""
    attn = spec.dim * spec.head_dim * (2 * spec.heads + 2 * spec.kv_heads)
    layer = 2 * tokens * (attn + 3 * spec.dim * spec.ffn_dim) + 2 * tokens**2 * spec.heads * spec.head_dim
    return spec.layers * layer + 2 * spec.dim * spec.vocab


def hugging_face(spec: ModelSpec) -> dict[str, object]:
    """As its config.json would have it."""
    return {"model_type": spec.family, "num_hidden_layers": spec.layers, "hidden_size": spec.dim,
            "num_attention_heads": spec.heads, "num_key_value_heads": spec.kv_heads, "head_dim": spec.head_dim,
            "intermediate_size": spec.ffn_dim, "vocab_size": spec.vocab, "max_position_embeddings": spec.max_len,
            "tie_word_embeddings": spec.tied_embeddings}


def limits(mib: int, side: int, calls: int = 1) -> Limits:
    """Of the first device: with an array of `mib` MiB, and with matrices of `side` x `side`, `calls` at a time."""
    values = jnp.ones((mib << 18,), jnp.float32)
    read = _best(calls, jax.jit(jnp.max), values)
    copy = _best(calls, jax.jit(lambda x: x + 1.0), values) / 2  # of the bytes, one half is read
    dot = jax.jit(partial(jnp.dot, preferred_element_type=jnp.float32))
    product = min(_best(calls, dot, *[jnp.ones((side, side), dtype)] * 2) for dtype in (jnp.bfloat16, jnp.float32))
    return Limits(values.nbytes / min(read, copy), 2 * side**3 / product)


def _best(calls: int, call: Callable[..., jax.Array], *args: jax.Array) -> float:
    """Seconds of one call. A device runs what it is given in order, so the last one's end is that of all."""
    def run() -> None:
        for _ in range(calls):
            out = call(*args)
        out.block_until_ready()

    run()
    return min(_timed(run) for _ in range(_LIMIT_RUNS)) / calls


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def build(spec: ModelSpec, config: EngineConfig) -> Runner:
    """Every unit in memory of its own; units of a kind have the same values."""
    store, drawn = LayerStore(spec, jax.local_devices()[:1]), dict[str, dict[str, np.ndarray]]()
    for unit in range(spec.units):
        kind = unit_kind(spec, unit)
        drawn[kind] = drawn.get(kind) or random_unit(spec, unit, seed=1)
        fill(store, unit, drawn[kind])
        store.commit(unit)
    return Runner(Stages(spec, config, store.mesh), store)


def decode_s(runner: Runner, batch: int, context: int, steps: int) -> float:
    """Median seconds of a step of `batch` requests; after the last one their caches of `context` tokens are full."""
    stages = runner.stages
    cache, rows = SlotCache(stages), stages.shapes.batch(batch)
    cache.slots, cache.context = [f"r{row}" if row < batch else None for row in range(rows)], context
    cache.layers = [stages.blank(rows, context) for _ in range(runner.spec.layers)]
    tokens, seen = np.ones(rows, np.int32), []
    for step in range(steps + 1):
        lengths = np.full(rows, context - steps - 1 + step, np.int32)
        seen.append(_timed(lambda: np.asarray(runner.decode(cache, tokens, lengths, greedy_draws(rows)).tokens)))
    return statistics.median(seen[1:])


def prefill_s(runner: Runner, tokens: int, runs: int) -> float:
    """Median seconds from token ids to every layer's KV and residuals."""
    def once() -> None:
        prefill = runner.begin([1] * tokens)
        runner.run_span(prefill, Span(0, runner.spec.layers))
        jax.block_until_ready(prefill.x)

    return statistics.median([_timed(once) for _ in range(runs + 1)][1:])


def measure(runner: Runner, batches: Sequence[int], context: int, prompt: int, steps: int, found: Limits
            ) -> dict[str, object]:
    spec = runner.spec
    token = spec.layers * sum(a.size * a.dtype.itemsize for a in runner.stages.kv_specs(1, 1))
    decode = {}
    for batch in batches:
        took = decode_s(runner, batch, context, steps)
        floor = decode_bytes(spec, batch, context - steps // 2, token) / found.bytes_per_s
        decode[str(batch)] = figures.rounded_row({
            "step_ms": took * 1e3, "tokens_per_s": batch / took, "floor_ms": floor * 1e3, "of_roofline": floor / took})
        print("  decode {:3}: {step_ms:9.2f} ms a step, floor {floor_ms:.2f} ms: {of_roofline:.2f} of the roofline, "
              "{tokens_per_s:.0f} tok/s".format(batch, **decode[str(batch)]), flush=True)
    took = prefill_s(runner, prompt, max(1, steps // 8))
    floor = prefill_flops(spec, prompt) / found.flops_per_s
    prefill = figures.rounded_row({"tokens": prompt, "took_ms": took * 1e3, "tokens_per_s": prompt / took,
                                   "floor_ms": floor * 1e3, "of_matrix_rate": floor / took})
    print("  prefill {tokens:.0f}: {took_ms:.1f} ms, floor {floor_ms:.1f} ms: {of_matrix_rate:.2f} of the matrix rate, "
          "{tokens_per_s:.0f} tok/s".format(**prefill), flush=True)
    return {"decode": decode, "prefill": prefill}


def beside(python: str, spec: ModelSpec, batches: Sequence[int], context: int, prompt: int, steps: int
           ) -> dict[str, object]:
    """transformers on the same shapes, before this process takes the device's memory."""
    order = {"config": hugging_face(spec), "batches": list(batches), "context": context - steps - 1, "prompt": prompt,
             "steps": steps}
    done = subprocess.run([python, Path(__file__).with_name("peer_transformers.py")], input=json.dumps(order), text=True,
                          capture_output=True, timeout=_PEER_TIMEOUT_S)
    if done.returncode:
        raise SystemExit(f"transformers did not run:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def compared(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, float]:
    """Our speed over theirs, by batch, and of the prompt."""
    out = {f"decode_{batch}": took * 1e3 / ours["decode"][batch]["step_ms"] for batch, took in theirs["decode"].items()}
    return figures.rounded_row(out | {"prefill": theirs["prefill"] * 1e3 / ours["prefill"]["took_ms"]})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", choices=MODELS)
    parser.add_argument("--quick", action="store_true", help="batches 1 and 8, short contexts, few steps")
    parser.add_argument("--batches", default="1,8,32,64", help="default: %(default)s")
    parser.add_argument("--context", type=int, default=1024, help="KV tokens of a request, a power of two (%(default)s)")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens (%(default)s)")
    parser.add_argument("--steps", type=int, default=32, help="timed, for each batch (%(default)s)")
    parser.add_argument("--fused-layers", type=int, default=0, help="engine.fused_layers of decode (%(default)s)")
    parser.add_argument("--torch-python", help="an interpreter that has torch and transformers")
    parser.add_argument("--out", type=Path, help="write the JSON object to this file as well")
    args = parser.parse_args(argv)
    if args.context < 256 or args.context & (args.context - 1):
        parser.error("--context must be a power of two, at least 256")
    if args.quick:
        args.batches, args.context, args.prompt, args.steps = "1,8", 256, 512, 8
    spec, batches = MODELS[args.model], [int(b) for b in args.batches.split(",")]
    sizes = (batches, args.context, args.prompt, args.steps)
    theirs = beside(args.torch_python, spec, *sizes) if args.torch_python else None
    device = jax.local_devices()[0]
    accelerated = device.platform != "cpu"
    found = limits(1024, 8192, _ENQUEUED) if accelerated else limits(256, 1024)
    print(f"{spec.name} on {device.device_kind}, {figures.machine()}: {found.bytes_per_s / 1e9:.1f} GB/s, "
          f"{found.flops_per_s / 1e12:.2f} TFLOP/s", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        config = EngineConfig(max_model_len=max(args.context, args.prompt), max_num_seqs=max(batches),
                              fused_layers=args.fused_layers, executable_cache=scratch)
        runner = build(spec, config)
        ours = measure(runner, *sizes, found)
    result = {"model": spec.name, "device": device.device_kind, "platform": device.platform, "jax": jax.__version__,
              "attention": runner.stages.attention.fused or ("native" if runner.stages.attention.kernels else "products"),
              "gb_per_s": figures.rounded(found.bytes_per_s / 1e9), "tflop_per_s": figures.rounded(found.flops_per_s / 1e12),
              "context": args.context, "fused_layers": args.fused_layers, "machine": figures.machine(), **ours}
    if theirs is not None:
        result |= {"transformers": theirs, "over_transformers": compared(ours, theirs)}
        print(f"  over transformers: {result['over_transformers']}")
    say("roofline", result, argv, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
